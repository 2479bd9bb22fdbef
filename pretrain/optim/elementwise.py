"""Element-wise optimizers that torch has no one-pass kernel for; exact on shards as they are."""

import math
from typing import Any

from torch import Tensor

from pretrain.config_optim import (
    AdEmaMix,
    OptimizerSection,
    RmsProp,
    ScheduleFreeAdamW,
    ScheduleFreeSgd,
    Sgdw,
)
from pretrain.optim import rules
from pretrain.optim.base import ShardedOptimizer, adam_corrections
from pretrain.optim.kernels import apply
from pretrain.optim.shards import Shards


class Lion(ShardedOptimizer):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2)."""

    states = ("exp_avg",)

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """p <- (1 - lr wd) p - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g."""
        (first, second), rate = group["betas"], group["lr"]
        scalars = (1 - rate * group["weight_decay"], rate, first, 1 - first, second, 1 - second)
        apply(rules.lion, [master, master.grad, *self.states_of(master)], scalars, (0, 2))


class DecoupledSgd(ShardedOptimizer):
    """SGDW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 1): the decay is outside of the
    momentum buffer."""

    config: Sgdw
    states = ("momentum_buffer",)

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """m <- mu m + g; p <- (1 - lr wd) p - lr m (Nesterov: g + mu m)."""
        momentum, rate = group["betas"][0], group["lr"]
        scalars = (1 - rate * group["weight_decay"], rate, momentum)
        rule = rules.sgdw_nesterov if self.config.nesterov else rules.sgdw
        apply(rule, [master, master.grad, *self.states_of(master)], scalars, (0, 2))


class RmsPropRule(ShardedOptimizer):
    """RMSprop (Tieleman and Hinton 2012), not centred, with L2 decay, as torch.optim.RMSprop."""

    config: RmsProp

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """v <- a v + (1 - a) g^2; p <- p - lr g / (sqrt v + eps), through a momentum if any."""
        alpha = self.config.alpha
        scalars = (group["weight_decay"], group["lr"], alpha, 1 - alpha, self.config.epsilon)
        if self.config.momentum:
            states = self.states_of(master, ("square_avg", "momentum_buffer"))
            scalars = (*scalars, group["betas"][0])
            apply(rules.rmsprop_momentum, [master, master.grad, *states], scalars, (0, 2, 3))
        else:
            states = self.states_of(master, ("square_avg",))
            apply(rules.rmsprop, [master, master.grad, *states], scalars, (0, 2))


class Adadelta(ShardedOptimizer):
    """Adadelta (Zeiler, arXiv 1212.5701), with L2 decay, as torch.optim.Adadelta."""

    states = ("square_avg", "acc_delta")

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """p <- p - lr g sqrt(d + eps) / sqrt(v + eps), d the running mean of squared updates."""
        rho, epsilon = self.config.rho, self.config.epsilon
        scalars = (group["weight_decay"], group["lr"], rho, 1 - rho, epsilon)
        apply(rules.adadelta, [master, master.grad, *self.states_of(master)], scalars, (0, 2, 3))


class AdEmaMixRule(ShardedOptimizer):
    """AdEMAMix (Pagliardini et al., arXiv 2409.03137, algorithm 1)."""

    config: AdEmaMix
    states = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """AdamW with m / (1 - b1^t) + a m_slow in place of the first moment."""
        (first, second), rate = group["betas"], group["lr"]
        slow, weight = self._slow(group["steps"], first)
        correct1, correct2 = adam_corrections(group)
        scalars = (1 - rate * group["weight_decay"], rate, first, 1 - first, slow, 1 - slow,
                   second, 1 - second, weight, correct1, correct2, self.config.epsilon)  # fmt: skip
        apply(rules.ademamix, [master, master.grad, *self.states_of(master)], scalars, (0, 2, 3, 4))

    def _slow(self, step: int, first: float) -> tuple[float, float]:
        """Slow beta and its weight at a step: the weight grows linearly from 0, the half-life
        log(1/2) / log(beta) from that of the first beta."""
        final, warmup = self.config.slow_beta, self.config.warmup_steps
        if step >= warmup:
            return final, self.config.slow_weight
        share = step / warmup
        fast, slow = math.log(max(first, 1e-8)), math.log(final)
        beta = math.exp(fast * slow / ((1 - share) * slow + share * fast))
        return min(beta, final), self.config.slow_weight * share


class ScheduleFree(ShardedOptimizer):
    """Schedule-Free AdamW and SGD (Defazio et al., arXiv 2405.15682).

    Masters are y, where gradients are taken; z takes the plain steps. `eval()` turns the masters
    into the average x, `train()` back, to rounding; a step in between is an error.
    """

    config: ScheduleFreeAdamW | ScheduleFreeSgd

    def __init__(self, shards: Shards, config: OptimizerSection) -> None:
        super().__init__(shards, config)
        self._adam = isinstance(config, ScheduleFreeAdamW)
        for group in self.param_groups:
            group.update(weight_sum=0.0, largest_rate=0.0)
        self.training = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Refused, without a trace, while the masters are x."""
        if not self.training:
            raise RuntimeError("the weights are the averaged ones: call train() before a step")
        super().step()

    def update_master(self, master: Tensor, group: dict[str, Any]) -> None:
        """z <- z - lr d; x <- (1 - c) x + c z; y <- (1 - b1) z + b1 x, where d is the direction
        with the decay of y in it, and c the share of this step's weight in all weights so far."""
        (first, second), rate = group["betas"], group["lr"]
        share = group["share"]
        z, *square = self._own_states(master)
        scalars = (group["weight_decay"], rate, share, 1 - share, rate * (first * (1 - share) - 1))
        if self._adam:
            correct = adam_corrections(group)[1]
            scalars = (*scalars, second, 1 - second, correct, self.config.epsilon)
            apply(rules.schedule_free_adamw, [master, master.grad, z, *square], scalars, (0, 2, 3))
        else:
            apply(rules.schedule_free_sgd, [master, master.grad, z], scalars, (0, 2))

    def update(self, groups: list[dict[str, Any]]) -> None:
        """Weigh the step, then update."""
        for group in self.param_groups:
            group["largest_rate"] = max(group["largest_rate"], group["lr"])
            weight = group["steps"] ** self.config.averaging_power
            weight *= group["largest_rate"] ** self.config.rate_power
            group["weight_sum"] += weight
            group["share"] = weight / group["weight_sum"] if weight else 0.0
        super().update(groups)

    def eval(self) -> None:
        """Turn the masters into x; nothing if they are."""
        if self.training:
            self._move(lambda first: 1 - 1 / first)
        self.training = False

    def train(self) -> None:
        """Turn the masters into y; nothing if they are."""
        if not self.training:
            self._move(lambda first: 1 - first)
        self.training = True

    def _move(self, weight: Any) -> None:
        for group in self.param_groups:
            for master in group["params"]:
                master.detach().lerp_(self._own_states(master)[0], weight(group["betas"][0]))

    def _own_states(self, master: Tensor) -> list[Tensor]:
        """z, which begins at the weights, and the second moment if there is one."""
        if "z" not in self.state[master]:
            self.state[master]["z"] = master.detach().clone()
        return self.states_of(master, ("z", "exp_avg_sq") if self._adam else ("z",))
