"""The recipe: all settings of a step, and the length of the run, as pure functions of the clock.

No torch, no state: whatever a step needs is computed from the clock, so there is no scheduler to
save and a resumed run cannot be off by one. Semantics are those of the BLOOM run (`learning_rates`
and `microbatches` of Megatron-DeepSpeed), reproduced to the digit.

BLOOM's oddity, decided here: the rate of an update is a function of the samples consumed *before*
it, so the first update has rate 0; the rate printed in BLOOM's logs is that *after* the step. The
run uses the former (`Recipe.at`); `Recipe.learning_rate_at` gives both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from pretrain.batches import BatchSchedule
from pretrain.curves import Curve


@dataclass(frozen=True)
class Clock:
    """What the run has consumed so far. `step` counts finished steps, skipped ones included."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class StepPlan:
    """Everything one step needs to know: rows of the global batch and optimizer settings."""

    batch_samples: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    clip_norm: float  # global L2 norm to which gradients are cut; 0: never

    @property
    def settings(self) -> dict[str, object]:
        """What the optimizer must report back as applied."""
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": self.betas,
        }


# How the best rate grows with the batch b, up to a factor; c is the critical batch.
SCALING_RULES: dict[str, Callable[[float, float], float]] = {
    "none": lambda b, c: 1.0,
    "linear": lambda b, c: b,
    "sqrt": lambda b, c: math.sqrt(b),
    "linear-then-sqrt": lambda b, c: min(b, c) * math.sqrt(max(1.0, b / c)),
    # McCandlish 2018, arXiv 1812.06162, equation 2.10: eps_max / (1 + B_noise / B)
    "noise-scale": lambda b, c: 1.0 / (1.0 + c / b),
}


@dataclass(frozen=True)
class Scaling:
    """Carries settings that were tuned at `base_batch` over to another batch.

    `exponent` is applied to the rate's factor (1/2 for Adam with rule "noise-scale"). With
    `along_ramp` the batch is that of each step, else the final one. `betas` keeps their half-lives
    in tokens (arXiv 2507.07101): beta^(batch / base). `weight_decay` keeps that of the weights,
    whose decay in a step is rate x decay.
    """

    rule: str = "none"
    base_batch: int = 1
    critical_batch: float = 1.0
    exponent: float = 1.0
    along_ramp: bool = False
    betas: bool = False
    weight_decay: bool = False

    def rate_factor(self, batch: int) -> float:
        """What the rate at `base_batch` is multiplied by at `batch`."""
        rule, critical = SCALING_RULES[self.rule], self.critical_batch
        return (rule(batch, critical) / rule(self.base_batch, critical)) ** self.exponent

    def apply(self, plan: StepPlan, batch: int) -> StepPlan:
        """`plan`, made for `base_batch`, with the settings for `batch`."""
        growth, factor = batch / self.base_batch, self.rate_factor(batch)
        first, second = plan.betas
        return replace(
            plan,
            learning_rate=plan.learning_rate * factor,
            betas=(first**growth, second**growth) if self.betas else plan.betas,
            weight_decay=plan.weight_decay * (growth / factor if self.weight_decay else 1.0),
        )


@dataclass(frozen=True)
class Recipe:
    """A run as a pure function of its clock; curves are those of `pretrain.curves`.

    `rate_follows_batch` multiplies the rate by batch / first batch: with a batch that grows in
    place of the rate's drops, what remains of a drop is what the batch did not take over.
    """

    sequence_length: int
    train_samples: int
    batch: BatchSchedule
    learning_rate: Curve
    weight_decay: Curve
    momentum: Curve  # beta1
    beta2: float
    clip_norm: Curve
    scaling: Scaling | None = None
    rate_follows_batch: bool = False

    def at(self, clock: Clock) -> StepPlan:
        """The plan of the step that begins at `clock`."""
        return self._plan(clock.samples)

    def _plan(self, samples: int) -> StepPlan:
        batch = self.batch(samples)
        rate = self.learning_rate(samples)
        if self.rate_follows_batch:
            rate *= batch / self.batch(0)
        plan = StepPlan(
            batch,
            rate,
            self.weight_decay(samples),
            (self.momentum(samples), self.beta2),
            self.clip_norm(samples),
        )
        if self.scaling is None:
            return plan
        return self.scaling.apply(plan, batch if self.scaling.along_ramp else self.batch.final)

    def after(self, clock: Clock, plan: StepPlan) -> Clock:
        """The clock once the step planned by `plan` is over."""
        samples = clock.samples + plan.batch_samples
        return Clock(clock.step + 1, samples, samples * self.sequence_length)

    def done(self, clock: Clock) -> bool:
        """Whether the next whole batch would exceed the budget (BLOOM drops the partial batch)."""
        return clock.samples + self.batch(clock.samples) > self.train_samples

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.batch.step_at(self.train_samples)

    @cached_property
    def total_samples(self) -> int:
        """Samples that the whole steps of the run consume, at most `train_samples`."""
        return self.batch.samples_at(self.total_steps)

    @property
    def stages(self) -> list[tuple[Clock, int, int]]:
        """(clock at its begin, steps, batch) of each batch of the run, in order."""
        rows = [row for row in self.batch.stages if row[0] < self.total_steps]
        ends = [*(row[0] for row in rows[1:]), self.total_steps]
        return [
            (Clock(step, samples, samples * self.sequence_length), end - step, batch)
            for (step, samples, batch), end in zip(rows, ends, strict=True)
        ]

    def clock_at(
        self, *, step: int | None = None, samples: int | None = None, tokens: int | None = None
    ) -> Clock:
        """The clock after `step` steps, or the last one within a number of samples or tokens."""
        if tokens is not None:
            samples = tokens // self.sequence_length
        if samples is not None:
            step = self.batch.step_at(samples)
        if step is None:
            raise ValueError("give step, samples or tokens")
        samples = self.batch.samples_at(step)
        return Clock(step, samples, samples * self.sequence_length)

    def learning_rate_at(self, step: int) -> tuple[float, float]:
        """(rate applied by, rate logged after) the step with number `step`, counted from 1."""
        before, after = self.batch.samples_at(step - 1), self.batch.samples_at(step)
        return self._plan(before).learning_rate, self._plan(after).learning_rate
