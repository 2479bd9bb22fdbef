"""The recipe's part of a run config, and the recipe that it builds.

Learning rates are in `config_rates.py`; batch schedules, too, are sections that build themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from pretrain.batches import (
    BatchSchedule,
    held,
    in_place_of_drops,
    linear_ramp,
    linear_ramp_in_steps,
)
from pretrain.config_base import Positive, PositiveNumber, Rate, Section, union_by
from pretrain.config_rates import Axis, Form, LearningRate, MultiStep, Shape, Step
from pretrain.curves import Anneal, Constant, Curve
from pretrain.quantities import Horizon
from pretrain.recipe import Recipe, Scaling


class RampBatch(Section):
    """Constant, or growing linearly from `start` to `final` (BLOOM)."""

    schedule: Literal["ramp"] = "ramp"
    final: Positive
    start: Positive | None = Field(None, description="default: final, so a constant batch")
    increment: Positive | None = None
    ramp: Horizon | None = Field(None, description="length of the growth")

    def build(self, axis: Axis, rate: Shape) -> BatchSchedule:
        """The schedule; `axis` knows no batch yet."""
        start, increment = self.start or self.final, self.increment or 1
        if self.ramp is None:
            return linear_ramp(start, self.final)
        if self.ramp.unit == "steps":
            return linear_ramp_in_steps(start, self.final, increment, self.ramp.value)
        return linear_ramp(start, self.final, increment, axis(self.ramp))


class BatchStage(Section):
    """From `begins` on a step takes `samples`."""

    begins: Horizon
    samples: Positive


class TableBatch(Section):
    """A batch for each stretch of the run."""

    schedule: Literal["table"] = "table"
    stages: Annotated[tuple[BatchStage, ...], Field(min_length=1)]

    def build(self, axis: Axis, rate: Shape) -> BatchSchedule:
        """The schedule; a threshold in steps is converted by the stages before it."""
        edges: list[tuple[int, int]] = []
        for stage in self.stages:
            before = BatchSchedule(tuple(edges or [(0, stage.samples)]))
            edges.append((replace(axis, batch=before)(stage.begins), stage.samples))
        return BatchSchedule(tuple(edges))


class ListBatch(Section):
    """A list of batches, each held for a while, the last to the end."""

    schedule: Literal["list"] = "list"
    samples: Annotated[tuple[Positive, ...], Field(min_length=1)]
    hold: Horizon = Horizon(1, "steps")

    def build(self, axis: Axis, rate: Shape) -> BatchSchedule:
        """The schedule."""
        if self.hold.unit == "steps":
            return held(self.samples, None, self.hold.value)
        return held(self.samples, axis(self.hold), None)


class GrowingBatch(Section):
    """Grows where the rate (shape step or multi-step) would drop, which then stays (Smith 2018,
    "don't decay the learning rate, increase the batch size", arXiv 1711.00489)."""

    schedule: Literal["instead-of-decay"] = "instead-of-decay"
    start: Positive
    largest: Positive = Field(description="from here on the rate drops after all")

    def build(self, axis: Axis, rate: Shape) -> BatchSchedule:
        """The schedule; the drops of `rate` in steps are those with the constant first batch."""
        if not isinstance(rate, Step | MultiStep):
            raise ValueError("schedule 'instead-of-decay' needs shape step or multi-step")
        axis = replace(axis, batch=self.constant())
        drops: list[int] = []
        for drop in rate.drops(axis):
            if self.start / rate.factor ** len(drops) >= self.largest:
                break
            drops.append(drop)
        return in_place_of_drops(self.start, self.largest, rate.factor, drops)

    def constant(self) -> BatchSchedule:
        """The batch that the given rate was meant for."""
        return linear_ramp(self.start, self.start)


class Change(Section):
    """A constant of the optimizer that changes during the run, from what `optimizer` says."""

    to: Rate
    begins: Horizon = Horizon(0, "tokens")
    ends: Horizon | None = Field(None, description="default: the end of the run")
    form: Form = "linear"

    def curve(self, first: float, axis: Axis) -> Curve:
        """From `first` to `to`."""
        return Anneal(axis(self.begins), axis.end(self.ends), first, self.to, self.form)


class ScalingSection(Section):
    """Carries rate, betas and decay, tuned at `base_batch`, over to the batch of this run."""

    rule: Literal["none", "linear", "sqrt", "linear-then-sqrt", "noise-scale"] = Field(
        description="how the rate grows with the batch; noise-scale is 1 / (1 + critical / batch)"
    )
    base_batch: Positive = Field(description="samples of the batch that the rate was tuned at")
    critical_batch: PositiveNumber | None = Field(
        None, description="samples; of rules linear-then-sqrt and noise-scale"
    )
    exponent: PositiveNumber = Field(
        1.0, description="of the rate's factor; with noise-scale 1 suits SGD, 0.5 Adam"
    )
    along_ramp: bool = Field(False, description="at the batch of each step, not at the final one")
    betas: bool = Field(False, description="keep the betas' half-lives in tokens")
    weight_decay: bool = Field(False, description="keep the decay's half-life in tokens")

    def build(self) -> Scaling:
        """The rule."""
        return Scaling(**(self.model_dump() | {"critical_batch": self.critical_batch or 1.0}))


Batch = union_by("schedule", RampBatch, TableBatch, ListBatch, GrowingBatch)


class RecipeSection(Section):
    """Length, learning rate and batch of the run, on the token clock."""

    train: Horizon = Field(description="length of the run; a partial last batch is dropped")
    learning_rate: LearningRate
    batch: Batch
    scaling: ScalingSection | None = None
    weight_decay: Change | None = Field(None, description="from optimizer.weight_decay")
    momentum: Change | None = Field(None, description="from optimizer.betas, the first")
    clip_norm: Change | None = Field(None, description="from optimizer.clip_norm")


@dataclass(frozen=True)
class Constants:
    """What the optimizer's section says of the settings that a recipe governs."""

    weight_decay: float
    betas: tuple[float, float]
    clip_norm: float


def recipe_axis(
    section: RecipeSection, sequence_length: int, epoch_tokens: Callable[[], int | None]
) -> Axis:
    """The axis of a recipe, which knows its batch schedule and its length."""
    axis = Axis(sequence_length, epoch_tokens, linear_ramp(1, 1))
    axis = replace(axis, batch=section.batch.build(axis, section.learning_rate))
    return replace(axis, train_samples=axis(section.train))


def build_recipe(
    section: RecipeSection,
    sequence_length: int,
    epoch_tokens: Callable[[], int | None],
    constants: Constants,
) -> Recipe:
    """The recipe with all horizons converted to samples."""
    rate, axis = section.learning_rate, recipe_axis(section, sequence_length, epoch_tokens)
    grows = isinstance(section.batch, GrowingBatch)
    # A rate whose drops the batch takes over is the one that a constant batch would have had.
    rate_axis = replace(axis, batch=section.batch.constant()) if grows else axis

    def change(name: str, value: float) -> Curve:
        found: Change | None = getattr(section, name)
        return found.curve(value, axis) if found else Constant(value)

    return Recipe(
        sequence_length=sequence_length,
        train_samples=axis.train_samples,
        batch=axis.batch,
        learning_rate=rate.curve(rate_axis),
        weight_decay=change("weight_decay", constants.weight_decay),
        momentum=rate.momentum_curve(axis) or change("momentum", constants.betas[0]),
        beta2=constants.betas[1],
        clip_norm=change("clip_norm", constants.clip_norm),
        scaling=section.scaling.build() if section.scaling else None,
        rate_follows_batch=grows,
    )


def horizons(section: Section, prefix: str) -> Iterator[tuple[str, Horizon]]:
    """Every horizon in a section and in those inside it, with its key."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, tuple):
            parts = [(f"{prefix}.{name}.{index}", part) for index, part in enumerate(value)]
        else:
            parts = [(f"{prefix}.{name}", value)]
        for key, part in parts:
            if isinstance(part, Horizon):
                yield key, part
            elif isinstance(part, Section):
                yield from horizons(part, key)
