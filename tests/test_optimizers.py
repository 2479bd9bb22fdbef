"""Element-wise optimizers against independent ones: those of torch and of other libraries, and
formulas of the papers in float64. Gradients depend on the weights, so an error feeds back."""

import math

import lion_pytorch
import pytest
import pytorch_optimizer
import schedulefree
import torch

from pretrain import config_optim as sections
from pretrain.optim.elementwise import ScheduleFree
from tests.whole import WholeOptimizer

SHAPES = {"wide": (7, 33), "tall": (40, 9), "vector": (19,)}
BOTH = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)


def weights(dtype=torch.float32, shapes=SHAPES):
    """Named parameters, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in made.items()}


def pull(parameters, step, strength=0.3):
    """The gradients of a step: noise, and a pull to zero."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters.values():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = noise.to(p.dtype) + strength * p.detach()


def distance(ours, theirs):
    """The largest relative distance of two sets of tensors."""
    pairs = [(a.detach().double(), theirs[name].detach().double()) for name, a in ours.items()]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def groups(parameters, decay):
    """Parameter groups of a reference: only matrices decay."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() == 1]
    pairs = [(matrices, decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": wd} for params, wd in pairs if params]


def rate_at(step):
    """Of a peak: a warm-up, then no two steps alike."""
    return min(1.0, step / 4) * (1 - 0.1 * (step % 3))


def run(section, peak, steps=30, dtype=torch.float32, shapes=SHAPES, clip=None, **known):
    """Weights after some steps of ours, and the optimizer."""
    ours = weights(dtype, shapes)
    optimizer = WholeOptimizer(section, ours, **known)
    for step in range(steps):
        pull(ours, step)
        if clip:
            torch.nn.utils.clip_grad_norm_(ours.values(), clip)
        optimizer.step(peak * rate_at(step + 1))
    return ours, optimizer.optimizer


def run_reference(make, decay, peak, steps=30, dtype=torch.float32, shapes=SHAPES):
    """The same of another library's: `make` builds it on parameter groups."""
    theirs = weights(dtype, shapes)
    optimizer = make(groups(theirs, decay))
    for step in range(steps):
        pull(theirs, step)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate_at(step + 1)
        optimizer.step()
    assert distance(theirs, weights(dtype, shapes)) > 0.05, "nothing has moved"
    return theirs, optimizer


# --- torch and SGDW -------------------------------------------------------------------------------

S, T = sections, torch.optim
BETAS = {"betas": (0.9, 0.95)}
LIKE_TORCH = {
    "sgd": (S.Sgd(weight_decay=0.1, momentum=0.0), T.SGD, {}, 0.05),
    "momentum": (S.Sgd(weight_decay=0.1), T.SGD, {"momentum": 0.9}, 0.03),
    "nesterov": (
        S.Sgd(weight_decay=0.1, nesterov=True), T.SGD, {"momentum": 0.9, "nesterov": True}, 0.03,
    ),
    "adagrad": (S.Adagrad(weight_decay=0.1), T.Adagrad, {}, 0.1),
    "adagrad-initial": (
        S.Adagrad(weight_decay=0.1, initial_accumulator=0.3, epsilon=1e-3), T.Adagrad,
        {"initial_accumulator_value": 0.3, "eps": 1e-3}, 0.1,
    ),
    "adadelta": (S.Adadelta(weight_decay=0.1, rho=0.8), T.Adadelta, {"rho": 0.8}, 20.0),
    "rmsprop": (
        S.RmsProp(weight_decay=0.1, alpha=0.9, epsilon=1e-2), T.RMSprop,
        {"alpha": 0.9, "eps": 1e-2}, 0.02,
    ),
    "rmsprop-momentum": (
        S.RmsProp(weight_decay=0.1, alpha=0.9, epsilon=1e-2, momentum=0.8), T.RMSprop,
        {"alpha": 0.9, "eps": 1e-2, "momentum": 0.8}, 0.01,
    ),
    "adam": (S.Adam(weight_decay=0.1, **BETAS), T.Adam, BETAS, 0.03),
    "adamw": (S.AdamW(weight_decay=0.1), T.AdamW, BETAS, 0.03),
    "sgdw": (S.Sgdw(weight_decay=0.1), pytorch_optimizer.SGDW, {"momentum": 0.9}, 0.03),
    "sgdw-nesterov": (
        S.Sgdw(weight_decay=0.1, nesterov=True), pytorch_optimizer.SGDW,
        {"momentum": 0.9, "nesterov": True}, 0.03,
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", LIKE_TORCH)
def test_element_wise_optimizers_are_those_of_torch(name, dtype, tolerance):
    section, reference, options, peak = LIKE_TORCH[name]
    ours, _ = run(section, peak, dtype=dtype)
    theirs, _ = run_reference(
        lambda g: reference(g, lr=1.0, foreach=False, **options), 0.1, peak, dtype=dtype
    )
    assert distance(ours, theirs) <= (min(tolerance, 1e-6) if "sgdw" in name else tolerance)


@pytest.mark.parametrize(
    ("coupled", "decoupled", "peak"),
    [
        (S.Sgd(weight_decay=0.1), S.Sgdw(weight_decay=0.1), 0.03),
        (S.Adam(weight_decay=0.1, **BETAS), S.AdamW(weight_decay=0.1), 0.03),
    ],
    ids=["sgd", "adam"],
)
def test_decay_in_the_gradient_is_not_decay_of_the_weights(coupled, decoupled, peak):
    """Or parity would hold with neither."""
    ours, others = run(coupled, peak)[0], run(decoupled, peak)[0]
    none = run(coupled.model_copy(update={"weight_decay": 0.0}), peak)[0]
    matrices = {name: ours[name] for name in ("wide", "tall")}
    assert distance(matrices, others) > 0.003
    assert distance(matrices, none) > 0.003
    assert distance(none, others) > 0.003
    assert torch.equal(none["vector"], ours["vector"])


# --- Lion, AdEMAMix -------------------------------------------------------------------------------


def test_lion_is_lion_pytorch_to_the_bit():
    """The momentum may be a rounding off, since torch fuses a multiplication into an addition."""
    ours, optimizer = run(S.Lion(weight_decay=0.5), 0.01, steps=50)
    make = lambda g: lion_pytorch.Lion(g, lr=0.01, betas=(0.9, 0.99))  # noqa: E731
    theirs, reference = run_reference(make, 0.5, 0.01, steps=50)
    moments = [optimizer.state[m]["exp_avg"] for g in optimizer.param_groups for m in g["params"]]
    for (name, weight), moment in zip(ours.items(), moments, strict=True):
        assert torch.equal(weight, theirs[name])
        expected = reference.state[theirs[name]]["exp_avg"].view(-1)
        torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-7)


class AdEmaMixFormula:
    """Algorithm 1 of arXiv 2409.03137 in float64; beta3 by its half-life, which grows linearly."""

    def __init__(self, groups, section):
        self.param_groups, self.section, self.step_number = groups, section, 0
        self.moments = {
            p: [torch.zeros_like(p) for _ in range(3)] for g in groups for p in g["params"]
        }

    @torch.no_grad()
    def step(self):
        self.step_number += 1
        t, (b1, b2), final = self.step_number, self.section.betas, self.section.slow_beta
        share = min(1.0, t / self.section.warmup_steps) if self.section.warmup_steps else 1.0
        half_life = (1 - share) * math.log(0.5, b1) + share * math.log(0.5, final)
        b3, alpha = 0.5 ** (1 / half_life), share * self.section.slow_weight
        for group in self.param_groups:
            for p in group["params"]:
                m, slow, v = self.moments[p]
                m.copy_(b1 * m + (1 - b1) * p.grad)
                slow.copy_(b3 * slow + (1 - b3) * p.grad)
                v.copy_(b2 * v + (1 - b2) * p.grad**2)
                root = (v / (1 - b2**t)).sqrt() + self.section.epsilon
                update = (m / (1 - b1**t) + alpha * slow) / root
                p -= group["lr"] * (update + group["weight_decay"] * p)


@BOTH
@pytest.mark.parametrize("reference", ["paper", "library"])
@pytest.mark.parametrize("warmup", [0, 20])
def test_ademamix(reference, warmup, dtype, tolerance):
    section = S.AdEmaMix(slow_beta=0.999, warmup_steps=warmup, epsilon=1e-4)
    ours, _ = run(section, 0.01, steps=40, dtype=dtype)

    def make(groups):
        if reference == "paper":
            return AdEmaMixFormula(groups, section)
        return pytorch_optimizer.AdEMAMix(
            groups, betas=(*section.betas, 0.999), alpha=5.0, eps=1e-4, weight_decouple=True,
            t_alpha_beta3=warmup or None,
        )  # fmt: skip

    in_double = torch.float64 if reference == "paper" else dtype
    theirs, _ = run_reference(make, 0.1, 0.01, steps=40, dtype=in_double)
    assert distance(ours, theirs) <= tolerance
    other = section.model_copy(update={"warmup_steps": 20 - warmup})
    assert distance(run(other, 0.01, steps=40)[0], theirs) > 0.01


# --- Schedule-Free --------------------------------------------------------------------------------


class ThreeSequences:
    """x, y and z of arXiv 2405.15682, each of them kept, in float64."""

    def __init__(self, start, section):
        self.section, self.steps, self.total, self.largest = section, 0, 0.0, 0.0
        self.x = {n: p.detach().double().clone() for n, p in start.items()}
        self.z = {n: x.clone() for n, x in self.x.items()}
        self.y = {n: x.clone() for n, x in self.x.items()}
        self.v = {n: torch.zeros_like(x) for n, x in self.x.items()}

    def step(self, rate):
        """From the gradients of y."""
        adam = isinstance(self.section, S.ScheduleFreeAdamW)
        first, second = self.section.momenta
        self.steps, self.largest = self.steps + 1, max(self.largest, rate)
        weight = self.steps**self.section.averaging_power * self.largest**self.section.rate_power
        self.total += weight
        share = weight / self.total
        for name, y in self.y.items():
            direction = y.grad
            if adam:
                self.v[name] = second * self.v[name] + (1 - second) * y.grad**2
                corrected = self.v[name] / (1 - second**self.steps)
                direction = y.grad / (corrected.sqrt() + self.section.epsilon)
            decay = self.section.weight_decay if y.dim() > 1 else 0.0
            self.z[name] = self.z[name] - rate * (direction + decay * y)
            self.x[name] = (1 - share) * self.x[name] + share * self.z[name]
            self.y[name] = (1 - first) * self.z[name] + first * self.x[name]


FREE = {
    "adamw": (S.ScheduleFreeAdamW(), 0.02),
    "adamw-powers": (S.ScheduleFreeAdamW(averaging_power=1.5, rate_power=0.5), 0.02),
    "sgd": (S.ScheduleFreeSgd(weight_decay=0.1), 0.2),
}


def warmed(peak, step):
    """Linear over 30 steps."""
    return peak * min(1.0, (step + 1) / 30)


@BOTH
@pytest.mark.parametrize("name", FREE)
def test_schedule_free_keeps_the_three_sequences_of_the_paper(name, dtype, tolerance):
    section, peak = FREE[name]
    ours = weights(dtype)
    optimizer = WholeOptimizer(section, ours)
    reference = ThreeSequences(ours, section)
    for step in range(300):
        pull(ours, step)
        pull(reference.y, step)
        optimizer.step(warmed(peak, step))
        reference.step(warmed(peak, step))
        if step in (0, 29, 150, 299):
            assert distance(ours, reference.y) <= tolerance
            optimizer.optimizer.eval()
            assert distance(ours, reference.x) <= tolerance
            optimizer.optimizer.train()
    assert distance(reference.x, reference.y) > 0.01
    assert distance(reference.x, weights()) > 0.1


@BOTH
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", FREE)
def test_schedule_free_is_the_authors_package(name, foreach, dtype, tolerance):
    """With a first rate of 0, where no step has a weight yet, and one that falls: the largest so
    far counts."""
    section, peak = FREE[name]
    ours, theirs = weights(dtype), weights(dtype)
    optimizer = WholeOptimizer(section, ours)
    adam = isinstance(section, S.ScheduleFreeAdamW)
    make = schedulefree.AdamWScheduleFree if adam else schedulefree.SGDScheduleFree
    options = {"betas": section.betas, "eps": section.epsilon} if adam else {"momentum": 0.9}
    reference = make(
        groups(theirs, section.weight_decay), lr=1.0, foreach=foreach, **options,
        r=section.averaging_power, weight_lr_power=section.rate_power,
    )  # fmt: skip
    reference.train()
    for step in range(100):
        rate = warmed(peak, step - 1) * (1.0 if step < 50 else 0.4)
        pull(ours, step)
        pull(theirs, step)  # the package overwrites gradients
        for group in reference.param_groups:
            group["lr"] = rate
        optimizer.step(rate)
        reference.step()
        if step == 0:
            assert distance(ours, weights(dtype)) == 0
    assert distance(ours, theirs) <= tolerance
    optimizer.optimizer.eval()
    reference.eval()
    assert distance(ours, theirs) <= tolerance


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_modes(name):
    """Asking twice changes nothing, there and back is the identity, a step at x is refused."""
    section, peak = FREE[name]
    ours = weights(torch.float64)
    whole = WholeOptimizer(section, ours)
    for step in range(20):
        pull(ours, step)
        whole.step(warmed(peak, step))
    optimizer = whole.optimizer
    assert isinstance(optimizer, ScheduleFree)
    at_y = {name: p.detach().clone() for name, p in ours.items()}
    optimizer.train()
    assert distance(ours, at_y) == 0
    optimizer.eval()
    at_x = {name: p.detach().clone() for name, p in ours.items()}
    assert distance(at_x, at_y) > 1e-3
    optimizer.eval()
    assert distance(ours, at_x) == 0
    with pytest.raises(RuntimeError, match="train"):
        whole.step(peak)
    assert distance(ours, at_x) == 0
    assert {group["steps"] for group in optimizer.param_groups} == {20}
    optimizer.train()
    assert distance(ours, at_y) <= 1e-12
    fresh = WholeOptimizer(section, weights())
    fresh.optimizer.eval()
    assert distance(fresh.parameters, weights()) == 0
