"""A user's own optimizer: trained with, saved and resumed if element-wise, refused if not."""

import sys

import pytest

from pretrain.config_file import load
from pretrain.config_optim import OwnOptimizer
from pretrain.errors import ConfigError, UserError
from pretrain.observe.metrics import read_metrics
from pretrain.optim.own import check_own
from tests.ranks import run_ranks
from tests.test_resume import run_interrupted
from tests.tiny import write_config

SOURCE = '''
import torch

class Signed(torch.optim.Optimizer):
    """Sign of a momentum: element-wise."""

    def __init__(self, params, momentum=0.9, flavour=0.0):
        super().__init__(params, {"lr": 1.0, "momentum": momentum, "weight_decay": 0.0, "calls": 0})
        self.flavour = flavour

    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                self.change(p, m, group["lr"] / group["calls"] ** 0.1)

    def change(self, p, m, rate):
        p.sub_(m.sign(), alpha=rate)

class Normed(Signed):
    """Divides by a norm: not element-wise."""

    def change(self, p, m, rate):
        p.sub_(m / m.norm(), alpha=rate)

class Random(Signed):
    """Not the same twice."""

    def change(self, p, m, rate):
        p.sub_(m.sign() * torch.rand_like(m), alpha=rate)

class Factored(Signed):
    """A state of another shape, which no other number of ranks could read."""

    def change(self, p, m, rate):
        self.state[p]["history"] = torch.zeros(3)
        super().change(p, m, rate)

def function(params):
    return Signed(params)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


def refusal(name, **options):
    with pytest.raises(UserError) as error:
        check_own(OwnOptimizer(name=name, options=options))
    return str(error.value)


def test_only_element_wise_ones_are_taken(folder):
    check_own(OwnOptimizer(name="mine:Signed"))
    check_own(OwnOptimizer(name="mine:Signed", options={"momentum": 0.5}))
    check_own(OwnOptimizer(name="torch.optim:NAdam"))
    check_own(OwnOptimizer(name="schedulefree:AdamWScheduleFree", options={"foreach": False}))
    assert "treat each element by itself" in refusal("mine:Normed")
    assert "treat each element by itself" in refusal("mine:Random")
    assert "treat each element by itself" in refusal("pytorch_optimizer:Lamb")
    assert "'history' has shape [3]" in refusal("mine:Factored")


def test_what_cannot_be_made_is_explained(folder):
    assert "No module named 'nowhere'" in refusal("nowhere:Class")
    assert "no attribute 'Missing'" in refusal("mine:Missing")
    assert "is no torch.optim.Optimizer" in refusal("mine:function")
    assert "mend optimizer.options" in refusal("mine:Signed", speed=3)


def test_a_name_without_a_colon_must_be_known(folder):
    with pytest.raises(ConfigError, match="did you mean 'lamb'"):
        load(write_config(folder, optimizer={"name": "lambb"}))
    with pytest.raises(ConfigError, match=r"optimizer\.name"):
        load(write_config(folder, optimizer={"name": "mine:"}))


def test_it_trains_and_resumes_in_other_layouts(folder):
    """Its momentum and the counter in its groups come back, on other ranks and in another stage."""
    path = write_config(folder, optimizer={"name": "mine:Signed"}, validation={})
    few = ["recipe.learning_rate.peak=1e-3", "recipe.learning_rate.floor=1e-4"]
    whole = run_interrupted(path, "whole", [], [(1, [])], few)
    layouts = [(2, []), (1, ["engine.zero_stage=3"]), (2, ["engine.zero_stage=2"])]
    pieces = run_interrupted(path, "pieces", [4, 9], layouts, few)
    assert len(whole) == len(pieces) == 23
    for there, here in zip(whole, pieces, strict=True):
        assert here[3] == pytest.approx(there[3], abs=1e-5)
    assert whole[-1][3] < whole[0][3] - 0.05


def run_with_normed(world, path):
    from pretrain.train import train_run

    try:
        train_run(load(path), world)
    except UserError as error:
        return str(error)


def test_a_run_with_another_kind_is_refused_before_it_begins(folder):
    path = write_config(folder, optimizer={"name": "mine:Normed"})
    assert "element" in run_ranks(1, run_with_normed, path)[0]
    assert not read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")


def test_the_check_sees_a_difference_in_the_last_step_only(folder):
    """The parts are compared after all steps, not after the first."""
    (folder / "late.py").write_text(
        SOURCE + "\nclass Late(Signed):\n"
        "    def change(self, p, m, rate):\n"
        "        calls = self.param_groups[0]['calls']\n"
        "        p.sub_(m / (m.norm() if calls > 2 else 1.0), alpha=rate)\n"
    )
    try:
        assert "element" in refusal("late:Late")
    finally:
        sys.modules.pop("late", None)
