"""Optimizers by the section of the config that names them, built on the masters of this rank."""

from collections.abc import Callable
from typing import Any

import torch

from pretrain import config_optim as sections
from pretrain.config_optim import OptimizerSection
from pretrain.optim.adafactor import Adafactor
from pretrain.optim.elementwise import (
    Adadelta,
    AdEmaMixRule,
    DecoupledSgd,
    Lion,
    RmsPropRule,
    ScheduleFree,
)
from pretrain.optim.layerwise import Lamb, Lars
from pretrain.optim.muon import Muon
from pretrain.optim.own import build_own
from pretrain.optim.shards import Shards
from pretrain.optim.soap import Soap

Builder = Callable[[Shards, Any], torch.optim.Optimizer]


def _adamw(shards: Shards, config: sections.AdamW) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        shards.groups(), lr=0.0, betas=config.betas, eps=config.epsilon, weight_decay=0.0,
        fused=True,
    )  # fmt: skip


def _adam(shards: Shards, config: sections.Adam) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        shards.groups(), lr=0.0, betas=config.betas, eps=config.epsilon, fused=True
    )


def _sgd(shards: Shards, config: sections.Sgd) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        shards.groups(), lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )


def _adagrad(shards: Shards, config: sections.Adagrad) -> torch.optim.Optimizer:
    on_cpu = all(master.device.type == "cpu" for master in shards.masters)  # fused only there
    return torch.optim.Adagrad(
        shards.groups(), lr=0.0, eps=config.epsilon, fused=on_cpu or None,
        initial_accumulator_value=config.initial_accumulator,
    )  # fmt: skip


BUILDERS: dict[type[OptimizerSection], Builder] = {
    sections.AdamW: _adamw,
    sections.Adam: _adam,
    sections.Sgd: _sgd,
    sections.Sgdw: DecoupledSgd,
    sections.Adagrad: _adagrad,
    sections.Adadelta: Adadelta,
    sections.RmsProp: RmsPropRule,
    sections.Lion: Lion,
    sections.AdEmaMix: AdEmaMixRule,
    sections.ScheduleFreeAdamW: ScheduleFree,
    sections.ScheduleFreeSgd: ScheduleFree,
    sections.Lars: Lars,
    sections.Lamb: Lamb,
    sections.Adafactor: Adafactor,
    sections.Muon: Muon,
    sections.OwnOptimizer: build_own,
    sections.Soap: Soap,
}


def build_optimizer(shards: Shards, config: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of the config; rate, betas and decay are set before each step. Collective."""
    return BUILDERS[type(config)](shards, config)
