"""What our own optimizers have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.config_optim import OptimizerSection
from pretrain.optim.shards import Shards


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer over the flat masters of `shards`.

    Its parameter groups hold a role each; rate, betas and weight decay are set in them before each
    step, and `steps` counts those that were made. Gradients may be overwritten by the step.
    """

    states: Sequence[str] = ()  # fp32 tensors kept for each master, zero at first

    def __init__(self, shards: Shards, config: OptimizerSection) -> None:
        self.shards, self.config = shards, config
        defaults = {"lr": 0.0, "weight_decay": 0.0, "betas": config.momenta, "steps": 0}
        super().__init__(shards.groups(), defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all masters from their gradients."""
        for group in self.param_groups:
            group["steps"] += 1
        self.update([group for group in self.param_groups if group["params"]])

    def update(self, groups: list[dict[str, Any]]) -> None:
        """Update the masters of all groups; element-wise ones do so one master after another."""
        for group in groups:
            for master in group["params"]:
                self.update_master(master, group)

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """Update one master."""
        raise NotImplementedError

    def states_of(self, master: Tensor, names: Sequence[str] | None = None) -> list[Tensor]:
        """States of a master, made when first asked for."""
        state = self.state[master]
        for name in self.states if names is None else names:
            if name not in state:
                state[name] = torch.zeros_like(master)
        return [state[name] for name in (self.states if names is None else names)]


def adam_corrections(group: dict[str, Any]) -> tuple[float, float]:
    """Factors of the first moment and of the root of the second that undo their start at zero."""
    (first, second), steps = group["betas"], group["steps"]
    return 1 / (1 - first**steps), (1 - second**steps) ** -0.5
