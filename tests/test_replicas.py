"""Runs with replicas: every method trains, resumes bit by bit, goes on in other layouts; drift."""

from itertools import chain

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from pretrain.checkpoint import newest_checkpoint, read_masters
from pretrain.config_file import load
from pretrain.observe.metrics import read_metrics
from pretrain.sync.drift import DriftError
from tests.ranks import run_ranks
from tests.test_resume import Interrupted, curve, run_interrupted, train_ranks
from tests.tiny import write_config

METHODS = {
    "allreduce": {},
    "allreduce bf16": {"precision": "bf16"},
    "powersgd": {"rank": 2, "start": "40 samples", "min_compression": 1.0},
    "quantized": {"bits": 4, "start": "40 samples"},
    "diloco": {"every_steps": 5, "precision": "int8"},
    "diloco streamed": {"every_steps": 6, "parts": 2, "delay_steps": 2, "mix": 0.5},
    "localsgd": {"every_steps": 3},
}
# ZeRO 2 in bf16 hands gradients over in the order in which they were ready.
ENGINES = {"quantized": (2, "bf16"), "powersgd": (3, "fp32"), "diloco streamed": (2, "bf16")}
OPTIMIZERS = {"diloco": "schedulefree", "localsgd": "muon", "powersgd": "lamb"}  # else AdamW


def config_of(folder, name, **changes):
    section = {"method": name.split()[0], **METHODS[name]}
    stage, precision = ENGINES.get(name, (1, "fp32"))
    engine = {"zero_stage": stage, "precision": precision, "micro_batch_samples": 2}
    return write_config(folder, **{"sync": section, "validation": {}, "engine": engine, **changes})


def optimizer_of(name):
    kind = OPTIMIZERS.get(name, "adamw")
    return {"name": kind, "precision": "fp32"} if kind == "muon" else {"name": kind}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_bitwise_the_whole_one(tmp_path, name):
    mesh = {"shard_ranks": 1, "check_every": "1 steps"}
    path = config_of(tmp_path, name, mesh=mesh, optimizer=optimizer_of(name))
    whole = run_interrupted(path, "whole", [], [(2, [])])
    pieces = run_interrupted(path, "pieces", [7, 13], [(2, [])] * 3)
    assert len(whole) == 23
    assert pieces == whole
    assert whole[-1][3] < whole[0][3] - 0.3
    found = read_metrics(load(path, ["name=whole"]).run_directory / "metrics.jsonl")
    rows = [row for row in found if "loss" in row]
    assert {row["replicas"] for row in rows} == {2}
    assert all(row["sync_seconds"] > 0 for row in rows)
    sent = [row["sync_bytes"] for row in rows]
    every = METHODS[name].get("every_steps", 1) // METHODS[name].get("parts", 1)
    delay = METHODS[name].get("delay_steps", 0)
    assert [bool(n) for n in sent] == [
        step == 23 or (step > delay and (step - delay) % every == 0) for step in range(1, 24)
    ]
    one, other = (
        read_masters(newest_checkpoint(tmp_path / "runs" / n)) for n in ("whole", "pieces")
    )
    assert all((one[key] == other[key]).all() for key in one)


def read_entries(path, kind):
    """Whole tensors of a kind in a checkpoint, by parameter name."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {key: torch.empty(e.size) for key, e in entries.items() if key.startswith(f"{kind}/")}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return {key.removeprefix(f"{kind}/"): value for key, value in found.items()}


def loaded_state(world, path, overrides, kinds):
    """Clock and state of a run right after its checkpoint is read: whole flats by kind and name, of
    each replica. Kinds are attributes of the sync or "trained"."""
    from pretrain import train
    from pretrain.checkpoint import Checkpoints

    found = {}

    class Look(Checkpoints):
        def load(self, path, engine, parts):
            clock = super().load(path, engine, parts)
            sync, mesh = engine.sync, engine.world
            flats = {**sync.shared_state(), **sync.own_state(), "outer": sync.outer_weights}
            flats["trained"] = engine.masters
            for kind in kinds:
                mine = [
                    (p.name, p.start, p.shape.numel(),
                     flats[kind][p.buffer].detach()[p.offset : p.offset + p.length].numpy().copy())
                    for p in engine.shards.places
                ]  # fmt: skip
                whole = {}
                for name, start, numel, values in chain(*mesh.shard.gather(mine)):
                    whole.setdefault(name, np.zeros(numel, np.float32))
                    whole[name][start : start + len(values)] = values
                found[kind] = whole
            found["clock"] = clock
            raise Interrupted

    train.Checkpoints = Look
    with pytest.raises(Interrupted):
        train.train_run(load(path, overrides), world)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (4, 1), (2, 1), (4, 2)])
def test_diloco_goes_on_in_any_layout(tmp_path, ranks, shards):
    path = config_of(tmp_path, "diloco", engine={"zero_stage": 2, "precision": "fp32"})
    overrides = ["checkpoint.every=1 steps"]
    run_ranks(4, train_ranks, path, [*overrides, "mesh.shard_ranks=2"], 12)
    saved = newest_checkpoint(tmp_path / "runs" / "tiny")
    kinds = ["outer", "outer.momentum", "trained"]
    layout = [*overrides, f"mesh.shard_ranks={shards}", "engine.zero_stage=3"]
    found = run_ranks(ranks, loaded_state, path, layout, kinds)
    for rank, state in enumerate(found):
        replica = rank // shards % 2  # a third and fourth replica begin as the first two were
        prefix = "replica-1/" if replica else ""
        assert state["clock"].step == 12
        assert state["clock"].samples == sum([3] * 5 + [5] * 3 + [7] * 3 + [9])
        assert same(
            state["outer"], {k: v.numpy() for k, v in read_entries(saved, "master").items()}
        )
        for kind, key in (("outer.momentum", "outer.momentum"), ("trained", "optimizer.trained")):
            own = prefix if kind == "trained" else ""
            entries = read_entries(saved, own + key)
            assert same(state[kind], {k: v.numpy() for k, v in entries.items()})
        assert not same(state["trained"], state["outer"])
    run_ranks(ranks, train_ranks, path, layout, None)
    assert [row[0] for row in curve(path, layout)] == list(range(1, 24))


def test_errors_that_were_not_sent_are_shared_by_other_replicas(tmp_path):
    """What compression has not sent yet counts as its mean: all that is in three replicas of one
    rank goes on in two of two ranks."""
    path = config_of(tmp_path, "quantized")
    overrides = ["checkpoint.every=1 steps"]
    run_ranks(3, train_ranks, path, [*overrides, "mesh.shard_ranks=1"], 15)
    saved = newest_checkpoint(tmp_path / "runs" / "tiny")
    errors = [read_entries(saved, f"{own}sync.error") for own in ("", "replica-1/", "replica-2/")]
    layout = [*overrides, "mesh.shard_ranks=2", "engine.zero_stage=3"]
    found = run_ranks(4, loaded_state, path, layout, ["sync.error"])
    for state in found:
        for name, values in state["sync.error"].items():
            mean = sum(e[name] for e in errors) / 3
            assert mean.abs().max() > 0
            assert np.allclose(values, mean.numpy(), rtol=1e-6, atol=1e-12)


def drifting(world, path, overrides):
    """A run in which one weight of one rank flips a bit after step 4."""
    from pretrain.engine.zero import ZeroEngine

    step = ZeroEngine.step

    def broken(self, plan, stats, measure=False):
        found = step(self, plan, stats, measure)
        broken.steps += 1
        if broken.steps == 4 and world.rank == 1:
            place = next(
                p for p in self.shards.places if p.name.endswith("0.input_layernorm.weight")
            )
            flat = self.masters[place.buffer].detach().view(torch.int32)
            flat[place.offset + 2] ^= 1 << 10
        return found

    broken.steps = 0
    ZeroEngine.step = broken
    with pytest.raises(DriftError) as error:
        train_ranks(world, path, overrides)
    return str(error.value)


@pytest.mark.parametrize(("overrides", "step"), [
    (["mesh.check_every=3 steps", "checkpoint.every=100 steps"], 6),
    (["mesh.check_every=100 steps", "checkpoint.every=5 steps"], 5),
])  # fmt: skip
def test_drift_names_the_parameter(tmp_path, overrides, step):
    path = config_of(tmp_path, "allreduce")
    errors = run_ranks(2, drifting, path, ["mesh.shard_ranks=1", *overrides])
    assert errors[0] == errors[1]
    assert f"step {step}: the 2 replicas differ in" in errors[0]
    assert "0.input_layernorm.weight" in errors[0].splitlines()[0]
