"""Learning rates in a run config: each shape is a section that knows its keys and builds its curve.

`Axis` converts all horizons to samples, once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pretrain.batches import BatchSchedule
from pretrain.config_base import Fraction, Positive, PositiveNumber, Rate, Section, union_by
from pretrain.curves import (
    Anneal,
    Constant,
    Cooldown,
    Curve,
    Cyclic,
    Drops,
    Exponential,
    Power,
    Restarts,
    Warmup,
    one_cycle,
)
from pretrain.quantities import Horizon

Factor = Annotated[float, Field(gt=0, lt=1)]
Form = Literal["linear", "cosine", "sqrt"]


@dataclass(frozen=True)
class Axis:
    """Converts horizons to samples. Steps need the batch schedule, epochs `epoch_tokens()`, which
    is asked only for them, since it may have to look at the shards."""

    sequence_length: int
    epoch_tokens: Callable[[], int | None]
    batch: BatchSchedule
    train_samples: int = 0

    def __call__(self, horizon: Horizon) -> int:
        """Whole samples of `horizon`, a remainder dropped; ValueError where they are unknown."""
        if horizon.unit == "steps":
            return self.batch.samples_at(horizon.value)
        if horizon.unit == "epochs":
            tokens = self.epoch_tokens()
            if tokens is None:
                raise ValueError("epochs need data.epoch_tokens")
            return horizon.value * tokens // self.sequence_length
        return horizon.samples(self.sequence_length)

    def end(self, decay: Horizon | None) -> int:
        """`decay`, by default the end of the run."""
        return self.train_samples if decay is None else self(decay)


class Shape(Section):
    """Any learning rate: warm-up from 0, then the shape. The rate of an update is that of the
    samples consumed before it, so with a warm-up the first update has rate 0 (as in BLOOM)."""

    peak: PositiveNumber
    warmup: Horizon = Horizon(0, "tokens")

    def curve(self, axis: Axis) -> Curve:
        """The whole curve, warm-up included."""
        begin = axis(self.warmup)
        then = self.after_warmup(begin, axis)
        return Warmup(self.first(), begin, then) if begin else then

    def first(self) -> float:
        """The rate that the warm-up reaches."""
        return self.peak

    def after_warmup(self, begin: int, axis: Axis) -> Curve:
        """The curve from `begin` on: constant, unless a shape says otherwise."""
        return Constant(self.peak)

    def momentum_curve(self, axis: Axis) -> Curve | None:
        """Of shapes that cycle the momentum too."""
        return None


class _Decay(Shape):
    floor: Rate = 0.0
    decay: Horizon | None = Field(
        None, description="where the floor is reached; default: the end of the run"
    )


class Cosine(_Decay):
    """Half a cosine from the peak to the floor (BLOOM)."""

    shape: Literal["cosine", "linear"] = "cosine"

    def after_warmup(self, begin: int, axis: Axis) -> Curve:
        """See `Shape`."""
        return Anneal(begin, axis.end(self.decay), self.peak, self.floor, self.shape)


class Linear(Cosine):
    """A straight line from the peak to the floor."""

    shape: Literal["linear"] = "linear"


class _WithCooldown(_Decay):
    """Shapes without an end of their own may be given one."""

    cooldown: Horizon | None = Field(
        None, description="length of a last descent to the floor, which ends at decay"
    )
    cooldown_form: Form = Field("sqrt", description="sqrt is 1 - sqrt (arXiv 2405.18392)")

    def after_warmup(self, begin: int, axis: Axis) -> Curve:
        """See `Shape`."""
        main = self.main(begin, axis)
        if self.cooldown is None:
            return main
        end = axis.end(self.decay)
        return Cooldown(main, end - axis(self.cooldown), end, self.floor, self.cooldown_form)

    def main(self, begin: int, axis: Axis) -> Curve:
        """The curve until the cool-down."""
        return Constant(self.peak)


class ConstantRate(_WithCooldown):
    """The peak throughout, or until a cool-down."""

    shape: Literal["constant"] = "constant"


class Wsd(_WithCooldown):
    """Warm-up, stable, decay: constant until a cool-down (arXiv 2404.06395)."""

    shape: Literal["wsd"] = "wsd"
    cooldown: Horizon = Field(description="length of the descent to the floor, ends at decay")


class InverseSqrt(_WithCooldown):
    """The peak until `timescale`, then falling as 1 / sqrt (arXiv 1706.03762)."""

    shape: Literal["inverse-sqrt"] = "inverse-sqrt"
    timescale: Horizon | None = Field(None, description="default: the warm-up")

    def main(self, begin: int, axis: Axis) -> Curve:
        """See `_WithCooldown`."""
        return Power(self.peak, self.floor, -0.5, axis(self.timescale or self.warmup))


class PowerLaw(_WithCooldown):
    """The peak until `timescale`, then a power of the tokens (arXiv 2408.13359)."""

    shape: Literal["power"] = "power"
    exponent: Annotated[float, Field(lt=0)] = -0.51
    timescale: Horizon = Field(description="where the power law begins to fall below the peak")

    def main(self, begin: int, axis: Axis) -> Curve:
        """See `_WithCooldown`."""
        return Power(self.peak, self.floor, self.exponent, axis(self.timescale))


class Step(_WithCooldown):
    """Times `factor` every `every` after the warm-up."""

    shape: Literal["step"] = "step"
    factor: Factor = 0.5
    every: Horizon

    def main(self, begin: int, axis: Axis) -> Curve:
        """See `_WithCooldown`."""
        return Exponential(self.peak, self.factor, begin, axis(self.every), at_once=True)

    def drops(self, axis: Axis) -> Iterator[int]:
        """Samples at which the rate drops, without end."""
        drop, every = axis(self.warmup), axis(self.every)
        while True:
            drop += every
            yield drop


class MultiStep(_WithCooldown):
    """Times `factor` at each of `milestones`."""

    shape: Literal["multi-step"] = "multi-step"
    factor: Factor = 0.1
    milestones: Annotated[tuple[Horizon, ...], Field(min_length=1)]

    def main(self, begin: int, axis: Axis) -> Curve:
        """See `_WithCooldown`."""
        return Drops(self.peak, self.factor, tuple(self.drops(axis)))

    def drops(self, axis: Axis) -> Iterator[int]:
        """Samples at which the rate drops."""
        return (axis(milestone) for milestone in self.milestones)


class ExponentialDecay(_WithCooldown):
    """Falls smoothly by `factor` every `every`."""

    shape: Literal["exponential"] = "exponential"
    factor: Factor
    every: Horizon

    def main(self, begin: int, axis: Axis) -> Curve:
        """See `_WithCooldown`."""
        return Exponential(self.peak, self.factor, begin, axis(self.every))


class CyclicRate(Shape):
    """Up from the floor to the peak and down again, over and over (Smith, arXiv 1506.01186)."""

    shape: Literal["cyclic"] = "cyclic"
    floor: Rate
    rise: Horizon = Field(description="length of the way up")
    fall: Horizon | None = Field(None, description="length of the way down; default: as up")
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    factor: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of mode exp_range: what the height is multiplied by over a cycle"
    )

    def first(self) -> float:
        """See `Shape`."""
        return self.floor

    def after_warmup(self, begin: int, axis: Axis) -> Curve:
        """See `Shape`."""
        rise, fall = axis(self.rise), axis(self.fall or self.rise)
        return Cyclic(self.floor, self.peak, begin, rise, fall, self.mode, self.factor)


class OneCycle(Shape):
    """Up to the peak and down to nearly 0, once, the momentum inversely (Smith, arXiv 1803.09820);
    beta2 is left alone."""

    shape: Literal["one-cycle"] = "one-cycle"
    rise: Horizon = Field(description="length of the way up (usual: 0.3 of the run)")
    decay: Horizon | None = Field(None, description="where it ends; default: the end of the run")
    initial_divisor: PositiveNumber = Field(25.0, description="it begins at peak / this")
    final_divisor: PositiveNumber = Field(1e4, description="it ends at the first rate / this")
    form: Literal["cosine", "linear"] = "cosine"
    three_phase: bool = Field(False, description="down to the first rate as slowly as up to it")
    cycle_momentum: bool = Field(True, description="false leaves optimizer.betas alone")
    momentum: tuple[Fraction, Fraction] = Field(
        (0.85, 0.95), description="first beta at the peak and at the ends"
    )

    def first(self) -> float:
        """See `Shape`."""
        return self.peak / self.initial_divisor

    def _ends(self, begin: int, axis: Axis) -> tuple[float, ...]:
        rise, end = axis(self.rise), axis.end(self.decay)
        middle = (begin + 2 * rise,) if self.three_phase else ()
        return (begin + rise, *middle, end)

    def after_warmup(self, begin: int, axis: Axis) -> Curve:
        """See `Shape`."""
        first = self.first()
        values = (first, self.peak, *((first,) if self.three_phase else ()))
        return one_cycle(
            self._ends(begin, axis), (*values, first / self.final_divisor), begin, self.form
        )

    def momentum_curve(self, axis: Axis) -> Curve | None:
        """See `Shape`."""
        if not self.cycle_momentum:
            return None
        low, high = self.momentum
        begin = axis(self.warmup)
        values = (high, low, high, *((high,) if self.three_phase else ()))
        return one_cycle(self._ends(begin, axis), values, begin, self.form)


class CosineRestarts(_Decay):
    """Half a cosine again and again, a snapshot at the end of each (arXiv 1704.00109)."""

    shape: Literal["cosine-restarts"] = "cosine-restarts"
    cycles: Positive = Field(description="how many there are until decay")

    def after_warmup(self, begin: int, axis: Axis) -> Curve:
        """See `Shape`."""
        return Restarts(self.peak, self.floor, begin, self.cycle(axis))

    def cycle(self, axis: Axis) -> int:
        """Samples of a cycle: whole batches where the batch is constant."""
        span, batch = axis.end(self.decay) - axis(self.warmup), axis.batch.final
        unit = batch if len(axis.batch.edges) == 1 and span % batch == 0 else 1
        return -(-span // unit // self.cycles) * unit


LearningRate = union_by(
    "shape", Cosine, Linear, ConstantRate, Wsd, InverseSqrt, PowerLaw, Step, MultiStep,
    ExponentialDecay, CyclicRate, OneCycle, CosineRestarts,
)  # fmt: skip
