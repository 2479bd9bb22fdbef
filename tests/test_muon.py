"""Muon against torch's, its iteration against float64, and fused parameters against separate
ones."""

import pytest
import torch

from pretrain.config_optim import Muon
from pretrain.optim.groups import Matrices
from pretrain.optim.muon import orthogonalise
from tests.test_optimizers import distance, groups, pull, rate_at, weights
from tests.whole import WholeOptimizer

SHAPES = {"wide": (16, 48), "tall": (48, 20), "square": (24, 24)}
COEFFICIENTS = Muon().coefficients


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices gain nothing from more, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def moves(section, shapes=SHAPES, steps=5, rate=0.02, **known):
    """How far the parameters go in some steps: the weights hide small updates."""
    ours = weights(shapes=shapes)
    before = {name: p.detach().clone() for name, p in ours.items()}
    whole = WholeOptimizer(section, ours, **known)
    for step in range(steps):
        pull(ours, step)
        whole.step(rate * rate_at(step + 1))
    return {name: p.detach() - before[name] for name, p in ours.items()}


def moves_of_torch(scale, nesterov, decay, steps=5):
    theirs = weights(shapes=SHAPES)
    before = {name: p.detach().clone() for name, p in theirs.items()}
    name = {"rms": "match_rms_adamw", "spectral": "original"}[scale]
    optimizer = torch.optim.Muon(groups(theirs, decay), nesterov=nesterov, adjust_lr_fn=name)
    for step in range(steps):
        pull(theirs, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * rate_at(step + 1)
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in theirs.items()}


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["rms", "spectral"])
def test_muon_is_that_of_torch(scale, nesterov, decay):
    """Its decay takes the rate before the scale, as ours; iterations in bf16 differ by rounding."""
    section = Muon(scale=scale, nesterov=nesterov, weight_decay=decay)
    theirs = moves_of_torch(scale, nesterov, decay)
    assert distance(moves(section), theirs) <= 0.03
    in_fp32 = section.model_copy(update={"precision": "fp32"})
    assert 0 < distance(moves(in_fp32), theirs) <= 0.03
    changes = {"nesterov": not nesterov, "weight_decay": decay + 2.0, "momentum": 0.5}
    changes["scale"] = "spectral" if scale == "rms" else "rms"
    for name, value in changes.items():
        other = in_fp32.model_copy(update={name: value})
        assert distance(moves(other), theirs) > 0.06, name


def iterated(matrix):
    """The iteration in float64, by the polynomial in the singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64), (128, 160)])
def test_orthogonalise(shape):
    """Singular values go through the polynomial, so the result is near U V^T; small ones of square
    matrices stay small, so nothing is asked of each."""
    for seed in range(3):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found = orthogonalise(matrix, 5, COEFFICIENTS)
        assert found.dtype == torch.float32
        assert distance({"": found}, {"": iterated(matrix)}) <= 1e-5
        in_bf16 = orthogonalise(matrix.bfloat16(), 5, COEFFICIENTS)
        assert in_bf16.dtype == torch.bfloat16
        assert distance({"": in_bf16}, {"": found}) <= 0.03
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        for result in (found, in_bf16.float()):
            cosine = (result * (u @ v)).sum() / result.norm() / (u @ v).norm()
            assert cosine >= 0.975
        torch.testing.assert_close(orthogonalise(1e4 * matrix, 5, COEFFICIENTS), found)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_gradient_of_zeros_moves_nothing(precision):
    ours = {"matrix": torch.nn.Parameter(torch.ones(4, 6))}
    ours["matrix"].grad = torch.zeros(4, 6)
    WholeOptimizer(Muon(precision=precision, weight_decay=0.0), ours).step(0.1)
    assert torch.equal(ours["matrix"].detach(), torch.ones(4, 6))


def test_all_but_hidden_matrices_are_left_to_adamw():
    shapes = {"table": (20, 6), "head": (6, 20), "inside": (6, 8), "bias": (8,), "gain": (8,)}
    roles = dict(zip(shapes, ("embedding", "head", "matrix", "bias", "norm"), strict=True))
    section = Muon(adamw_betas=(0.8, 0.9), adamw_epsilon=1e-3, adamw_rate=0.5)
    found = moves(section, shapes, steps=20, roles=roles)
    theirs = weights(shapes=shapes)
    before = {name: p.detach().clone() for name, p in theirs.items()}
    optimizer = torch.optim.AdamW(groups(theirs, 0.1), betas=(0.8, 0.9), eps=1e-3)
    for step in range(20):
        pull(theirs, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * 0.02 * rate_at(step + 1)
        optimizer.step()
    expected = {name: p.detach() - before[name] for name, p in theirs.items()}
    assert distance({"inside": found.pop("inside")}, expected) > 0.1
    assert distance(found, expected) <= 2e-6


# --- fused parameters -----------------------------------------------------------------------------

HEADS, SIZE = 3, 4
HIDDEN = HEADS * SIZE
# By layout: how the parameter splits, its shape, and the indices of each part's rows or columns.
FUSED = {
    "bloom": (
        Matrices(0, HEADS, (SIZE, SIZE, SIZE)),
        (3 * HIDDEN, HIDDEN),
        [[h * 3 * SIZE + part * SIZE + i for h in range(HEADS) for i in range(SIZE)]
         for part in range(3)],
    ),
    "gpt2": (
        Matrices(1, 1, (HIDDEN, HIDDEN, HIDDEN)),
        (HIDDEN, 3 * HIDDEN),
        [list(range(part * HIDDEN, (part + 1) * HIDDEN)) for part in range(3)],
    ),
    "phi3": (
        Matrices(0, 1, (HIDDEN, SIZE, SIZE)),
        (HIDDEN + 2 * SIZE, HIDDEN),
        [list(range(HIDDEN)), list(range(HIDDEN, HIDDEN + SIZE)),
         list(range(HIDDEN + SIZE, HIDDEN + 2 * SIZE))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("layout", FUSED)
def test_fused_parameters_are_updated_as_separate_ones(layout, scale):
    matrices, shape, parts = FUSED[layout]
    section = Muon(scale=scale, precision="fp32")
    fused = weights(shapes={"fused": shape})
    take = lambda tensor, part: tensor.detach().index_select(matrices.axis, torch.tensor(part))  # noqa: E731
    separate = {
        str(i): torch.nn.Parameter(take(fused["fused"], part)) for i, part in enumerate(parts)
    }
    one = WholeOptimizer(section, fused, matrices={"fused": matrices})
    three = WholeOptimizer(section, separate)
    unsplit_weights = weights(shapes={"fused": shape})
    unsplit = WholeOptimizer(
        section.model_copy(update={"split_qkv": False}),
        unsplit_weights,
        matrices={"fused": matrices},
    )
    for step in range(4):
        pull(fused, step)
        unsplit_weights["fused"].grad = fused["fused"].grad
        for i, part in enumerate(parts):
            separate[str(i)].grad = take(fused["fused"].grad, part)
        for whole in (one, three, unsplit):
            whole.step(0.05)
    found = {str(i): take(fused["fused"], part) for i, part in enumerate(parts)}
    assert distance(found, separate) <= 1e-6
    together = {str(i): take(unsplit_weights["fused"], part) for i, part in enumerate(parts)}
    assert distance(together, separate) > 1e-3


def test_experts_in_one_parameter_are_updated_each():
    stack = weights(shapes={"experts": (3, 8, 5)})
    separate = {str(i): torch.nn.Parameter(m.clone()) for i, m in enumerate(stack["experts"].data)}
    section = Muon(precision="fp32")
    one, three = WholeOptimizer(section, stack), WholeOptimizer(section, separate)
    for step in range(3):
        pull(stack, step)
        for i, parameter in enumerate(separate.values()):
            parameter.grad = stack["experts"].grad[i]
        one.step(0.05)
        three.step(0.05)
    assert distance(dict(zip("012", stack["experts"], strict=True)), separate) <= 1e-6
