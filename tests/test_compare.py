"""The comparison of optimizers: who takes part, the search for a rate, and what is reported."""

import csv
import json
import math
import os
import re
import statistics
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest

from pretrain.config_file import load
from pretrain.errors import ConfigError
from pretrain.lab.compare_arguments import add_arguments
from pretrain.lab.compare_report import table, write_report
from pretrain.lab.compare_results import Outcome, compete
from pretrain.lab.compare_setup import comparison_of, read_entries
from pretrain.observe.metrics import read_metrics
from tests.ranks import run_ranks, run_worker, start_single
from tests.tiny import write_config


def comparison(path, optimizers, *more):
    parser = ArgumentParser()
    add_arguments(parser)
    return comparison_of(
        parser.parse_intermixed_args([str(path), f"--optimizers={optimizers}", *more])
    )


# --- who takes part -------------------------------------------------------------------------------


def test_names_options_and_rates(tmp_path):
    config = load(write_config(tmp_path))
    text = (
        "adamw, sgd:momentum=0.5,nesterov=true,lion@1e-4,muon@3e-3:scale=spectral,"
        "adamw:betas=[0.8, 0.9],tests.own:Thing@1e-2:options={eps=1e-6, foreach=false}"
    )
    entries, problems = read_entries(text, config)
    assert not problems
    assert [(e.label, e.centre) for e in entries] == [
        ("adamw", 2e-3),
        ("sgd:momentum=0.5,nesterov=true", 0.5),
        ("lion", 1e-4),
        ("muon:scale=spectral", 3e-3),
        ("adamw:betas=[0.8, 0.9]", 2e-3),
        ("tests.own:Thing:options={eps=1e-6, foreach=false}", 1e-2),
    ]
    sgd, muon, adamw, own = (entries[k].section for k in (1, 3, 4, 5))
    assert (sgd.momentum, sgd.nesterov, muon.scale) == (0.5, True, "spectral")
    assert adamw.betas == (0.8, 0.9)
    assert (own.name, own.options) == ("tests.own:Thing", {"eps": 1e-6, "foreach": False})
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", e.slug) for e in entries)


def test_the_configs_own_section_holds_where_it_is_named_without_options(tmp_path):
    path = write_config(tmp_path, optimizer={"name": "lion", "betas": [0.7, 0.8]})
    found = comparison(path, "lion,adamw,lion:weight_decay=0.5")
    lion, adamw, other = (found.trial(e, 1e-3, 5).optimizer for e in found.entries)
    assert (lion.betas, lion.weight_decay) == ((0.7, 0.8), 1.0)
    assert adamw.betas == (0.9, 0.95)  # its own default, not lion's
    assert (other.betas, other.weight_decay) == ((0.9, 0.99), 0.5)


def test_all_mistakes_are_told_at_once(tmp_path):
    path = write_config(tmp_path)
    names = "adamw,adam2,muon:scale=large,lion@fast,sgd:pace=1,adamw@1e-3,lamb,nesterov=true"
    with pytest.raises(ConfigError) as caught:
        comparison(path, names, "--rates=2", "--seeds=0", "--factor=1")
    keys = [problem.key for problem in caught.value.problems]
    assert keys == [
        "--seeds", "--rates", "--factor", "adam2: optimizer.name",
        "muon:scale=large: optimizer.scale", "--optimizers", "sgd:pace=1: optimizer.pace",
        "--optimizers", "--optimizers",
    ]  # fmt: skip
    text = str(caught.value)
    assert "did you mean 'adam'?" in text or "did you mean 'adamw'?" in text
    assert "RATE is a number, 1e-30 to 1e+30" in text
    assert "each is named once" in text


def test_rules_that_span_sections_hold_for_each_optimizer(tmp_path):
    path = write_config(tmp_path, recipe__momentum={"to": 0.8})
    with pytest.raises(ConfigError) as caught:
        comparison(path, "adamw,adagrad,schedulefree")
    assert [p.key for p in caught.value.problems] == [
        "adagrad: recipe.momentum", "schedulefree: recipe.momentum"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.validation_fraction"):
        comparison(write_config(tmp_path), "adamw", "data.validation_fraction=0")


# --- what they train ------------------------------------------------------------------------------


def test_runs_differ_in_optimizer_rate_and_seed_only(tmp_path):
    path = write_config(tmp_path)
    found = comparison(path, "adamw,lion@1e-3", "--seeds=3", f"--output={tmp_path}/out")
    assert (found.seeds, found.planned_runs) == ((5, 6, 7), 10)
    assert [found.grid(entry) for entry in found.entries] == [
        [0.000667, 0.002, 0.006], [0.000333, 0.001, 0.003]]  # fmt: skip
    trial = found.trial(found.entries[1], 0.003, 6)
    assert (trial.name, trial.seed) == ("lion-rate0.003-seed6", 6)
    assert trial.run_directory == tmp_path / "out" / "runs" / trial.name
    base = load(path)
    for same in ("model", "data", "engine", "validation", "guard"):
        assert getattr(trial, same) == getattr(base, same)
    assert trial.recipe.batch == base.recipe.batch
    recipe = trial.build_recipe()
    rates = [recipe.learning_rate(samples) for samples in (0, 12, 160)]
    assert rates == pytest.approx([0, 0.003, 0.0003])  # the floor is a tenth of the peak, as before


def test_schedule_free_takes_a_constant_rate_with_the_warm_up(tmp_path):
    found = comparison(write_config(tmp_path), "schedulefree,schedulefree-sgd,adamw")
    for entry in found.entries[:2]:
        rate = found.trial(entry, 0.5, 5).build_recipe().learning_rate
        assert [rate(samples) for samples in (0, 6, 12, 100, 159)] == [0, 0.25, 0.5, 0.5, 0.5]


def test_the_end_is_validated_even_if_the_config_never_asks(tmp_path):
    path = write_config(tmp_path, validation={"samples": 6})
    found = comparison(path, "adamw")
    assert str(found.config.validation.every) == "15 samples"  # 151 samples in whole batches


# --- the search for a rate ------------------------------------------------------------------------


def outcome(loss, directory="x", seconds=0.1):
    lost = None if math.isfinite(loss) else "why"
    return Outcome(Path(directory), (0, 60, 100), (4.0, loss + 1, loss), seconds, lost)


def searched(tmp_path, loss_of, *more, best=None):
    """Standing, the runs made as (k, seed) and what was expected, for losses by (k, seed)."""
    found = comparison(write_config(tmp_path), "adamw@1", "--factor=10", "--seeds=3", *more)
    runs, expected = [], [0]

    def train(rate, seed):
        k = round(math.log10(rate))
        runs.append((k, seed))
        return outcome(loss_of(k, seed))

    def expect(more):
        expected[0] += more

    standing = compete(found, found.entries[0], train, expect)
    assert found.planned_runs + expected[0] == len(runs)
    return standing, runs


def test_the_best_rate_inside_the_grid_gets_the_other_seeds(tmp_path):
    standing, runs = searched(tmp_path, lambda k, seed: 2 + k * k + seed / 10)
    assert runs == [(-1, 5), (0, 5), (1, 5), (0, 6), (0, 7)]
    assert (standing.best, standing.edge, standing.diverged) == (1.0, "", 0)
    assert standing.mean == pytest.approx(2.6)
    assert standing.spread == pytest.approx(0.1)
    assert standing.halfway == pytest.approx(3.6)  # the first at or after half of the tokens


@pytest.mark.parametrize(("lowest_at", "grid", "edge"), [
    (2, [-1, 0, 1, 2, 3], ""),
    (3, [-1, 0, 1, 2, 3], "highest"),
    (9, [-1, 0, 1, 2, 3], "highest"),
    (-2, [-1, 0, 1, -2, -3], ""),
    (-9, [-1, 0, 1, -2, -3], "lowest"),
])  # fmt: skip
def test_a_best_rate_at_the_edge_extends_the_grid_twice_at_most(tmp_path, lowest_at, grid, edge):
    standing, runs = searched(tmp_path, lambda k, seed: 2 + abs(k - lowest_at))
    best = max(min(lowest_at, 3), -3)
    assert runs == [*((k, 5) for k in grid), (best, 6), (best, 7)]
    assert standing.edge == edge


def test_a_single_rate_has_no_edge(tmp_path):
    standing, runs = searched(tmp_path, lambda k, seed: 2, "--rates=1")
    assert runs == [(0, 5), (0, 6), (0, 7)]
    assert standing.edge == ""


def test_rates_that_diverge_are_the_worst(tmp_path):
    standing, runs = searched(tmp_path, lambda k, seed: math.inf if k >= 0 else 3 - k)
    assert runs == [(-1, 5), (0, 5), (1, 5), (-2, 5), (-1, 6), (-1, 7)]
    assert standing.best == 0.1
    standing, runs = searched(tmp_path, lambda k, seed: math.inf)
    assert runs == [(-1, 5), (0, 5), (1, 5), (-2, 5), (-3, 5)]  # and no other seeds
    assert (standing.mean, standing.spread, standing.diverged) == (math.inf, None, 1)
    standing, _ = searched(tmp_path, lambda k, seed: math.inf if seed == 7 else 2 + k * k)
    assert (standing.mean, standing.spread, standing.diverged) == (math.inf, None, 1)


def test_the_report_fits_and_stays_valid_when_all_diverge(tmp_path):
    long = "ademamix:slow_beta=0.999,slow_weight=3.0,epsilon=1e-9,warmup_steps=100"
    found = comparison(write_config(tmp_path), f"adamw,lamb,{long}", f"--output={tmp_path}/out")
    (tmp_path / "out").mkdir()
    standings = [
        compete(found, entry, lambda rate, seed, loss=loss: outcome(loss))
        for entry, loss in zip(found.entries, (math.inf, 12345.678, 3.5), strict=True)
    ]
    text = table(found, standings)
    assert max(map(len, text.splitlines())) <= 100
    assert [line.split()[0][:4] for line in text.splitlines()[1:4]] == ["adem", "lamb", "adam"]
    assert "diverged: 1 of 1 runs" in text
    for path in write_report(found, standings):
        assert path.stat().st_size > 500
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [o["mean_loss"] for o in results["optimizers"]] == [3.5, 12345.678, None]


# --- the command ----------------------------------------------------------------------------------

NAMES = "adamw@2e-2,sgd:momentum=0.9,nesterov=true"


def run_compare(path, output, *arguments):
    options = [str(path), "--seeds=2", f"--output={output}", *map(str, arguments)]
    return run_worker(["compare", *options], "launch.cli")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison: (config, output folder, what was printed)."""
    folder = tmp_path_factory.mktemp("compare")
    path = write_config(folder, model__dropout=0.1)  # random numbers of a step count too
    code, printed = run_compare(path, folder / "out", f"--optimizers={NAMES}")
    assert code == 0, printed
    return path, folder / "out", printed


def test_what_is_reported_is_what_the_metrics_say(finished):
    _, output, printed = finished
    results = json.loads((output / "results.json").read_text())
    with open(output / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list((output / "runs").iterdir())) >= 8
    for row in rows:
        metrics = read_metrics(output / "runs" / row["run"] / "metrics.jsonl")
        checks = [m for m in metrics if "validation_loss" in m]
        assert [m["step"] for m in checks] == [0, 10, 20, 23]
        assert float(row["final_loss"]) == checks[-1]["validation_loss"]
        assert float(row["halfway_loss"]) == checks[2]["validation_loss"]
        seconds = [m["step_seconds"] for m in metrics if m["step"] > 1]
        assert float(row["step_seconds"]) == pytest.approx(statistics.fmean(seconds))
        assert not (output / "runs" / row["run"] / "checkpoints").exists()
    for found in results["optimizers"]:
        mine = [row for row in rows if row["optimizer"] == found["label"]]
        best = min(
            (row for row in mine if row["seed"] == "5"), key=lambda r: float(r["final_loss"])
        )
        assert found["best_rate"] == float(best["rate"])
        finals = [float(row["final_loss"]) for row in mine if row["rate"] == best["rate"]]
        assert len(finals) == 2
        assert found["mean_loss"] == pytest.approx(statistics.fmean(finals))
        assert found["spread"] == pytest.approx(statistics.stdev(finals))
        assert re.search(
            rf"{best['rate']} .* {found['mean_loss']:.4f} +{found['spread']:.4f}", printed
        )
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")


def trained(folder):
    return [{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "lr")}
            for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]  # fmt: skip


def losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def test_runs_are_those_of_the_worker(finished, tmp_path):
    """Bit by bit as in a process of its own; held out are the samples of the config's seed."""
    _, output, _ = finished
    results = json.loads((output / "results.json").read_text())
    last = [row for row in results["runs"] if row["seed"] == 6][-1]
    own = last["run"].replace("seed6", "seed5")
    for name in (last["run"], own):
        saved = output / "runs" / name
        code, printed = run_worker([str(saved / "config.toml"), f"directory={tmp_path}"])
        assert code == 0, printed
        assert trained(saved) == trained(tmp_path / name)
        assert len(trained(saved)) == 23
    assert losses(output / "runs" / own) == losses(tmp_path / own)
    assert losses(output / "runs" / last["run"]) != losses(tmp_path / last["run"])


def test_a_comparison_goes_on_where_it_was_killed(finished, tmp_path):
    path, whole, _ = finished
    output = tmp_path / "out"
    arguments = ["compare", str(path), "--seeds=2", f"--output={output}", f"--optimizers={NAMES}"]
    process = start_single(killed_main, arguments)
    deadline = time.monotonic() + 120
    while len(list(output.glob("runs/*/result.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    done = {p: p.stat().st_mtime_ns for p in output.glob("runs/*/result.json")}
    assert 2 <= len(done) < len(list(whole.glob("runs/*")))
    code, again = run_compare(path, output, f"--optimizers={NAMES}")
    assert code == 0, again
    assert again.count("(known)") == len(done)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    for run in whole.glob("runs/*"):
        assert trained(run) == trained(output / "runs" / run.name)
        assert losses(run) == losses(output / "runs" / run.name)
    code, again = run_compare(path, output, f"--optimizers={NAMES}")
    runs = len(list(whole.glob("runs/*")))
    assert (code, again.count("(known)")) == (0, runs)
    key = "step_seconds"  # the only thing that differs from a comparison without a break
    first, second = (
        [{k: v for k, v in row.items() if k != key}
         for row in json.loads((folder / "results.json").read_text())["runs"]]
        for folder in (whole, output)
    )  # fmt: skip
    assert first == second


def killed_main(arguments):
    from launch.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(arguments)


def test_runs_of_another_comparison_are_refused(finished):
    path, output, _ = finished
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    code, printed = run_compare(path, output, f"--optimizers={NAMES}", "recipe.train=120 samples")
    assert code == 2
    assert "holds a run of another comparison" in printed
    assert "recipe.train: 160 samples -> 120 samples" in printed
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_a_mistake_is_told_before_anything_trains(tmp_path):
    path = write_config(tmp_path)
    code, printed = run_compare(path, tmp_path / "out", "--optimizers=adamw,adamx,muon:pace=1")
    assert code == 2
    assert "2 problems" in printed
    assert "adamx: optimizer.name" in printed
    assert "muon:pace=1: optimizer.pace" in printed
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path):
    path = write_config(tmp_path)
    options = ("--optimizers=sgd@1e29,adamw", "--rates=1")
    for known in (0, 3):  # a second time it is still known that one diverged
        code, printed = run_compare(path, tmp_path / "out", *options)
        assert code == 0, printed
        assert printed.count("(known)") == known
        assert "sgd, rate 1e+29, seed 5: diverged: step" in printed
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [(o["label"], o["runs"], o["diverged"]) for o in results["optimizers"]] == [
            ("adamw", 2, 0), ("sgd", 1, 1)]  # fmt: skip
        lost = [row for row in results["runs"] if row["diverged"]]
        assert [(row["run"], row["final_loss"]) for row in lost] == [("sgd-rate1e29-seed5", None)]


def ranks_compare(world, path, output):
    from pretrain.lab.compare import compare

    options = ["--rates=1", "--seeds=2", f"--output={output}", "model.dropout=0"]
    found = comparison(path, "adamw", *options)
    return [standing.mean for standing in compare(found, world)]


def test_several_ranks_agree(finished, tmp_path):
    path, _, _ = finished
    two = run_ranks(2, ranks_compare, path, tmp_path / "two")
    assert two[0] == two[1]
    assert two[0] == pytest.approx(run_ranks(1, ranks_compare, path, tmp_path / "one")[0], abs=1e-4)
