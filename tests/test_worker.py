"""The worker as a user meets it: bad input, launchers, guard, a golden run, what is recorded."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main as anthesis
from pretrain.config_file import load
from pretrain.observe.metrics import read_metrics
from tests.ranks import run_ranks, run_worker
from tests.tiny import VOCAB, write_config, write_corpus
from tokenizer.train import save, train_bpe

BIN = Path(sys.executable).parent


def refused(path, *overrides):
    """What the worker says of bad input: code 2, no traceback, no step taken, nothing written."""
    code, output = run_worker([str(path), *overrides])
    assert code == 2, output
    assert "Traceback" not in output
    run = path.parent / "runs" / "tiny"
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "config.toml").exists()
    return output


def damage(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated bin", "shard0.bin"),
        ("truncated idx", "shard0.idx"),
        ("dtype code", "dtype"),
        ("magic", "shard0.idx"),
        ("empty source", "shard0"),
        ("absent", "shard0"),
        ("too short", "sequence_length"),
        ("token outside the vocabulary", "vocab_size"),
    ],
)
def test_damaged_corpora_are_refused_before_step_1(tmp_path, what, words):
    path = write_config(tmp_path)
    data, index = tmp_path / "shard0.bin", tmp_path / "shard0.idx"
    if what == "truncated bin":
        data.write_bytes(data.read_bytes()[:-3])
    elif what == "truncated idx":
        index.write_bytes(index.read_bytes()[:-3])
    elif what == "dtype code":
        damage(index, 17, b"\x63")
    elif what == "magic":
        damage(index, 0, b"XX")
    elif what == "empty source":
        data.write_bytes(b"")
    elif what == "absent":
        index.unlink()
    elif what == "too short":
        write_corpus(tmp_path, documents=2)
    else:
        tokens = np.fromfile(data, dtype=np.uint16)
        np.full_like(tokens, VOCAB).tofile(data)
    assert words in refused(path)


def test_bad_configs_are_refused(tmp_path):
    path = write_config(tmp_path)
    output = refused(
        path,
        "data.sources.0.weight=-0.7",
        "recipe.learning_rate.peak=nan",
        "model.hiden_size=3",
        "engine.zero_stage=0",
    )
    for key in ("data.sources.0.weight", "learning_rate.peak", "hiden_size", "zero_stage"):
        assert key in output
    assert "sum to 0" in refused(path, "data.sources.0.weight=0", "data.sources.1.weight=0")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    path = write_config(tmp_path)
    folder = tmp_path / "tokenizer"
    save(train_bpe(["some text to learn from " * 40], 270), folder)
    assert "the model needs a row for every token" in refused(path, f"data.tokenizer={folder}")


def test_unwritable_places_are_refused(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "a-file").write_text("not a folder")
    said = refused(path, f"directory={tmp_path / 'a-file'}")
    assert "a file cannot be kept there: Not a directory" in said


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 700 kB, which holds two checkpoints of the tiny model and little more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_refused_at_start_and_costs_no_checkpoint_later(tmp_path, small_disk):
    path = write_config(tmp_path, directory=str(small_disk), checkpoint__every="1 steps")
    (small_disk / "ballast").write_bytes(b"x" * 500_000)
    assert "two checkpoints" in refused(path)
    (small_disk / "ballast").unlink()
    # Permanent checkpoints fill the disk in the middle of the run.
    code, output = run_worker([str(path), "checkpoint.keep_every=1 steps"])
    assert code == 2, output
    assert "could not be written" in output
    assert "Traceback" not in output
    kept = sorted((small_disk / "tiny" / "checkpoints").glob("step-*"))
    assert kept
    assert not list((small_disk / "tiny" / "checkpoints").glob(".partial*/*.distcp"))
    code, output = run_worker([str(path), f"name={kept[-1].parent.parent.name}", "start=resume",
                               "recipe.train=1000 samples", "checkpoint.every=1M"])  # fmt: skip
    assert f"goes on after step {int(kept[-1].name[5:])}" in output, code


# --- golden ---------------------------------------------------------------------------------------

GOLDEN = {1: 4.505324, 5: 4.182555, 12: 3.352962, 23: 3.026671}


def test_golden_losses(tmp_path):
    """One rank, fp32: a change of model, data order, recipe or optimizer shows here."""
    path = write_config(tmp_path)
    assert run_worker([str(path)])[0] == 0
    rows = {row["step"]: row for row in read_metrics(tmp_path / "runs/tiny/metrics.jsonl")}
    found = {step: round(rows[step]["loss"], 6) for step in GOLDEN}
    assert found == pytest.approx(GOLDEN, abs=5e-6)


# --- launchers ------------------------------------------------------------------------------------


def test_every_way_to_start_is_the_same_worker(tmp_path):
    path = str(write_config(tmp_path, observe__tensorboard=True))
    ways = {
        "anthesis": [BIN / "anthesis", "train", path],
        "python": [BIN / "python", "-m", "pretrain", path],
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "-m", "pretrain", path],  # noqa: E501
        "deepspeed": [BIN / "deepspeed", "--num_accelerators=2", "--module", "pretrain", path],
    }  # fmt: skip
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    environment.pop("OMP_NUM_THREADS", None)
    curves = {}
    for name, command in ways.items():
        done = subprocess.run([*map(str, command), f"name={name}", "engine.zero_stage=2"],
                              capture_output=True, text=True, env=environment)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{2 if name in ('torchrun', 'deepspeed') else 1} rank(s)" in done.stdout
        rows = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        curves[name] = [row["loss"] for row in rows if "loss" in row]
        assert list((tmp_path / "runs" / name / "tensorboard").glob("events.*"))
    assert len(curves["python"]) == 23
    for losses in curves.values():
        assert losses == pytest.approx(curves["python"], abs=1e-5)


def train_plainly(world, path, overrides):
    from pretrain.train import train_run

    train_run(load(path, overrides), world)


def test_another_architecture_trains(tmp_path):
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
             "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    path = write_config(tmp_path, model={"family": "hf", "vocab_size": VOCAB, "config": llama})
    losses = []
    for ranks, stage in ((1, 1), (2, 3)):
        name = f"ranks{ranks}"
        run_ranks(ranks, train_plainly, path, [f"name={name}", f"engine.zero_stage={stage}"])
        rows = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0][-1] < losses[0][0] - 0.2
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_an_unknown_architecture_is_refused(tmp_path):
    config = {"family": "hf", "vocab_size": VOCAB, "config": {"model_type": "lama"}}
    assert "llama" in refused(write_config(tmp_path, model=config))


# --- guard ----------------------------------------------------------------------------------------


def train_with_nans(world, path, steps):
    """Train with losses that are not finite at `steps`; the gradients are really accumulated."""
    import dataclasses

    from pretrain.engine.zero import ZeroEngine
    from pretrain.errors import DivergenceError
    from pretrain.train import train_run

    count, honest = iter(range(1, 1000)), ZeroEngine.forward_backward

    def sometimes_nan(engine, *batch):
        stats = honest(engine, *batch)
        return dataclasses.replace(stats, loss=math.nan) if next(count) in steps else stats

    ZeroEngine.forward_backward = sometimes_nan
    try:
        train_run(load(path), world)
    except DivergenceError as error:
        return str(error)
    finally:
        ZeroEngine.forward_backward = honest
    return ""


def test_guard_skips_and_gives_up(tmp_path):
    path = write_config(tmp_path)
    assert run_ranks(2, train_with_nans, path, (3, 4)) == ["", ""]
    rows = {row["step"]: row for row in read_metrics(tmp_path / "runs/tiny/metrics.jsonl")}
    assert [step for step, row in rows.items() if "skipped" in row] == [3, 4]
    assert math.isfinite(rows[23]["loss"])
    assert rows[23]["samples"] == 159  # skipped steps consume their samples
    path = write_config(tmp_path, name="lost")
    messages = run_ranks(2, train_with_nans, path, (3, 4, 5, 6))
    assert all("max_skipped_in_a_row = 3" in message for message in messages)


# --- records and the finished run -----------------------------------------------------------------


def test_console_lines_fit_100_columns(tmp_path):
    from pretrain.config import Observe
    from pretrain.observe.observers import Observers

    recipe = load("configs/bloom-176b.toml").build_recipe()
    observers = Observers(Observe(), recipe, tmp_path, False, lambda: True, 1e12, 1e17)
    observers._recent_tokens_per_second = 39_900.0
    row = {"step": 64_364, "tokens": 225_280_000_000, "loss": 12.34567, "lr": 5.969e-05,
           "batch_samples": 2048, "grad_norm": 123.456, "tokens_per_second": 39_861.2,
           "model_flops_utilisation": 0.4777}  # fmt: skip
    line = observers.line(row)
    assert len(line) <= 100
    assert all(
        part in line for part in ("64364/128728", "225B", "12.3457", "5.97e-05", "48%", "eta 65d")
    )


def test_records_hold_what_a_curve_needs(tmp_path):
    path = write_config(tmp_path, observe__peak_tflops=0.002)
    assert run_worker([str(path)])[0] == 0
    rows = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(24))
    assert [r["step"] for r in rows if "validation_loss" in r] == [0, 10, 20, 23]
    last = rows[-1]
    assert last["tokens"] == 159 * 8
    expected = last["tokens_per_second"] * flops_per_token_by_hand() / 2e9
    assert last["model_flops_utilisation"] == pytest.approx(expected)
    assert last["tokens_per_second"] == pytest.approx(9 * 8 / last["step_seconds"])


def flops_per_token_by_hand():
    """Two FLOPs a weight and multiply, three passes; attention's two products a layer."""
    hidden, layers, length = 24, 2, 8
    weights = layers * 12 * hidden**2 + VOCAB * hidden
    return 6 * weights + 3 * layers * 2 * 2 * hidden * length


def test_metrics_drop_steps_that_will_be_repeated(tmp_path):
    from pretrain.observe.metrics import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path, 2).write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_tensorboard_curves_are_unbroken_over_a_resume(tmp_path):
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pretrain.config import Observe
    from pretrain.engine.world import World
    from pretrain.engine.zero import StepStats
    from pretrain.guard import Verdict
    from pretrain.observe.observers import Observers
    from pretrain.sync.base import ReplicaSync

    recipe = load(write_config(tmp_path)).build_recipe()
    alone = ReplicaSync(World(0, 1, torch.device("cpu")))
    for first, last, loss in ((0, 5, 1.0), (3, 6, 2.0)):  # cut after 5, saved at 3
        observers = Observers(Observe(), recipe, tmp_path, True, lambda: True, 1.0, 1.0)
        clock = recipe.clock_at(step=first)
        observers.open(clock)
        while clock.step < last:
            plan = recipe.at(clock)
            clock = recipe.after(clock, plan)
            observers.record(clock, plan, StepStats(loss, 1.0), Verdict(True), 0.1, None, alone)
        observers.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("loss")]
    tokens = [recipe.clock_at(step=step).tokens for step in range(1, 7)]
    assert points == list(zip(tokens, [1.0] * 3 + [2.0] * 3, strict=True))


def test_from_text_to_export(tmp_path, capsys):
    """tokenizer, corpus, train, eval, plot, sample, export: each by its command."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = "the quick brown fox jumps over a lazy dog and runs away from it".split()  # noqa: SIM905
    chance = np.random.default_rng(0)
    with open(tmp_path / "text.jsonl", "w") as file:
        for _ in range(1500):  # short ones, so that many windows hold two
            file.write(json.dumps({"text": " ".join(chance.choice(words, 9))}) + "\n")
    text, folder, prefix = (str(tmp_path / n) for n in ("text.jsonl", "tokenizer", "shard"))
    run, export = str(tmp_path / "runs" / "tiny"), tmp_path / "export"
    (tmp_path / "tokenizer.toml").write_text(
        f"inputs = ['{text}']\noutput = '{folder}'\nvocab_size = 300\n"
    )
    assert anthesis(["tokenizer", "train", str(tmp_path / "tokenizer.toml")]) == 0
    assert anthesis(["corpus", "encode", text, f"--tokenizer={folder}", "--output", prefix]) == 0
    path = write_config(tmp_path, model__vocab_size=384, data__tokenizer=folder,
                        data__sources=[{"name": "text", "path": prefix}],
                        data__attention="document", data__end_of_text=2,
                        recipe__train="600 samples")  # fmt: skip
    code, output = run_worker([str(path), "engine.zero_stage=3"])
    assert code == 0, output
    capsys.readouterr()
    assert anthesis(["eval", run, "--samples=6"]) == 0
    loss = float(capsys.readouterr().out.split("loss ")[1].split(",")[0])
    recorded = read_metrics(Path(run) / "metrics.jsonl")[-1]["validation_loss"]
    assert loss == pytest.approx(recorded, abs=2e-4)
    assert anthesis(["plot", run]) == 0
    assert (Path(run) / "curves.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert anthesis(["sample", run, "the quick", "--tokens=5", "--temperature=0"]) == 0
    sampled = capsys.readouterr().out.removesuffix("\n")
    assert anthesis(["export", run, str(export)]) == 0
    model, tokenizer = (c.from_pretrained(export) for c in (AutoModelForCausalLM, AutoTokenizer))
    start = tokenizer("the quick", return_tensors="pt")
    ids = model.generate(**start, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == sampled
    assert len(sampled) > len("the quick")
    assert torch.isfinite(model(ids).logits).all()
    assert anthesis(["export", run, str(export)]) == 2  # never over an existing folder
    assert anthesis(["eval", str(tmp_path)]) == 2
