"""LAMB and LARS against timm's and against formulas in float64."""

import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from pretrain.config_optim import Adam, Lamb, Lars
from tests.test_optimizers import SHAPES, distance, run, run_reference
from tests.whole import WholeOptimizer


def timm(module, name):
    """A class of timm, without timm/__init__, which wants torchvision."""
    folder = Path(sys.prefix) / "references" / "timm"
    if not folder.exists():
        pytest.skip("timm is not installed")
    for package, path in (("timm", folder), ("timm.optim", folder / "optim")):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path)]
    try:
        return getattr(importlib.import_module(f"timm.optim.{module}"), name)
    finally:  # for others timm is as it was
        for key in [key for key in sys.modules if key.split(".")[0] == "timm"]:
            del sys.modules[key]


class LambFormula:
    """Apex's LAMB in float64: gradients cut to a global norm of 1, the ratio where there is decay
    or always."""

    def __init__(self, groups, section):
        self.param_groups, self.section, self.step_number = groups, section, 0
        self.parameters = [p for group in groups for p in group["params"]]
        self.moments = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in self.parameters}

    @torch.no_grad()
    def step(self):
        self.step_number += 1
        t, (b1, b2) = self.step_number, self.section.betas
        norm = sum(float(p.grad.square().sum()) for p in self.parameters) ** 0.5
        for group in self.param_groups:
            for p in group["params"]:
                gradient, (m, v) = p.grad / max(1.0, norm), self.moments[p]
                m.copy_(b1 * m + (1 - b1) * gradient)
                v.copy_(b2 * v + (1 - b2) * gradient**2)
                root = (v / (1 - b2**t)).sqrt() + self.section.epsilon
                update = m / (1 - b1**t) / root + group["weight_decay"] * p
                ratio = 1.0
                if group["weight_decay"] or self.section.always_adapt:
                    ratio = float(p.norm() / update.norm())
                p -= group["lr"] * min(ratio, self.section.ratio_limit or math.inf) * update


LAMBS = {
    "plain": {},
    "lambc": {"ratio_limit": 1.0},
    "always": {"always_adapt": True},
}


@pytest.mark.parametrize("options", LAMBS.values(), ids=LAMBS)
@pytest.mark.parametrize("reference", ["apex", "timm"])
def test_lamb(reference, options):
    """Gradients are cut outside, by the engine; each option makes a difference."""
    shapes = {**SHAPES, "small": (2, 3)}
    section = Lamb(weight_decay=0.1, **options)
    ours, _ = run(section, 0.05, steps=50, shapes=shapes, clip=1.0)

    def make(groups):
        if reference == "apex":
            return LambFormula(groups, section)
        always, limited = section.always_adapt, section.ratio_limit is not None
        return timm("lamb", "Lamb")(groups, trust_clip=limited, always_adapt=always)

    dtype = torch.float64 if reference == "apex" else torch.float32
    theirs, _ = run_reference(make, 0.1, 0.05, steps=50, dtype=dtype, shapes=shapes)
    assert distance(ours, theirs) <= 5e-6
    others = (other for other in LAMBS.values() if other != options)
    for other in others:
        section = Lamb(weight_decay=0.1, **other)
        assert distance(run(section, 0.05, 50, shapes=shapes, clip=1.0)[0], theirs) > 0.01


def test_lamb_without_decay_is_adam():
    """Parameters that do not decay take the plain update, and the rate is not theirs alone."""
    ours, optimizer = run(Lamb(weight_decay=0.0, epsilon=1e-8), 0.02, steps=50)
    adam, _ = run(Adam(), 0.02, steps=50)
    assert distance(ours, adam) <= 2e-7
    assert optimizer.ratios.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "section",
    [Lamb(weight_decay=0.1, always_adapt=True), Lars(), Lars(clip=True)],
    ids=["lamb", "lars", "larc"],
)
def test_tensors_of_zeros_take_the_plain_rate(section):
    """A norm of 0 tells nothing: weights that start at 0 (ratio 0) would never leave it, and an
    update of 0 (ratio infinite) would make them NaN."""
    ours = {name: torch.nn.Parameter(torch.zeros(4, 5)) for name in ("weight", "both")}
    ours["gradient"] = torch.nn.Parameter(torch.ones(4, 5))
    ours["usual"] = torch.nn.Parameter(torch.ones(4, 5))
    whole = WholeOptimizer(section, ours)
    for p in ours.values():
        p.grad = torch.zeros(4, 5)
    ours["weight"].grad += 0.5
    ours["usual"].grad += 0.5
    whole.step(0.1, weight_decay=1e-30)
    weight, both, gradient, usual = whole.optimizer.ratios.tolist()
    assert weight == both == 1
    assert usual != 1
    assert gradient == (1 if isinstance(section, Lars) else gradient)
    plain = 0.5 if isinstance(section, Lars) else 1.0
    torch.testing.assert_close(ours["weight"].detach(), torch.full((4, 5), -0.1 * plain))
    assert torch.equal(ours["both"].detach(), torch.zeros(4, 5))
    assert all(torch.isfinite(p).all() for p in ours.values())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_lars_is_that_of_timm(clip, nesterov):
    """With `clip` LARC, at a rate where some of the matrices reach the plain one."""
    section = Lars(weight_decay=0.05, clip=clip, nesterov=nesterov, trust=0.1)
    shapes = {**SHAPES, "small": (2, 3)}
    peak = 0.08 if clip else 0.4
    ours, optimizer = run(section, peak, shapes=shapes)

    def make(groups):
        return timm("lars", "Lars")(
            groups, momentum=0.9, nesterov=nesterov, trust_coeff=0.1, trust_clip=clip
        )

    theirs, _ = run_reference(make, 0.05, peak, shapes=shapes)
    assert distance(ours, theirs) <= 2e-6
    for change in ({"clip": not clip}, {"nesterov": not nesterov}, {"weight_decay": 0.1}):
        other = section.model_copy(update=change)
        assert distance(run(other, peak, shapes=shapes)[0], theirs) > 1e-3
    matrices = optimizer.ratios[[0, 1, 3]]
    assert (matrices.max() == 1 and matrices.min() < 1) if clip else (matrices < 1).all()
