"""The engine on real ranks: ZeRO 1, 2, 3 against one process, fragments, accumulation, discard."""

from itertools import pairwise

import pytest
import torch

from pretrain.config import BloomModel, Engine
from pretrain.config_optim import AdamW
from pretrain.recipe import StepPlan
from tests.ranks import run_ranks

MODEL = BloomModel(vocab_size=97, hidden_size=24, layers=2, heads=3)
LENGTH = 12
STAGES = (1, 2, 3)


def build(stage, world, precision="fp32", micro=2, recompute=False):
    """An engine and the model it began from (a copy, unsharded)."""
    from pretrain.engine.deepspeed_setup import sharded_construction
    from pretrain.engine.zero import ZeroEngine
    from pretrain.model.bloom import Bloom

    config = Engine(zero_stage=stage, precision=precision, micro_batch_samples=micro)
    torch.manual_seed(1)
    reference = Bloom(MODEL)
    torch.manual_seed(1)
    with sharded_construction(config, world):
        model = Bloom(MODEL, activation_checkpointing=recompute)
    engine = ZeroEngine(model, AdamW(), config, world)
    return engine, reference


def rows_for(step, batch):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, MODEL.vocab_size, (batch, LENGTH + 1), generator=generator)


def engine_step(engine, step, batch, rate=1e-2):
    from pretrain.engine.world import rows_of_rank

    first, end = rows_of_rank(batch, engine.world)
    plan = StepPlan(batch, rate * (1 + step % 3), 0.1, (0.9, 0.95), 1.0)
    stats = engine.forward_backward(rows_for(step, batch)[first:end], batch)
    engine.step(plan, stats)
    assert engine.applied() == plan.settings
    return stats


def reference_step(model, optimizer, step, batch, rate=1e-2, clip=1.0):
    """The same step in plain PyTorch, on the whole batch at once."""
    rows = rows_for(step, batch)
    loss = model(rows[:, :-1], rows[:, 1:]) / (batch * LENGTH)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        decay = 0.1 if group["role"] in AdamW().decayed_roles else 0.0
        group.update(lr=rate * (1 + step % 3), weight_decay=decay, betas=(0.9, 0.95))
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


def plain_optimizer(model):
    from pretrain.optim.groups import parameter_groups

    return torch.optim.AdamW(parameter_groups(model), lr=0.0, eps=1e-8, foreach=False)


BATCHES = [1, 5, 8, 3, 16, 2, 7, 12, 4, 9, 1, 11, 6, 13, 2, 10, 3, 14, 5, 8]  # another each step


def compare_with_one_process(world, stage):
    """Largest differences over 20 steps in loss and gradient norm, and in the weights after."""
    engine, model = build(stage, world)
    optimizer = plain_optimizer(model)
    loss_error = norm_error = 0.0
    for step, batch in enumerate(BATCHES):
        stats = engine_step(engine, step, batch)
        loss, norm = reference_step(model, optimizer, step, batch)
        loss_error = max(loss_error, abs(stats.loss - loss))
        norm_error = max(norm_error, abs(stats.grad_norm - norm) / norm)
    reference = dict(model.named_parameters())
    weight_error = max(
        (f.master - reference[f.name].detach().flatten()[f.start : f.start + len(f.master)])
        .abs()
        .max()
        .item()
        for f in engine.fragments()
        # The gradient of the keys' bias is zero but for rounding (softmax ignores what all keys
        # share), which Adam blows up to the size of the rate.
        if f.role != "bias"
    )
    return loss_error, norm_error, weight_error


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_any_ranks_and_stage_equal_one_process(world_size, stage):
    for loss_error, norm_error, weight_error in run_ranks(
        world_size, compare_with_one_process, stage
    ):
        assert loss_error < 1e-4
        assert norm_error < 1e-4
        assert weight_error < 1e-4


def fragments_of_rank(world, stage, precision):
    engine, reference = build(stage, world, precision)
    shapes = {name: p.shape for name, p in reference.named_parameters()}
    for fragment in engine.fragments():
        assert fragment.shape == shapes[fragment.name]
        assert fragment.gradient is None
        assert not fragment.state
    engine_step(engine, 0, 3)
    for fragment in engine.fragments():
        assert set(fragment.state) == {"exp_avg", "exp_avg_sq"}
        assert all(value.shape == fragment.master.shape for value in fragment.state.values())
        assert fragment.master.dtype == torch.float32
    return [(f.name, f.start, f.start + len(f.master)) for f in engine.fragments()], shapes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_fragments_tile_every_parameter_once(stage, precision):
    results = run_ranks(3, fragments_of_rank, stage, precision)
    shapes = results[0][1]
    pieces = sorted(piece for fragments, _ in results for piece in fragments)
    assert any(len(fragments) != len(results[0][0]) for fragments, _ in results) or stage == 3
    for name, shape in shapes.items():
        covered = 0
        for _, start, end in [piece for piece in pieces if piece[0] == name]:
            assert start == covered
            covered = end
        assert covered == shape.numel()


def views_are_live(world, stage, precision):
    """Write through every kind of view; return what the model and optimizer made of it."""
    from pretrain.engine.world import rows_of_rank

    engine, _ = build(stage, world, precision)
    plan = StepPlan(3, 0.5, 0.0, (0.9, 0.95), 1.0)
    first, end = rows_of_rank(3, world)

    # Master: zeros everywhere make every logit equal, so the loss is log(vocabulary).
    for fragment in engine.fragments():
        fragment.master.zero_()
    engine.loaded({})
    stats = engine.forward_backward(rows_for(0, 3)[first:end], 3)
    engine.discard()

    # Gradient: with it set to 1, Adam's first step moves every weight by exactly the rate.
    engine.forward_backward(rows_for(1, 3)[first:end], 3)
    for fragment in engine.fragments():
        fragment.gradient.fill_(1.0)
    engine.step(plan, type(stats)(loss=1.0, grad_norm=0.5))
    moved = torch.cat([fragment.master for fragment in engine.fragments()])

    # State: with the first moment set to 0 and a zero gradient, the next step moves nothing.
    engine.forward_backward(rows_for(2, 3)[first:end], 3)
    for fragment in engine.fragments():
        fragment.state["exp_avg"].zero_()
        fragment.gradient.zero_()
    engine.step(plan, type(stats)(loss=1.0, grad_norm=0.5))
    after = torch.cat([fragment.master for fragment in engine.fragments()])
    return stats.loss, moved.min().item(), moved.max().item(), torch.equal(moved, after)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_fragment_views_are_live(stage, precision):
    for loss, low, high, unmoved in run_ranks(2, views_are_live, stage, precision):
        assert loss == pytest.approx(torch.tensor(97.0).log().item(), abs=1e-3)
        assert (low, high) == pytest.approx((-0.5, -0.5), abs=1e-6)
        assert unmoved


def discard_then_step(world, stage, precision):
    """Losses of steps with a discarded one in between, and of the same steps without it."""
    losses = []
    for with_discard in (False, True):
        engine, _ = build(stage, world, precision)
        run = []
        for step, batch in enumerate([4, 3, 5]):
            if with_discard and step > 0:
                from pretrain.engine.world import rows_of_rank

                first, end = rows_of_rank(6, world)
                engine.forward_backward(rows_for(99, 6)[first:end], 6)
                engine.discard()
            run.append(engine_step(engine, step, batch))
        losses.append(run)
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_discarded_step_leaves_no_trace(stage, precision):
    for without, with_discard in run_ranks(2, discard_then_step, stage, precision):
        assert without == with_discard


def accumulate(world, stage, precision):
    """Relative error of the gradient of 16 micro-batches of one row against fp32 sums of the
    single-row gradients of the same low-precision model."""
    from pretrain.engine.world import rows_of_rank
    from pretrain.model.bloom import Bloom

    engine, _ = build(stage, world, precision, micro=1)
    torch.manual_seed(1)
    model = Bloom(MODEL).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    rows = rows_for(0, 16)
    sums = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for row in rows.split(1):
        (model(row[:, :-1], row[:, 1:]) * (world.size / (16 * LENGTH))).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.float() / world.size
            parameter.grad = None
    first, end = rows_of_rank(16, world)
    engine.forward_backward(rows[first:end], 16)
    error = norm = 0.0
    for f in engine.fragments():
        expected = sums[f.name].flatten()[f.start : f.start + len(f.master)]
        error += (f.gradient - expected).square().sum().item()
        norm += expected.square().sum().item()
    return (error / norm) ** 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_and_reduction_are_fp32(stage, precision):
    # bf16 sums over 16 micro-batches or over ranks would be off by 1e-3 and more
    assert max(run_ranks(2, accumulate, stage, precision)) < 2e-6


def recompute_activations(world, stage, precision):
    runs = []
    for recompute in (False, True):
        engine, _ = build(stage, world, precision, recompute=recompute)
        runs.append([engine_step(engine, step, batch) for step, batch in enumerate([4, 1, 5])])
    return runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_changes_nothing(stage, precision):
    for plain, recomputed in run_ranks(2, recompute_activations, stage, precision):
        assert [s.loss for s in recomputed] == pytest.approx([s.loss for s in plain], rel=1e-6)
        assert [s.grad_norm for s in recomputed] == pytest.approx(
            [s.grad_norm for s in plain], rel=1e-5
        )


def idle_ranks(world, stage):
    engine, model = build(stage, world)
    optimizer = plain_optimizer(model)
    errors = []
    for step, batch in enumerate([1, 3, 2, 1]):
        stats = engine_step(engine, step, batch)
        errors.append(abs(stats.loss - reference_step(model, optimizer, step, batch)[0]))
    return max(errors)


@pytest.mark.parametrize("stage", STAGES)
def test_batches_smaller_than_the_world(stage):
    assert max(run_ranks(6, idle_ranks, stage)) < 1e-5


def test_rows_are_dealt_whole_and_evenly():
    from pretrain.engine.world import World, rows_of_rank

    for size, batch in ((24, 16), (6, 208), (384, 16), (384, 2048), (5, 5), (1, 7)):
        shares = [rows_of_rank(batch, World(r, size, torch.device("cpu"))) for r in range(size)]
        assert [shares[0][0], shares[-1][1]] == [0, batch]
        assert all(a[1] == b[0] for a, b in pairwise(shares))
        lengths = [end - first for first, end in shares]
        assert max(lengths) - min(lengths) <= 1


def test_every_parameter_has_a_role():
    from pretrain.model.bloom import Bloom
    from pretrain.optim.groups import parameter_groups, parameter_roles

    model = Bloom(MODEL)
    roles = parameter_roles(model)
    assert roles["transformer.word_embeddings.weight"] == "embedding"
    assert roles["transformer.h.0.mlp.dense_h_to_4h.weight"] == "matrix"
    assert roles["transformer.word_embeddings_layernorm.weight"] == "norm"
    assert roles["transformer.ln_f.bias"] == "bias"
    grouped = [id(p) for group in parameter_groups(model) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
