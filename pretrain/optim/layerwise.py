"""Layer-wise optimizers: trust ratios from the norms of whole parameters, exact on shards.

The norms of all parameters are summed over the ranks in one small all-reduce a step.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.config_optim import Lamb as LambConfig
from pretrain.config_optim import Lars as LarsConfig
from pretrain.optim import rules
from pretrain.optim.base import ShardedOptimizer, adam_corrections
from pretrain.optim.kernels import apply_to_all


class LayerwiseOptimizer(ShardedOptimizer):
    """Steps each parameter at its own ratio.

    `ratios` has the last step's by number of parameter, 1 where the plain rate was taken.
    """

    ratios: Tensor | None = None

    def update(self, groups: list[dict[str, Any]]) -> None:
        """Directions, norms of all parameters together, then the step of each."""
        shards = self.shards
        squares = {
            master: self.measure(self._stretches(master), group)
            for group in groups
            for master in group["params"]
        }
        weights, updates = shards.total(squares, 2).sqrt()
        self.ratios = torch.ones_like(weights)
        for group in groups:
            if self.adapts(group):
                ratios = self.ratio(weights, updates, group)
                # No branch on values: they are on the device, and may not be waited for.
                ratios = torch.where((weights > 0) & (updates > 0), ratios, 1.0)
                for master in group["params"]:
                    own = shards.indices[master]
                    self.ratios[own] = ratios[own]
        for group in groups:
            for master in group["params"]:
                own = self.ratios[shards.indices[master]].to(master)
                self.move(self._stretches(master), own, group)

    def _stretches(self, master: Tensor) -> list[list[Tensor]]:
        """Weights, gradient and states of each fragment in a master."""
        flats = (master.detach(), master.grad, *self.states_of(master))
        views = [self.shards.views(master, flat) for flat in flats]
        return [list(stretch) for stretch in zip(*views, strict=True)]

    def adapts(self, group: dict[str, Any]) -> bool:
        """Whether parameters of the group take a ratio; as published, those that do not decay
        (biases, norms) do not."""
        return group["weight_decay"] != 0

    def measure(self, stretches: list[list[Tensor]], group: dict[str, Any]) -> Tensor:
        """Squared norms of weights and direction of each fragment, (fragments, 2); may turn the
        gradients into directions."""
        return apply_to_all(rules.nothing, [(s[:2], ()) for s in stretches], (), (0, 1))

    def ratio(self, weights: Tensor, updates: Tensor, group: dict[str, Any]) -> Tensor:
        """Ratios by number of parameter from the norms of weights and directions."""
        raise NotImplementedError

    def move(self, stretches: list[list[Tensor]], ratios: Tensor, group: dict[str, Any]) -> None:
        """Update fragments, each at its ratio."""
        raise NotImplementedError


class Lars(LayerwiseOptimizer):
    """LARS (You et al., arXiv 1708.03888) with `clip` LARC: the ratio is eta |w| / (|g| + wd |w|),
    at most 1 / lr when clipped, and scales the gradient before it enters the momentum."""

    config: LarsConfig
    states = ("momentum_buffer",)

    def ratio(self, weights: Tensor, updates: Tensor, group: dict[str, Any]) -> Tensor:
        """eta |w| / (|g| + wd |w| + eps)."""
        decay = group["weight_decay"]
        ratio = self.config.trust * weights / (updates + decay * weights + self.config.epsilon)
        return (ratio / group["lr"]).clamp(max=1.0) if self.config.clip and group["lr"] else ratio

    def move(self, stretches: list[list[Tensor]], ratios: Tensor, group: dict[str, Any]) -> None:
        """m <- mu m + ratio (g + wd p); p <- p - lr m."""
        rule = rules.lars_nesterov if self.config.nesterov else rules.lars
        decay, rate, momentum = group["weight_decay"], group["lr"], group["betas"][0]
        jobs = [
            (stretch, (decay, ratio, rate, momentum))
            for stretch, ratio in zip(stretches, ratios.unbind(), strict=True)
        ]
        apply_to_all(rule, jobs, (0, 2))


class Lamb(LayerwiseOptimizer):
    """LAMB (You et al., arXiv 1904.00962, algorithm 2, bias-corrected, decay inside the ratio)."""

    config: LambConfig
    states = ("exp_avg", "exp_avg_sq")

    def adapts(self, group: dict[str, Any]) -> bool:
        """Where there is decay, or always if asked for."""
        return self.config.always_adapt or super().adapts(group)

    def measure(self, stretches: list[list[Tensor]], group: dict[str, Any]) -> Tensor:
        """Puts Adam's update plus the decay in place of the gradients."""
        first, second = group["betas"]
        scalars = (group["weight_decay"], first, 1 - first, second, 1 - second,
                   *adam_corrections(group), self.config.epsilon)  # fmt: skip
        jobs = [(stretch, scalars) for stretch in stretches]
        return apply_to_all(rules.lamb_direction, jobs, (1, 2, 3), (0, 1))

    def ratio(self, weights: Tensor, updates: Tensor, group: dict[str, Any]) -> Tensor:
        """|w| / |u|, at most the limit."""
        limit = self.config.ratio_limit
        ratio = weights / updates
        return ratio if limit is None else ratio.clamp(max=limit)

    def move(self, stretches: list[list[Tensor]], ratios: Tensor, group: dict[str, Any]) -> None:
        """p <- p - lr ratio u."""
        rates = (ratios * group["lr"]).unbind()
        jobs = [(s[:2], (rate,)) for s, rate in zip(stretches, rates, strict=True)]
        apply_to_all(rules.subtract, jobs, (0,))
