"""Every optimizer saved by 3 ranks in ZeRO 1 goes on with 2 ranks in ZeRO 3 as if uninterrupted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import read_masters
from pretrain.config import Checkpoint
from pretrain.recipe import Clock, StepPlan
from tests.ranks import run_ranks
from tests.test_sharding import BATCH, LENGTH, build, new_model, rate_of, rows_of
from tests.warm import EVERY_OPTIMIZER, label
from tests.whole import whole_optimizer_of

HALF, STEPS = 4, 9


def checkpoints(world, folder, number):
    from pretrain.checkpoint import Checkpoints

    return Checkpoints(folder / str(number), Checkpoint(), world, lambda clock: {}, {})


def losses(engine, section, steps):
    from pretrain.engine.world import rows_of_rank

    first, end = rows_of_rank(BATCH, engine.world)
    found = []
    for step in steps:
        plan = StepPlan(BATCH, rate_of(section, step), section.weight_decay, section.momenta,
                        section.clip_norm)  # fmt: skip
        stats = engine.forward_backward(rows_of(step)[first:end], BATCH)
        engine.step(plan, stats)
        found.append(stats.loss)
    return found


def first_half(world, folder):
    from pretrain.engine.world import rows_of_rank

    engine = build(world, 1, EVERY_OPTIMIZER[0], micro=4)
    initial = [fragment.master.clone() for fragment in engine.fragments()]
    first, end = rows_of_rank(BATCH, world)
    found = []
    for number, section in enumerate(EVERY_OPTIMIZER):
        for fragment, master in zip(engine.fragments(), initial, strict=True):
            fragment.master.copy_(master)
        engine.loaded({})
        engine.use_optimizer(section)
        losses(engine, section, range(HALF))
        before = [fragment.master.clone() for fragment in engine.fragments()]
        checkpoints(world, folder, number).save(Clock(HALF, 1, 1), engine, {})
        evaluated = engine.evaluate(rows_of(99)[first:end], BATCH)
        after = [fragment.master for fragment in engine.fragments()]
        unmoved = all(map(torch.equal, before, after))
        found.append((unmoved, evaluated))
    return found


def second_half(world, folder):
    found = []
    engine = build(world, 3, EVERY_OPTIMIZER[0], micro=6)
    for number, section in enumerate(EVERY_OPTIMIZER):
        engine.use_optimizer(section)
        for fragment in engine.fragments():
            fragment.master.fill_(1.0)  # nothing may be left of what was there
        saved = checkpoints(world, folder, number)
        saved.load(saved.newest(), engine, {})
        found.append(losses(engine, section, range(HALF, STEPS)))
    return found


def uninterrupted(section):
    """Losses after the break, the loss on other rows at it, and the weights that are evaluated."""
    model = new_model()
    whole = whole_optimizer_of(model, section)
    found = []
    for step in range(STEPS):
        if step == HALF:
            if hasattr(whole.optimizer, "eval"):
                whole.optimizer.eval()
            rows = rows_of(99)
            evaluated = model(rows[:, :-1], rows[:, 1:]).item() / (BATCH * LENGTH)
            weights = {n: p.detach().flatten().clone() for n, p in model.named_parameters()}
            if hasattr(whole.optimizer, "train"):
                whole.optimizer.train()
        rows = rows_of(step)
        loss = model(rows[:, :-1], rows[:, 1:]) / (BATCH * LENGTH)
        loss.backward()
        if section.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
        whole.step(rate_of(section, step))
        model.zero_grad()
        found.append(loss.item())
    return found[HALF:], evaluated, weights


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    return folder, run_ranks(3, first_half, folder)[0], run_ranks(2, second_half, folder)[0]


@pytest.mark.parametrize("number", range(len(EVERY_OPTIMIZER)), ids=map(label, EVERY_OPTIMIZER))
def test_other_ranks_and_stage_go_on_with_the_same_run(number, halves):
    folder, first, second = halves
    torch.set_num_threads(1)
    expected, evaluated, weights = uninterrupted(EVERY_OPTIMIZER[number])
    assert second[number] == pytest.approx(expected, abs=2e-6)
    unmoved, evaluated_by_ranks = first[number]
    assert unmoved, "saving and evaluating must not move the weights that are trained"
    assert evaluated_by_ranks == pytest.approx(evaluated, abs=2e-6)
    saved = read_masters(Path(folder) / str(number) / f"step-{HALF:07d}")
    for name, whole in weights.items():
        if not name.endswith("query_key_value.bias"):
            np.testing.assert_allclose(saved[name], whole, atol=1e-6)


def test_the_average_differs_from_what_is_trained(halves):
    """So the test above can tell whether x or y was saved."""
    folder, _, _ = halves
    number = [section.name for section in EVERY_OPTIMIZER].index("schedulefree")
    import torch.distributed.checkpoint as dcp

    path = Path(folder) / str(number) / f"step-{HALF:07d}"
    name = "transformer.word_embeddings.weight"
    tensors = {f"{kind}/{name}": torch.empty(37 * 18) for kind in ("master", "optimizer.trained")}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    averaged, trained = tensors.values()
    assert (averaged - trained).abs().max() > 1e-4
