"""Every optimizer under ZeRO 1, 2, 3 on 1, 2, 3 ranks equals the same one on whole parameters."""

import pytest
import torch

from pretrain.config import BloomModel, Engine
from pretrain.recipe import StepPlan
from tests.ranks import run_ranks
from tests.warm import EVERY_OPTIMIZER, label
from tests.whole import whole_optimizer_of

MODEL = BloomModel(vocab_size=37, hidden_size=18, layers=1, heads=3)
LENGTH, STEPS, BATCH = 8, 20, 12
# The gradient of the keys' bias is rounding only (softmax ignores what all keys share), which many
# optimizers blow up to the size of the rate; nothing depends on it.
NOISE = "query_key_value.bias"


def new_model():
    from pretrain.model.bloom import Bloom

    torch.manual_seed(1)
    return Bloom(MODEL)


def rows_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, MODEL.vocab_size, (BATCH, LENGTH + 1), generator=generator)


def rate_of(section, step):
    return section.facts.learning_rate / 4 * min(1.0, (step + 1) / 5)


def whole_weights(section):
    """The weights after all steps in one process, on the whole batch at once."""
    model = new_model()
    optimizer = whole_optimizer_of(model, section)
    for step in range(STEPS):
        rows = rows_of(step)
        (model(rows[:, :-1], rows[:, 1:]) / (BATCH * LENGTH)).backward()
        if section.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
        optimizer.step(rate_of(section, step))
        model.zero_grad()
    # As arrays, for tensors would travel to the ranks as open files.
    return {name: p.detach().flatten().numpy() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def references():
    torch.set_num_threads(1)
    return [whole_weights(section) for section in EVERY_OPTIMIZER]


def build(world, stage, section, micro=12, **engine):
    from pretrain.engine.deepspeed_setup import sharded_construction
    from pretrain.engine.zero import ZeroEngine
    from pretrain.model.bloom import Bloom

    config = Engine(zero_stage=stage, precision="fp32", micro_batch_samples=micro, **engine)
    torch.manual_seed(1)
    with sharded_construction(config, world):
        model = Bloom(MODEL)
    return ZeroEngine(model, section, config, world)


def train(engine, section):
    from pretrain.engine.world import rows_of_rank

    first, end = rows_of_rank(BATCH, engine.world)
    for step in range(STEPS):
        plan = StepPlan(BATCH, rate_of(section, step), section.weight_decay, section.momenta,
                        section.clip_norm)  # fmt: skip
        stats = engine.forward_backward(rows_of(step)[first:end], BATCH)
        engine.step(plan, stats)
        assert engine.applied() == plan.settings


def distance(engine, reference):
    """Relative L2 distance of all weights from `reference`."""
    square = norm = 0.0
    for fragment in engine.fragments():
        if not fragment.name.endswith(NOISE):
            whole = torch.from_numpy(reference[fragment.name])
            part = whole.narrow(0, fragment.start, len(fragment.master))
            square += (fragment.master - part).double().square().sum().item()
            norm += part.double().square().sum().item()
    square, norm = engine.world.sum(torch.tensor([square, norm], dtype=torch.float64)).tolist()
    return (square / norm) ** 0.5


def distances(world, stage, references):
    """Distances for each optimizer, with one micro-batch a step and with four, and whether
    parameters straddle shards."""
    engine = build(world, stage, EVERY_OPTIMIZER[0])
    found = {}
    initial = [fragment.master.clone() for fragment in engine.fragments()]
    for micro_batches in (1, 4):
        seen = set()
        samples = BATCH // world.size // micro_batches
        engine.config = engine.config.model_copy(update={"micro_batch_samples": samples})
        for section, reference in zip(EVERY_OPTIMIZER, references, strict=True):
            if micro_batches > 1 and section.name in seen:
                continue  # variants of an optimizer differ in nothing that accumulation touches
            seen.add(section.name)
            for fragment, master in zip(engine.fragments(), initial, strict=True):
                fragment.master.copy_(master)
            engine.loaded({})
            engine.use_optimizer(section)
            train(engine, section)
            found[f"{label(section)}, {micro_batches}"] = distance(engine, reference)
    cut = any(len(f.master) < f.parameter_numel for f in engine.fragments())
    return found, cut


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_optimizer_is_exact_under_zero(stage, ranks, references):
    found, cut = run_ranks(ranks, distances, stage, references)[0]
    assert cut == (ranks > 1)
    assert {name: error for name, error in found.items() if not error < 1e-5} == {}


def distance_with_norms_of_shards(world, stage, section, reference):
    """A mutant whose norms are those of the shards, not of whole parameters."""
    engine = build(world, stage, section, micro=2)
    ranks = engine.optimizer.shards.ranks

    class Alone:
        rank, size, device = ranks.rank, ranks.size, ranks.device

        def sum(self, tensor):
            return tensor

    engine.optimizer.shards.ranks = Alone()
    train(engine, section)
    return distance(engine, reference)


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("stage", [1, 3])
def test_norms_of_shards_would_be_seen(stage, name, references):
    section, reference = next(
        (section, reference)
        for section, reference in zip(EVERY_OPTIMIZER, references, strict=True)
        if section.name == name
    )
    errors = run_ranks(3, distance_with_norms_of_shards, stage, section, reference)
    assert min(errors) > 1e-4
