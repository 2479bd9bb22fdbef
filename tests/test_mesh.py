"""The mesh: ZeRO inside shard groups and replicas across equal plain ZeRO on all ranks."""

from dataclasses import replace

import pytest
import torch

from pretrain.config import Engine
from pretrain.config_optim import AdamW, Lamb, Muon
from pretrain.config_sync import AllReduce
from pretrain.recipe import Clock, StepPlan
from tests.ranks import run_ranks
from tests.test_sharding import BATCH, NOISE, new_model, rows_of

STEPS = 50

OPTIMIZERS = {"adamw": AdamW(), "lamb": Lamb(), "muon": Muon(precision="fp32")}


def build(world, stage, section, shard_ranks, sync=None, precision="fp32"):
    """An engine on a mesh, with `sync` (default: all-reduce) between its replicas."""
    from pretrain.engine.deepspeed_setup import sharded_construction
    from pretrain.engine.world import split_world
    from pretrain.engine.zero import ZeroEngine
    from pretrain.sync.gradients import GradientSync
    from pretrain.sync.mean import AllReduceMean

    world = split_world(world, shard_ranks)
    config = Engine(zero_stage=stage, precision=precision, micro_batch_samples=3)
    with sharded_construction(config, world):
        model = new_model()
    engine = ZeroEngine(model, section, config, world)
    if world.replicas.size > 1:
        mean = AllReduceMean(sync or AllReduce(), engine.shards, world.replicas)
        engine.sync = GradientSync(engine, mean, mean, 0, None)
    return engine


def train(engine, section, steps=STEPS):
    from pretrain.engine.world import rows_of_rank

    clock = engine.sync.begin(Clock())
    losses, norms = [], []
    first, end = rows_of_rank(BATCH, engine.sync.ranks)
    for step in range(steps):
        rate = section.facts.learning_rate / 4 * min(1.0, (step + 1) / 5)
        plan = StepPlan(BATCH, rate, section.weight_decay, section.momenta, section.clip_norm)
        stats = engine.forward_backward(rows_of(step)[first:end], BATCH, clock)
        losses.append(stats.loss)
        norms.append(stats.grad_norm)
        engine.step(plan, stats)
        clock = engine.sync.stepped(replace(clock, step=step + 1, samples=clock.samples + BATCH))
    return losses, norms


def weights(engine):
    """All masters of this replica, by name."""
    found = {}
    for part in engine.world.shard.gather(
        [(f.name, f.start, f.master.numpy().copy(), f.parameter_numel) for f in engine.fragments()]
    ):
        for name, start, values, numel in part:
            found.setdefault(name, torch.zeros(numel))[start : start + len(values)] = (
                torch.from_numpy(values)
            )
    return {name: value.numpy() for name, value in found.items()}


def run(world, stage, shard_ranks, names):
    answers = {}
    for name in names:
        engine = build(world, stage, OPTIMIZERS[name], shard_ranks)
        answers[name] = (*train(engine, OPTIMIZERS[name]), weights(engine))
        engine.close()
    return answers


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_by_two_is_plain_zero_on_four(stage):
    names = list(OPTIMIZERS)
    plain = run_ranks(4, run, stage, None, names)
    mesh = run_ranks(4, run, stage, 2, names)
    for name in names:
        losses, norms, expected = plain[0][name]
        for rank in range(4):
            assert mesh[rank][name][0] == pytest.approx(losses, rel=2e-6)
            assert mesh[rank][name][1] == pytest.approx(norms, rel=2e-5)
            difference = sum(
                ((mesh[rank][name][2][key] - value) ** 2).sum()
                for key, value in expected.items()
                if not key.endswith(NOISE)
            )
            norm = sum((v**2).sum() for k, v in expected.items() if not k.endswith(NOISE))
            assert (difference / norm) ** 0.5 < 1e-5, name
        for key in expected:  # replicas are the same bits
            assert (mesh[0][name][2][key] == mesh[2][name][2][key]).all()
