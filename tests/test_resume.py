"""Resume: bitwise in the same layout, to rounding in another; damage and loss are refused."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import newest_checkpoint, read_state
from pretrain.config_file import load
from pretrain.observe.metrics import read_metrics
from tests.ranks import run_ranks, run_worker, start_single
from tests.tiny import write_config

CURVE = ("step", "samples", "tokens", "loss", "lr", "batch_samples", "grad_norm")
EDGES = [4, 5, 6]  # before, on and after the first edge of the ramp in tests/tiny.py


class Interrupted(Exception):
    """The run is cut here, right after a checkpoint."""


def train_ranks(world, path, overrides, stop_after=None):
    """The worker on these ranks; cut after the checkpoint of step `stop_after`."""
    from pretrain import train
    from pretrain.checkpoint import Checkpoints

    class Cut(Checkpoints):
        def save(self, clock, engine, parts):
            saved = super().save(clock, engine, parts)
            if clock.step == stop_after:
                raise Interrupted
            return saved

    train.Checkpoints = Cut
    try:
        train.train_run(load(path, overrides), world)
    except Interrupted:
        assert stop_after is not None
    else:
        assert stop_after is None


def curve(path, overrides=()):
    rows = read_metrics(load(path, list(overrides)).run_directory / "metrics.jsonl")
    return [tuple(row[key] for key in CURVE) for row in rows if "loss" in row]


def run_interrupted(path, name, stops, layouts, overrides=()):
    """Train in pieces, cut after each of `stops`, each piece in its own (ranks, overrides)."""
    settings = [f"name={name}", "checkpoint.every=1 steps", *overrides]
    for stop, (ranks, layout) in zip([*stops, None], layouts, strict=True):
        run_ranks(ranks, train_ranks, path, [*settings, *layout], stop)
    return curve(path, settings)


@pytest.mark.parametrize(
    ("stage", "precision", "dropout"),
    [(1, "fp32", 0.1), (1, "bf16", 0.0), (2, "bf16", 0.0), (3, "fp32", 0.1), (3, "bf16", 0.0)],
)
def test_same_layout_is_bitwise(tmp_path, stage, precision, dropout):
    path = write_config(tmp_path)
    overrides = [f"engine.zero_stage={stage}", f'engine.precision="{precision}"',
                 f"model.dropout={dropout}"]  # fmt: skip
    whole = run_interrupted(path, "whole", [], [(2, [])], overrides)
    pieces = run_interrupted(path, "pieces", EDGES, [(2, [])] * 4, overrides)
    assert len(whole) == 23
    assert [row[5] for row in whole[:12]] == [3] * 5 + [5] * 3 + [7] * 3 + [9]
    assert pieces == whole


@pytest.mark.parametrize("name", ["schedulefree", "soap", "adafactor"])
def test_states_of_other_kinds_are_bitwise_too(tmp_path, name):
    """An average, whole matrices with their owners, rows and columns."""
    path = write_config(tmp_path, optimizer={"name": name}, validation={})
    whole = run_interrupted(path, "whole", [], [(2, [])])
    pieces = run_interrupted(path, "pieces", [6], [(2, [])] * 2)
    assert len(whole) == 23
    assert pieces == whole


def test_any_other_layout_goes_on_with_the_same_run(tmp_path):
    path = write_config(tmp_path)
    whole = run_interrupted(path, "whole", [], [(1, [])])
    layouts = [
        (4, ["engine.zero_stage=1"]),
        (2, ["engine.zero_stage=3", "engine.micro_batch_samples=1"]),
        (3, ["engine.zero_stage=2", "engine.micro_batch_samples=3"]),
        (1, ["engine.zero_stage=3"]),
    ]
    pieces = run_interrupted(path, "pieces", [4, 8, 14], layouts)
    exact = [row[:3] + row[4:6] for row in whole]  # step, samples, tokens; rate, batch
    assert [row[:3] + row[4:6] for row in pieces] == exact
    for ours, theirs in zip(pieces, whole, strict=True):
        assert ours[3] == pytest.approx(theirs[3], abs=1e-4)
        assert ours[6] == pytest.approx(theirs[6], rel=1e-3)


def test_a_resumed_state_is_the_saved_one_not_only_the_weights(tmp_path):
    """A mutant that forgets the optimizer's moments or step is far outside the tolerance above."""
    path = write_config(tmp_path)
    whole = run_interrupted(path, "whole", [], [(1, [])])
    run_ranks(1, train_ranks, path, ["name=forgetful", "checkpoint.every=1 steps"], 8)
    newest = newest_checkpoint(tmp_path / "runs" / "forgetful")
    state = read_state(newest)
    state["optimizer_scalars"] = {}  # as if no optimizer had been saved
    (newest / "state.json").write_text(json.dumps(state))
    run_ranks(1, train_ranks, path, ["name=forgetful", "checkpoint.every=1 steps"], None)
    forgetful = curve(path, ["name=forgetful"])
    assert max(abs(a[3] - b[3]) for a, b in zip(forgetful, whole, strict=True)) > 1e-3


def run_to_step_8(tmp_path, *overrides):
    """A run cut after step 8, its config and folder."""
    path = write_config(tmp_path)
    run_ranks(1, train_ranks, path, ["checkpoint.every=4 steps", *overrides], 8)
    return path, tmp_path / "runs" / "tiny"


def fails(path, *overrides):
    """What the worker says when it refuses; it must refuse with code 2 and no traceback."""
    code, output = run_worker([str(path), *overrides])
    assert code == 2, output
    assert "Traceback" not in output
    assert "cure:" in output
    return output


def newest_payload(run):
    return max(newest_checkpoint(run).glob("*.distcp"), key=lambda file: file.stat().st_size)


def test_damage_is_refused_and_named(tmp_path):
    path, run = run_to_step_8(tmp_path)
    payload = newest_payload(run)
    good = payload.read_bytes()
    payload.write_bytes(good[:-10])
    assert f"{len(good) - 10} bytes, {len(good)} were written" in fails(path)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    payload.write_bytes(flipped)
    assert "checksum differs" in fails(path)
    payload.unlink()
    assert payload.name in fails(path)
    payload.write_bytes(good)
    (newest_checkpoint(run) / "state.json").unlink()
    assert "state.json" in fails(path)
    newest_checkpoint(run).rename(tmp_path / "moved-away")  # the cure that the message names
    assert newest_checkpoint(run).name == "step-0000004"
    code, output = run_worker([str(path)])
    assert code == 0, output
    assert "goes on after step 4" in output


def test_lost_checkpoints_are_an_error_unless_fresh(tmp_path):
    path, run = run_to_step_8(tmp_path)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(checkpoint)
    assert "no checkpoint is left" in fails(path)
    code, output = run_worker([str(path), "start=fresh"])
    assert code == 0, output
    aside = run.with_name("tiny.before-1")
    assert len(read_metrics(aside / "metrics.jsonl")) > 1  # moved aside, not overwritten
    assert newest_checkpoint(run).name == "step-0000023"


def test_resume_demands_a_checkpoint(tmp_path):
    assert "start=resume" in fails(write_config(tmp_path), "start=resume")


def test_other_data_or_model_are_refused(tmp_path):
    path, run = run_to_step_8(tmp_path)
    before = (run / "config.toml").read_bytes()
    assert "data.stages: " in fails(path, "data.sources.0.weight=0.5")
    assert "seed" in fails(path, "seed=6")
    assert "model.heads: 3 then, 4 now" in fails(path, "model.heads=4")
    shard = Path(load(path).data.sources[0].path)
    content = bytearray(shard.with_suffix(".bin").read_bytes())
    content[0] ^= 1
    shard.with_suffix(".bin").write_bytes(content)
    fails(path)
    assert (run / "config.toml").read_bytes() == before  # a refused start changes nothing


def test_data_may_move(tmp_path):
    path, _ = run_to_step_8(tmp_path)
    for suffix in (".bin", ".idx"):
        shutil.move(tmp_path / f"shard0{suffix}", tmp_path / f"elsewhere{suffix}")
    code, output = run_worker([str(path), f"data.sources.0.path={tmp_path}/elsewhere"])
    assert code == 0, output
    assert "changed since the run was last started" in output


def test_a_finished_run_says_so(tmp_path):
    path = write_config(tmp_path)
    assert run_worker([str(path)])[0] == 0
    code, output = run_worker([str(path)])
    assert code == 0
    assert "already done: step 23" in output
    assert "start=fresh" in output


def test_retention(tmp_path):
    _, run = run_to_step_8(tmp_path, "checkpoint.every=1 steps", "checkpoint.keep_every=3 steps")
    kept = sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-0000003", "step-0000006", "step-0000007", "step-0000008"]
    assert not list((run / "checkpoints").glob(".partial*"))


def test_kill_9_at_twenty_moments(tmp_path):
    """Half of the kills fall into the writing of a checkpoint, half anywhere."""
    path = write_config(tmp_path, recipe__train="2500 samples", validation={}, checkpoint__keep=3)
    code, output = run_worker([str(path), "name=whole"])
    assert code == 0, output
    whole = curve(path, ["name=whole"])
    assert len(whole) == 283
    chance, run = random.Random(3), tmp_path / "runs" / "tiny"
    folder, newest_step, during_save = run / "checkpoints", 0, 0
    for kill in range(20):
        process = start_single(worker_quietly, [str(path), "name=tiny"])
        wait_for(lambda seen=newest_step: steps_on_disk(run) > seen, process)
        if kill % 2:
            wait_for(lambda: is_being_written(folder), process)
        else:
            time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        during_save += any(folder.glob(".partial-*"))
        state = read_state(newest_checkpoint(run))
        assert state["clock"]["step"] >= newest_step, "a committed checkpoint was lost"
        newest_step = state["clock"]["step"]
    assert during_save >= 5
    code, output = run_worker([str(path), "name=tiny"])
    assert code == 0, output
    assert f"goes on after step {newest_step}" in output
    assert curve(path, ["name=tiny"]) == whole


def worker_quietly(arguments):
    import contextlib
    import os

    from pretrain.train import main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(arguments)


def steps_on_disk(run):
    found = sorted((run / "checkpoints").glob("step-*"))
    return int(found[-1].name[5:]) if found else 0


def is_being_written(folder):
    try:
        return any(folder.glob(".partial-*/*.distcp"))
    except FileNotFoundError:  # it was committed while we looked
        return False


def wait_for(condition, process):
    deadline = time.time() + 120
    while not condition():
        assert process.is_alive(), "the run ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.001)
