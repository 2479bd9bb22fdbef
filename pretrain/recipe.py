"""The recipe: learning rate, batch size and length of a run as pure functions of the token clock.

No torch, no state: whatever a step needs is computed from the clock, so there is no scheduler to
save and a resumed run cannot be off by one. Semantics are those of the BLOOM run (`learning_rates`
and `microbatches` of Megatron-DeepSpeed), reproduced to the digit.

BLOOM's oddity, decided here: the rate of an update is a function of the samples consumed *before*
it, so the first update has rate 0; the rate printed in BLOOM's logs is that *after* the step. The
run uses the former (`Recipe.at`); `Recipe.learning_rate_at` gives both.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


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

    @property
    def settings(self) -> dict[str, object]:
        """What the optimizer must report back as applied."""
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": self.betas,
        }


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up to `peak`, then half a cosine down to `floor`; horizons in samples."""

    peak: float
    floor: float
    warmup_samples: int
    decay_samples: int

    def __call__(self, samples: int) -> float:
        """Learning rate after `samples` samples."""
        if samples <= self.warmup_samples and self.warmup_samples > 0:
            return self.peak * samples / self.warmup_samples
        if samples > self.decay_samples:
            return self.floor
        span = self.decay_samples - self.warmup_samples
        progress = (samples - self.warmup_samples) / span if span else 1.0
        return self.floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (self.peak - self.floor)


@dataclass(frozen=True)
class LinearRamp:
    """A global batch that grows from `start` to `final` by `increment` over `ramp_samples`.

    The batch of a step follows from the samples consumed before it. `stages` is the closed form:
    one row per batch size, so all conversions are a bisection, whatever the length of the run.
    """

    start: int
    final: int
    increment: int = 1
    ramp_samples: int = 0

    def __call__(self, samples: int) -> int:
        """Rows of the batch of the step that begins after `samples` samples."""
        increments = (self.final - self.start) // self.increment
        if samples > self.ramp_samples or increments == 0 or self.ramp_samples == 0:
            return self.final
        # Exact integers; Megatron divides by a float, which agrees except where the exact quotient
        # is a whole number that the float misses.
        return self.start + self.increment * (samples * increments // self.ramp_samples)

    @cached_property
    def stages(self) -> list[tuple[int, int, int]]:
        """(first step, samples consumed before it, batch) of each batch size, in order."""
        rows, step, samples = [], 0, 0
        increments = (self.final - self.start) // self.increment
        while (batch := self(samples)) < self.final:
            rows.append((step, samples, batch))
            reached = (batch - self.start) // self.increment
            edge = -(-(reached + 1) * self.ramp_samples // increments)  # first sample of the next
            steps = -(-(edge - samples) // batch)
            step, samples = step + steps, samples + steps * batch
        rows.append((step, samples, self.final))
        return rows

    def samples_at(self, step: int) -> int:
        """Samples consumed before step `step` (counted from 0)."""
        row = bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1
        first_step, first_samples, batch = self.stages[row]
        return first_samples + (step - first_step) * batch

    def step_at(self, samples: int) -> int:
        """Number of whole steps that fit into `samples` samples; inverse of `samples_at`."""
        row = bisect_right(self.stages, samples, key=lambda stage: stage[1]) - 1
        first_step, first_samples, batch = self.stages[row]
        return first_step + (samples - first_samples) // batch


@dataclass(frozen=True)
class Recipe:
    """A run as a pure function of its clock."""

    sequence_length: int
    train_samples: int
    learning_rate: WarmupCosine
    batch: LinearRamp
    weight_decay: float
    betas: tuple[float, float]

    def at(self, clock: Clock) -> StepPlan:
        """The plan of the step that begins at `clock`."""
        return StepPlan(
            self.batch(clock.samples),
            self.learning_rate(clock.samples),
            self.weight_decay,
            self.betas,
        )

    def after(self, clock: Clock, plan: StepPlan) -> Clock:
        """The clock once the step planned by `plan` is over."""
        samples = clock.samples + plan.batch_samples
        return Clock(clock.step + 1, samples, samples * self.sequence_length)

    def done(self, clock: Clock) -> bool:
        """Whether the next whole batch would exceed the budget (BLOOM drops the partial batch)."""
        return clock.step >= self.total_steps

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.batch.step_at(self.train_samples)

    @cached_property
    def total_samples(self) -> int:
        """Samples that the whole steps of the run consume, at most `train_samples`."""
        return self.batch.samples_at(self.total_steps)

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
        return self.learning_rate(before), self.learning_rate(after)
