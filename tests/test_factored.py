"""Adafactor and SOAP: parity with other libraries, and exactness however parameters are cut."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pytorch_optimizer import SOAP

from pretrain.checkpoint_slices import to_load, to_save
from pretrain.config import Engine
from pretrain.config_optim import Adafactor, Soap
from pretrain.engine.deepspeed_setup import sharded_construction
from pretrain.engine.world import rows_of_rank
from pretrain.engine.zero import ZeroEngine
from pretrain.model.bloom import Bloom
from pretrain.optim import adafactor
from pretrain.optim.registry import build_optimizer
from pretrain.optim.shards import Place, Shards
from pretrain.recipe import StepPlan
from pretrain.sizes import shape_of
from tests.ranks import run_ranks
from tests.test_engine import LENGTH, MODEL, rows_for
from tests.whole import WholeOptimizer, whole_optimizer_of

SHAPES = {"a": (7, 11), "tall": (24, 8), "vector": (13,), "stack": (3, 4, 6), "zero": (5,)}
BATCH, STEPS = 8, 20
NOISE = "query_key_value.bias"  # its gradient is rounding only, see test_sharding


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)
        for name, shape in shapes.items()
    }
    if "zero" in made:
        made["zero"].zero_()
    return made


def set_gradients(tensors, step, size=1.0):
    generator = torch.Generator().manual_seed(step + 1)
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.grad = noise.mul(size).to(tensor.dtype)


def error(ours, theirs):
    """The largest relative L2 distance of a tensor."""
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


# --- Adafactor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("rate", "decay", "size", "options"),
    # A rate that bounds the relative step and one that 1 / sqrt t bounds; gradients whose squares
    # are far below the first epsilon.
    [
        (1e-2, 0.0, 1.0, {}),
        (0.9, 0.1, 1.0, {}),
        (0.5, 0.1, 1e-4, {}),
        (1e-2, 0.1, 1e-9, {}),
        (0.1, 0.1, 1.0, {"beta2_decay": -0.5, "epsilons": (1e-3, 0.4), "clip_threshold": 1.5}),
    ],
)
def test_adafactor_is_torchs(dtype, bound, rate, decay, size, options):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    section = Adafactor(decayed_roles=("matrix", "norm"), weight_decay=decay, **options)
    optimizer = WholeOptimizer(section, ours)
    reference = torch.optim.Adafactor(
        list(theirs.values()), lr=rate, weight_decay=decay, eps=section.epsilons,
        beta2_decay=section.beta2_decay, d=section.clip_threshold,
    )  # fmt: skip
    for step in range(12):
        for tensors in (ours, theirs):
            set_gradients(tensors, step, size * 0.1 ** (step % 3))
        optimizer.step(rate)
        reference.step()
    assert error(ours, theirs) < bound


class Threads:
    """A rank that is a thread: what it adds up is shared with the others."""

    device = torch.device("cpu")

    def __init__(self, rank, size, shared):
        self.rank, self.size, self._shared = rank, size, shared

    def gather(self, value):
        self._shared.values[self.rank] = value
        self._shared.barrier.wait()
        values = list(self._shared.values)
        self._shared.barrier.wait()
        return values

    def sum(self, tensor):
        return tensor.copy_(sum(value.clone() for value in self.gather(tensor.clone())))


def cut_anywhere(tensors, size, seed):
    """For each rank the places of its stretches, with padding between them."""
    generator = torch.Generator().manual_seed(seed)
    places, ends = [[] for _ in range(size)], [0] * size
    for name, tensor in tensors.items():
        cuts = torch.randint(0, tensor.numel() + 1, (size - 1,), generator=generator).tolist()
        cuts = [0, *sorted(cuts), tensor.numel()]
        for rank, (start, end) in enumerate(itertools.pairwise(cuts)):
            if end > start:
                place = Place(name, tensor.shape, "any", start, end - start, 0, ends[rank] + 2)
                places[rank].append(place)
                ends[rank] += end - start + 3
    return places, [end + 1 for end in ends]


def put_down(places, tensors, flat):
    """Write into `flat` the stretches of whole tensors that lie there."""
    for place in places:
        stretch = tensors[place.name].flatten().narrow(0, place.start, place.length)
        flat.narrow(0, place.offset, place.length).copy_(stretch)


def step_as_thread(ranks, whole, places, length):
    master, whole = torch.zeros(length), {name: tensor.clone() for name, tensor in whole.items()}
    put_down(places, whole, master)
    optimizer = build_optimizer(
        Shards([master], ["any"], places, list(whole), ranks, {}), Adafactor()
    )
    for step in range(6):
        set_gradients(whole, step)
        master.grad = torch.zeros_like(master)
        put_down(places, {name: tensor.grad for name, tensor in whole.items()}, master.grad)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
    return master


@pytest.mark.parametrize("seed", range(6))
def test_adafactor_is_exact_however_it_is_cut(seed, monkeypatch):
    """Also where a row is cut twice, a stack between its matrices, and blocks are small."""
    monkeypatch.setattr(adafactor, "_HOST_BLOCK_ELEMENTS", 20)
    torch.set_num_threads(1)
    size, whole = 4, parameters()
    places, lengths = cut_anywhere(whole, size, seed)
    shared = SimpleNamespace(values=[None] * size, barrier=threading.Barrier(size, timeout=30))
    masters = [None] * size

    def work(rank):
        ranks = Threads(rank, size, shared)
        masters[rank] = step_as_thread(ranks, whole, places[rank], lengths[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = parameters()
    optimizer = WholeOptimizer(Adafactor(), expected)
    for step in range(6):
        set_gradients(expected, step)
        optimizer.step(0.1)
    for rank, master in enumerate(masters):
        there = torch.zeros_like(master)  # padding too
        put_down(places[rank], expected, there)
        assert (master - there).norm() < 1e-6 * there.norm()


# --- SOAP -----------------------------------------------------------------------------------------

# Square, or with the long side left alone, so that the first gradient has the rank of each basis.
# Else eigenvectors of its null space are anybody's choice, and so is the path of the weights: a
# gradient changed by 1e-7 moves it by 5%.
ANY_RANK, FULL_RANK = {"a": (7, 11), "tall": (24, 8), "square": (9, 9)}, {"a": (9, 9), "b": (24, 8)}


@pytest.mark.parametrize("every", [10, 3, 1])
@pytest.mark.parametrize(
    ("shapes", "side", "bound"),
    # The first meets the other library only because both find the null space by the same routine.
    [(ANY_RANK, 10_000, 1e-5), (FULL_RANK, 10, 1e-6), (FULL_RANK, 1, 1e-6)],
)
def test_soap_is_pytorch_optimizers(every, shapes, side, bound):
    ours, theirs = parameters(shapes), parameters(shapes)
    section = Soap(every_steps=every, largest_side=side, weight_decay=0.1)
    optimizer = WholeOptimizer(section, ours)
    reference = SOAP(
        list(theirs.values()), lr=1e-2, weight_decay=0.0, precondition_frequency=every,
        max_precondition_dim=side,
    )  # fmt: skip
    for step in range(35):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(1e-2)
        for tensor in theirs.values():  # theirs decays after the update, and not in step 1
            tensor.mul_(1 - 1e-2 * 0.1)
        reference.step()
    assert error(ours, theirs) < bound


@pytest.mark.parametrize("section", [Adafactor(), Soap(every_steps=1)])
def test_gradients_of_zero_are_harmless(section):
    ours = parameters({"a": (7, 11), "vector": (13,)})
    optimizer = WholeOptimizer(section, ours)
    set_gradients(ours, 0, 0.0)
    for _ in range(3):
        optimizer.step(0.1, 0.0)
    assert error(ours, parameters({"a": (7, 11), "vector": (13,)})) == 0
    set_gradients(ours, 0)
    optimizer.step(0.1)
    assert all(tensor.isfinite().all() for tensor in ours.values())


@pytest.mark.parametrize(
    ("section", "accuracy"),
    [(Soap(), 0), (Soap(largest_side=20), 0), (Soap(split_qkv=False), 0), (Adafactor(), 0.15)],
)
def test_the_planner_knows_the_states(section, accuracy):
    model, shape = new_model(), shape_of(MODEL)
    optimizer = whole_optimizer_of(model, section)
    set_gradients(dict(model.named_parameters()), 0)
    optimizer.step(0.0)
    states = optimizer.optimizer.state.values()
    numbers = sum(tensor.numel() for state in states for tensor in state.values())
    assert section.state_numbers(shape.hidden_matrices, shape.others) == pytest.approx(
        numbers, rel=accuracy
    )


# --- real ranks -----------------------------------------------------------------------------------

# Sides that the first gradient fills, and an epsilon above what is rounding in a gradient: SOAP
# divides the noise in a direction without signal by its own size, see above.
CALM = Soap(every_steps=3, largest_side=MODEL.hidden_size, epsilon=1e-3)


def new_model():
    torch.manual_seed(1)
    return Bloom(MODEL)


def new_engine(world, stage, section):
    config = Engine(zero_stage=stage, precision="fp32", micro_batch_samples=2)
    with sharded_construction(config, world):
        model = new_model()
    return ZeroEngine(model, section, config, world)


def plan_of(section):
    rate = section.facts.learning_rate / 4
    return StepPlan(BATCH, rate, section.weight_decay, section.momenta, 0.0)


def accumulate(engine, step):
    first, end = rows_of_rank(BATCH, engine.world)
    return engine.forward_backward(rows_for(step, BATCH)[first:end], BATCH)


def gradients_of(engine, model):
    """Give the model the gradients that the engine is about to step with."""
    found = {n: torch.zeros(parameter.numel()) for n, parameter in model.named_parameters()}
    for fragment in engine.fragments():
        part = found[fragment.name].narrow(0, fragment.start, len(fragment.gradient))
        part.copy_(fragment.gradient)
    for name, parameter in model.named_parameters():
        parameter.grad = engine.world.sum(found[name]).view(parameter.shape)


def distance(engine, model):
    """Relative L2 distance of all weights from those of a whole model."""
    weights, sums = dict(model.named_parameters()), torch.zeros(2, dtype=torch.float64)
    for fragment in engine.fragments():
        if not fragment.name.endswith(NOISE):
            whole = weights[fragment.name].detach().flatten()
            part = whole.narrow(0, fragment.start, len(fragment.master)).double()
            sums += torch.stack([(fragment.master - part).square().sum(), part.square().sum()])
    square, norm = engine.world.sum(sums).tolist()
    return (square / norm) ** 0.5


def train_both(engine, section, borrowed):
    """Train with the engine, and whole with its own or the engine's (borrowed) gradients."""
    engine.use_optimizer(section)
    model = new_model()
    whole, plan = whole_optimizer_of(model, section), plan_of(section)
    for step in range(STEPS):
        stats = accumulate(engine, step)
        if borrowed:
            gradients_of(engine, model)
        else:
            rows = rows_for(step, BATCH)
            (model(rows[:, :-1], rows[:, 1:]) / (BATCH * LENGTH)).backward()
        engine.step(plan, stats)
        whole.step(plan.learning_rate)
        model.zero_grad()
    return distance(engine, model), whole.optimizer.state


def compare(world, stage):
    """Distances by section; of SOAP with the same gradients also whether the states of matrices
    have the same bits, and whose they are."""
    engine = new_engine(world, stage, CALM)
    initial = [fragment.master.clone() for fragment in engine.fragments()]
    found = []
    for section, borrowed in ((Adafactor(weight_decay=0.1), 0), (CALM, 0), (Soap(), 1)):
        for fragment, master in zip(engine.fragments(), initial, strict=True):
            fragment.master.copy_(master)
        engine.loaded({})
        error, states = train_both(engine, section, borrowed)
        found.append(error)
    wholes = {tuple(key.split("/")): value for key, value in engine.optimizer_wholes().items()}
    same = all(torch.equal(value, states[name][key]) for (key, name), value in wholes.items())
    return found, same, {name for _, name in wholes}


@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (3, 2)])
def test_ranks_step_as_one_process_does(stage, ranks):
    """SOAP with its defaults only if the gradients have the same bits, but then exactly."""
    results = run_ranks(ranks, compare, stage)
    (factored, calm, borrowed), _, _ = results[0]
    assert factored < 1e-6
    assert calm < 1e-5
    assert borrowed < 1e-6
    assert all(same for _, same, _ in results)
    owned = [name for _, _, names in results for name in names]
    assert len(owned) == len(set(owned)) == 4 * MODEL.layers  # each matrix has one owner
    assert all(names for _, _, names in results)


# --- checkpoints ----------------------------------------------------------------------------------


BOTH = [Adafactor(), Soap(every_steps=2)]


def save_after_five(world, stage, path):
    engine, found = new_engine(world, stage, BOTH[0]), []
    for section in BOTH:
        engine.use_optimizer(section)
        for step in range(5):
            engine.step(plan_of(section), accumulate(engine, step))
        dcp.save(to_save(engine), checkpoint_id=path / section.name)
        found.append((engine.optimizer_scalars(), wholes_of(engine)))
    return found


def load_elsewhere(world, stage, path, scalars):
    engine, found = new_engine(world, stage, BOTH[0]), []
    for section, numbers in zip(BOTH, scalars, strict=True):
        engine.use_optimizer(section)
        entries, finish = to_load(path / section.name, engine)
        dcp.load(entries, checkpoint_id=path / section.name)
        finish()
        engine.loaded(numbers)
        found.append((engine.optimizer_scalars(), wholes_of(engine)))
    return found


def wholes_of(engine):
    return {key: value.numpy().copy() for key, value in engine.optimizer_wholes().items()}


def test_states_arrive_at_those_who_need_them(tmp_path):
    saved = run_ranks(3, save_after_five, 1, tmp_path)
    scalars = [numbers for numbers, _ in saved[0]]
    loaded = run_ranks(2, load_elsewhere, 3, tmp_path, scalars)
    assert [numbers for numbers, _ in loaded[0]] == scalars == [{"group.steps": 5}] * 2
    for number in range(len(BOTH)):
        here, there = ([rank[number][1] for rank in ranks] for ranks in (saved, loaded))
        before, after = (dict(itertools.chain(*map(dict.items, side))) for side in (here, there))
        assert before.keys() == after.keys()
        assert all((before[key] == after[key]).all() and before[key].any() for key in before)
        if isinstance(BOTH[number], Soap):
            assert here[0].keys() != there[0].keys()  # owners have changed
            assert not there[0].keys() & there[1].keys()
        else:
            assert there[0].keys() == there[1].keys() == before.keys()
