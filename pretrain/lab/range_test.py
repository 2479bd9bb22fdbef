"""The learning-rate range test (Smith 2017, arXiv 1506.01186) without a model: which rates to
sweep, when to stop, and what the losses say.

The rate grows geometrically from step to step. Losses are averaged exponentially, and the logarithm
of the rate with the same weights: an average over the last twenty steps belongs to the rates of
these steps, not to the last of them, which in a sweep of 200 steps over eight decades is six times
as high.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.errors import ConfigError, Problem

# The sweep has diverged where the average is above this many times its lowest ...
_TIMES_LOWEST = 4.0
# ... or has risen by this share of its fall. A language model begins near ln V and its loss cannot
# quadruple; what tells is that it forgets what it had learned.
_SHARE_LOST = 0.5
_LEAST_RISE = 0.1  # of the loss at the start: less is a bump, however small the fall before it
_NOISE_MARGIN = 5.0  # standard deviations of an average, for a fall or rise to be one
_FALL_MINIMAL, _FALL_MAXIMAL = 0.1, 0.9
_TABLE_ROWS = 16


@dataclass(frozen=True)
class Sweep:
    """Rates from `lowest` to `highest` in `steps` updates of `batch` samples (None: the recipe's);
    `smoothing` is the weight of the past in the average.

    Raises ConfigError where these are no sweep.
    """

    lowest: float = 1e-7
    highest: float = 10.0
    steps: int = 200
    smoothing: float = 0.95
    batch: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("lowest", 0 < self.lowest < math.inf, "a finite rate above 0", "for example 1e-7"),
            ("highest", self.lowest < self.highest < math.inf, f"finite and above lowest = "
             f"{self.lowest:g}, since the rate grows", "for example 10"),
            ("steps", self.steps >= 2, "at least 2, one for each end", "100 or more; default 200"),
            ("smoothing", 0 <= self.smoothing < 1, "at least 0 and below 1", "default 0.95"),
            ("batch", self.batch is None or self.batch >= 1, "at least 1 sample", "for example 16"),
        )  # fmt: skip
        problems = [Problem(f"--{key}", getattr(self, key), rule, cure)
                    for key, good, rule, cure in rules if not good]  # fmt: skip
        if problems:
            raise ConfigError("learning-rate range test", problems)

    def rates(self) -> list[float]:
        """The rate of each step; the first and the last are exactly the ends."""
        growth = math.log(self.highest / self.lowest) / (self.steps - 1)
        inner = [self.lowest * math.exp(growth * step) for step in range(1, self.steps - 1)]
        return [self.lowest, *inner, self.highest]

    @property
    def window(self) -> int:
        """Steps that an average spans, and after which there is a first one worth its name."""
        return max(1, min(round(1 / (1 - self.smoothing)), self.steps // 10))


class Trace:
    """What a sweep has seen so far, and whether it has diverged."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []  # average loss, in nats, corrected for its start ...
        self.smoothed_rates: list[float] = []  # ... and the rate that it belongs to
        self.diverged_at: float | None = None
        self.reason = ""
        self._sums = (0.0, 0.0)
        self._lowest = math.inf

    def add(self, rate: float, loss: float, grad_norm: float) -> bool:
        """Take up the loss and gradient norm found before the update with `rate`; whether the sweep
        has diverged, and that update is not to be made."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._stop(rate, f"loss {loss:g}, gradient norm {grad_norm:g}")
        past = self.sweep.smoothing
        self.rates.append(rate)
        self.losses.append(loss)
        sums = zip(self._sums, (loss, math.log(rate)), strict=True)
        self._sums = tuple(past * old + (1 - past) * new for old, new in sums)
        average, log_rate = (value / (1 - past ** len(self.losses)) for value in self._sums)
        self.smoothed.append(average)
        self.smoothed_rates.append(math.exp(log_rate))
        if len(self.losses) < self.sweep.window:
            return False
        self._lowest = min(self._lowest, average)
        if average > _TIMES_LOWEST * self._lowest:
            return self._stop(rate, f"the average loss is {_TIMES_LOWEST:g} times its lowest")
        fall, rise = self.start - self._lowest, average - self._lowest
        if rise > max(_SHARE_LOST * fall, _LEAST_RISE * self.start, self.noise):
            return self._stop(
                rate, f"the average loss rose from {self._lowest:.3f} to {average:.3f}"
            )
        return False

    def _stop(self, rate: float, reason: str) -> bool:
        self.diverged_at, self.reason = rate, reason
        return True

    @property
    def start(self) -> float:
        """The average loss over the first window, in nats."""
        return self.smoothed[self.sweep.window - 1]

    @property
    def noise(self) -> float:
        """A change of the average by less than this, in nats, may be chance.

        The deviation of a single loss is taken from the median change from one to the next, which a
        trend and a blow-up at the end leave alone (for normal noise |x - y| has the median 0.954
        deviations); the average of the first window has the larger deviation of the averages.
        """
        if len(self.losses) < 3:
            return 0.0
        changes = (abs(b - a) for a, b in zip(self.losses, self.losses[1:], strict=False))
        past, decay = self.sweep.smoothing, self.sweep.smoothing**self.sweep.window
        shrinks = (1 - past) / (1 + past) * (1 + decay) / (1 - decay)
        return _NOISE_MARGIN * statistics.median(changes) / 0.954 * math.sqrt(shrinks)


@dataclass(frozen=True)
class Findings:
    """What a sweep says; its average is looked at from the end of the first window on.

    Smith takes the rates between which the loss falls as the bounds of a cycle, and the upper one
    as the peak of a schedule. Rates are None where the loss did not fall.
    """

    trace: Trace

    @cached_property
    def _first(self) -> int:
        return min(self.trace.sweep.window, len(self.trace.smoothed)) - 1

    @cached_property
    def _lowest(self) -> int:
        smoothed = self.trace.smoothed
        return min(range(self._first, len(smoothed)), key=smoothed.__getitem__)

    @cached_property
    def fall(self) -> float | None:
        """By how much the average fell to its lowest, in nats; None where that may be chance."""
        trace = self.trace
        if len(trace.smoothed) < max(2, trace.sweep.window):
            return None
        fall = trace.start - trace.smoothed[self._lowest]
        return fall if fall > trace.noise else None

    @property
    def lowest_loss(self) -> tuple[float, float]:
        """The lowest average loss, in nats, and its rate."""
        return self.trace.smoothed[self._lowest], self.trace.smoothed_rates[self._lowest]

    @property
    def minimal(self) -> float | None:
        """The rate at which the average has made a tenth of its fall."""
        return self._rate_where_fallen(_FALL_MINIMAL)

    @property
    def maximal(self) -> float | None:
        """The rate at which the average has made nine tenths of its fall."""
        return self._rate_where_fallen(_FALL_MAXIMAL)

    def _rate_where_fallen(self, share: float) -> float | None:
        if self.fall is None:
            return None
        level = self.trace.start - share * self.fall
        after = range(self._first, self._lowest + 1)
        return next(self.trace.smoothed_rates[i] for i in after if self.trace.smoothed[i] <= level)

    @property
    def steepest(self) -> float | None:
        """The rate at which the average falls most a decade, over stretches of a window."""
        if self.fall is None:
            return None
        trace, span = self.trace, min(self.trace.sweep.window, self._lowest - self._first)
        logs = [math.log(rate) for rate in trace.smoothed_rates]

        def slope(i: int) -> float:
            return (trace.smoothed[i + span] - trace.smoothed[i]) / (logs[i + span] - logs[i])

        i = min(range(self._first, self._lowest - span + 1), key=slope)
        return math.exp((logs[i] + logs[i + span]) / 2)

    @property
    def advice(self) -> str:
        """What to do with it, as a sentence or two."""
        trace = self.trace
        if self.fall is None:
            end = "a lower --lowest" if trace.diverged_at is not None else "a higher --highest"
            return (
                f"no fall of the loss beyond chance ({trace.noise:.3g} nats), so nothing to "
                f"suggest: take more --steps, a larger --batch or {end}"
            )
        if trace.diverged_at is None and self._lowest >= len(trace.smoothed) - trace.sweep.window:
            return "the loss still fell at the end: raise --highest to find the maximal rate"
        return (
            f"try recipe.learning_rate.peak={self.maximal:.2g}; a cyclic rate runs from "
            f"{self.minimal:.2g} to {self.maximal:.2g}"
        )


def summary(findings: Findings) -> str:
    """A table of the sweep and what was found, for the terminal."""
    trace = findings.trace
    if not trace.losses:
        return f"  diverged at once: {trace.reason}"
    lines = ["        rate    loss  average, at the rate it belongs to"]
    every = -(-len(trace.losses) // _TABLE_ROWS)
    for i in range((len(trace.losses) - 1) % every, len(trace.losses), every):
        lines.append(
            f"  {trace.rates[i]:10.2e}{trace.losses[i]:8.3f}{trace.smoothed[i]:9.3f}  "
            f"{trace.smoothed_rates[i]:.2e}"
        )
    lowest, at = findings.lowest_loss
    facts = {"lowest average": f"{lowest:.3f} at {at:.2e}"}
    if findings.fall is not None:
        facts |= {
            "fall": f"{findings.fall:.3f} from {trace.start:.3f}",
            "minimal rate": f"{findings.minimal:.2e}  (a tenth of the fall)",
            "steepest fall": f"{findings.steepest:.2e}",
            "maximal rate": f"{findings.maximal:.2e}  (nine tenths of the fall)",
        }
    end = f"not up to {trace.rates[-1]:g}"
    if trace.diverged_at is not None:
        end = f"{trace.diverged_at:.2e}: {trace.reason}"
    lines += [f"  {label:16}{text}" for label, text in {**facts, "diverged": end}.items()]
    return "\n".join([*lines, f"  {findings.advice}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG", help="a run config in TOML")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument(
        "--from",
        dest="checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder step-N, or a run's for its newest (default: the initial weights)",
    )
    for name, kind, text in (
        ("lowest", float, "first rate"),
        ("highest", float, "last rate"),
        ("steps", int, "updates from the first rate to the last"),
        ("smoothing", float, "weight of the past in the average loss"),
    ):
        default = getattr(Sweep, name)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default:g})")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="samples of a step (default: as the run has there)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="picture to draw (./lr-find-NAME.png)"
    )
