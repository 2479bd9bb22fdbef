"""Curves: values as closed forms of the samples consumed. No torch, no state.

They serve as learning rates, weight decays, momenta and clip norms. `samples` may be any number, so
a schedule that others count in steps is the same curve with samples = steps x batch.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

Curve = Callable[[float], float]

# What is left of a descent at progress 0..1.
FORMS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    # arXiv 2405.18392: better than linear for the cool-down after a constant rate
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, samples: float) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Anneal:
    """From `first` until `begin` to `last` from `end` on, in one of FORMS between.

    As "cosine" this is the decay of BLOOM; with a late `begin` it is warm-up-stable-decay.
    """

    begin: float
    end: float
    first: float
    last: float
    form: str = "cosine"

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        if samples > self.end:
            return self.last
        if samples <= self.begin:
            return self.first
        progress = (samples - self.begin) / (self.end - self.begin)
        return self.last + FORMS[self.form](progress) * (self.first - self.last)


@dataclass(frozen=True)
class Warmup:
    """Linear from 0 to `peak` over the first `length` samples, `then` another curve."""

    peak: float
    length: float
    then: Curve

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        if samples <= self.length and self.length > 0:
            return self.peak * samples / self.length
        return self.then(samples)


@dataclass(frozen=True)
class Cooldown:
    """`before` until `begin`, from there to `last` at `end`."""

    before: Curve
    begin: float
    end: float
    last: float
    form: str

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        if samples <= self.begin:
            return self.before(samples)
        return Anneal(self.begin, self.end, self.before(self.begin), self.last, self.form)(samples)


@dataclass(frozen=True)
class Drops:
    """`peak` times `factor` at each of `milestones` (from that sample on)."""

    peak: float
    factor: float
    milestones: tuple[int, ...]

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        return self.peak * self.factor ** bisect_right(self.milestones, samples)


@dataclass(frozen=True)
class Exponential:
    """`peak` times `factor` every `every` samples after `begin`, smoothly or, as step, at once."""

    peak: float
    factor: float
    begin: float
    every: float
    at_once: bool = False

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        times = max(0.0, samples - self.begin) / self.every
        return self.peak * self.factor ** (math.floor(times) if self.at_once else times)


@dataclass(frozen=True)
class Power:
    """`peak` until `timescale`, then falling to `floor` as (samples / timescale)^exponent.

    Exponent -1/2 with timescale = warm-up is the inverse square root of arXiv 1706.03762; -0.51 is
    the power scheduler of arXiv 2408.13359, whose amplitude a (for peak = a tokens^b) is
    peak / timescale_tokens^b.
    """

    peak: float
    floor: float
    exponent: float
    timescale: float

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        if samples <= self.timescale:
            return self.peak
        left = (samples / self.timescale) ** self.exponent
        return self.floor + (self.peak - self.floor) * left


@dataclass(frozen=True)
class Cyclic:
    """Between `floor` and `peak`: `rise` samples up, `fall` down, from `begin` on (Smith, arXiv
    1506.01186). The height of cycle number k = 1, 2, ... is full ("triangular"), 2^(1-k)
    ("triangular2"), or falls smoothly by `factor` a cycle ("exp_range")."""

    floor: float
    peak: float
    begin: float
    rise: float
    fall: float
    mode: str = "triangular"
    factor: float = 1.0

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        cycles, position = divmod(max(0.0, samples - self.begin), self.rise + self.fall)
        up = position <= self.rise
        height = position / self.rise if up else 1.0 - (position - self.rise) / self.fall
        if self.mode == "triangular2":
            height *= 0.5**cycles
        elif self.mode == "exp_range":
            height *= self.factor ** (cycles + position / (self.rise + self.fall))
        return self.floor + (self.peak - self.floor) * height


@dataclass(frozen=True)
class Restarts:
    """Half a cosine from `peak` to `floor` in each `cycle` samples, from `begin` on (arXiv
    1608.03983); with floor 0 the schedule of snapshot ensembles (arXiv 1704.00109)."""

    peak: float
    floor: float
    begin: float
    cycle: float

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        position = max(0.0, samples - self.begin) % self.cycle
        return Anneal(0, self.cycle, self.peak, self.floor, "cosine")(position)


@dataclass(frozen=True)
class Phases:
    """Anneals one after another: `edges` are (sample, value) with the value reached there."""

    edges: tuple[tuple[float, float], ...]
    form: str

    def __call__(self, samples: float) -> float:
        """Value after `samples` samples."""
        after = bisect_right(self.edges, samples, key=lambda edge: edge[0])
        if after == 0:
            return self.edges[0][1]
        if after == len(self.edges):
            return self.edges[-1][1]
        (begin, first), (end, last) = self.edges[after - 1 : after + 1]
        return Anneal(begin, end, first, last, self.form)(samples)


def one_cycle(
    ends: tuple[float, ...], values: tuple[float, ...], begin: float, form: str
) -> Phases:
    """One cycle of a rate or momentum (Smith, arXiv 1803.09820): `values` at `begin` and `ends`."""
    return Phases(tuple(zip((begin, *ends), values, strict=True)), form)
