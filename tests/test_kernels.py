"""Element-wise rules: numba's loops against the same rules in torch, whole, cut and threaded."""

import inspect

import numpy as np
import pytest
import torch

from pretrain.optim import kernels, rules
from pretrain.optim.kernels import apply

# What each rule writes, by the names of its arguments.
WRITES = {
    "lion": "pm", "sgdw": "pm", "sgdw_nesterov": "pm", "rmsprop": "pv", "rmsprop_momentum": "pvm",
    "adadelta": "pvd", "ademamix": "pmsv", "schedule_free_adamw": "pzv", "schedule_free_sgd": "pz",
    "lars": "pm", "lars_nesterov": "pm", "lamb_direction": "gmv", "subtract": "p", "muon": "gm",
    "muon_nesterov": "gm", "decay_and_subtract": "p", "nothing": "",
}  # fmt: skip
TENSORS, POSITIVE = set("pgmszvdu"), set("vd")
RULES = {
    n: r for n, r in inspect.getmembers(rules, inspect.isfunction) if r.__module__ == rules.__name__
}
EDGE = 2**12
LENGTHS = (1, 15, EDGE - 1, EDGE + 17, 5 * EDGE + 3)


def case(name, length, dtype, seed=0):
    """Random (tensors, scalars, writes) of a rule."""
    arguments = list(inspect.signature(RULES[name](np)).parameters)
    names = [a for a in arguments if a in TENSORS]
    assert arguments[: len(names)] == names, "tensors come first"
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(length, dtype=dtype, generator=generator) for _ in names]
    tensors = [t.abs() if n in POSITIVE else t for n, t in zip(names, tensors, strict=True)]
    scalars = (0.1 + 0.8 * torch.rand(len(arguments) - len(names), generator=generator)).tolist()
    return tensors, scalars, [names.index(written) for written in WRITES[name]]


def applied(name, tensors, scalars, writes):
    """Copies of the tensors after the rule."""
    copies = [tensor.clone() for tensor in tensors]
    apply(RULES[name], copies, scalars, writes)
    return copies


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that a few thousand elements are several pieces."""
    monkeypatch.setattr(kernels, "_PIECE_ELEMENTS", EDGE)
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", EDGE)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_rule_is_tested():
    assert set(RULES) == set(WRITES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_loops_compute_what_torch_does_and_write_nothing_else(name, dtype, threads):
    """To the bit, but for torch's square root on a CPU, which is a unit off now and then."""
    tolerance = 4 * torch.finfo(dtype).eps if "sqrt" in inspect.getsource(RULES[name]) else 0
    for length in LENGTHS:
        tensors, scalars, writes = case(name, length, dtype)
        results = RULES[name](torch)(*tensors, *scalars)
        expected = list(tensors)
        for number, result in zip(writes, results, strict=True):
            assert not torch.equal(result, tensors[number])
            expected[number] = result
        for number, got in enumerate(applied(name, tensors, scalars, writes)):
            assert got.dtype == dtype
            allowed = tolerance * expected[number].norm() if number in writes else 0
            assert (got - expected[number]).norm() <= allowed


@pytest.mark.parametrize("name", RULES)
def test_cuts_change_no_bit(name, threads):
    """ZeRO cuts a buffer anywhere, so loops start unaligned and end in the middle of a vector."""
    length = EDGE + 1000
    tensors, scalars, writes = case(name, length, torch.float32, seed=1)
    whole = applied(name, tensors, scalars, writes)
    sizes = [1, 6, 33, EDGE + 500, length - EDGE - 540]
    pieces = [t.clone().split(sizes) for t in tensors]
    for piece in zip(*pieces, strict=True):
        apply(RULES[name], piece, scalars, writes)
    for got, wanted in zip(pieces, whole, strict=True):
        assert torch.equal(torch.cat(got), wanted)


def some_jobs(name, dtype):
    """Fragments of several sizes, each with a scalar of its own."""
    found = []
    for seed, length in enumerate((5, 3 * EDGE + 7, 1, EDGE)):
        tensors, scalars, writes = case(name, length, dtype, seed)
        found.append(([t.clone() for t in tensors], scalars))
    return found, tuple(writes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lamb_direction", "nothing", "lars"])
def test_sums_of_squares_are_those_after_the_step(name, dtype, threads):
    """By the loops of a CPU, and by the code that other devices run."""
    jobs, writes = some_jobs(name, dtype)
    sums = kernels.apply_to_all(RULES[name], jobs, writes, (0, 1))
    assert sums.shape == (4, 2)
    assert sums.dtype == torch.float64
    others, _ = some_jobs(name, dtype)
    by_torch = kernels._by_torch(RULES[name], others, writes, (0, 1))
    for number, (tensors, _) in enumerate(jobs):
        expected = [tensor.double().square().sum().item() for tensor in tensors[:2]]
        assert sums[number].tolist() == pytest.approx(expected, rel=1e-14)
        assert by_torch[number].tolist() == pytest.approx(expected, rel=1e-5)
        for mine, other in zip(tensors, others[number][0], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_sums_do_not_depend_on_threads():
    sums = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        jobs, writes = some_jobs("lamb_direction", torch.float32)
        sums.append(kernels.apply_to_all(rules.lamb_direction, jobs, writes, (0, 1)))
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_no_fragments_are_no_work():
    assert kernels.apply_to_all(rules.lion, [], (0, 2), (0,)).shape == (0, 1)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_may_be_tensors(shape, dtype):
    """Ratios of layer-wise optimizers are, and norms may be of another type than the weights."""
    tensors, scalars, writes = case("lars", 100, dtype)
    wrapped = [torch.full(shape, scalar, dtype=torch.float64) for scalar in scalars]
    for got, wanted in zip(
        applied("lars", tensors, wrapped, writes),
        applied("lars", tensors, scalars, writes),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_parameters_are_updated_in_place():
    """The masters of an optimizer are leaves that want gradients."""
    weight = torch.nn.Parameter(torch.ones(5))
    apply(rules.subtract, [weight, torch.full((5,), 2.0)], (0.25,), (0,))
    assert weight.tolist() == [0.5] * 5


def test_sign_of_nothing_is_nothing():
    """Lion leaves weights alone whose gradient has always been zero, as the reference does."""
    weight, zeros = torch.full((20,), 3.0), torch.zeros(20)
    apply(rules.lion, [weight, zeros, zeros.clone()], (1.0, 0.5, 0.9, 0.1, 0.99, 0.01), (0, 2))
    assert weight.tolist() == [3.0] * 20


def test_a_failure_in_a_thread_is_raised(monkeypatch):
    """A share that was not computed must not pass for a step."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(kernels, "_compiled", lambda *_: broken)
    with pytest.raises(ValueError, match="broken"):
        apply(rules.subtract, [torch.ones(2 * EDGE), torch.ones(2 * EDGE)], (0.5,), (0,))
