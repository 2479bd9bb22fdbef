"""Optimizers by name. Each is built on parameter groups; DeepSpeed then hands it flat shards."""

from collections.abc import Callable

import torch
from torch import nn

from pretrain.config import Optimizer
from pretrain.optim.groups import parameter_groups


def _adamw(groups: list[dict[str, object]], config: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); element-wise, so exact on flat shards."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=config.betas, eps=config.epsilon, weight_decay=0.0, fused=True
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw}


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the config; rate and decay are set from the recipe before each step."""
    return OPTIMIZERS[config.name](parameter_groups(model), config)
