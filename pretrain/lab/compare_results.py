"""What the runs of a comparison came to, and the search for each optimizer's rate. No torch."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.config_file import differences, read_toml
from pretrain.errors import UserError
from pretrain.lab.compare_setup import Comparison, Entry
from pretrain.observe.metrics import read_metrics

_MOST_EXTENSIONS = 2
# What may differ between a saved run and the one that is asked for: nothing that is learned.
_FREE_KEYS = ("directory", "timeout", "start", "observe", "checkpoint", "published")
_RESULT = "result.json"


@dataclass(frozen=True)
class Outcome:
    """What came of a run. Losses are those on the held-out samples, in nats, with the tokens after
    which they were found; `diverged` says why the run counts as lost, if it does."""

    directory: Path
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    step_seconds: float | None
    diverged: str | None = None

    @property
    def final(self) -> float:
        """The loss at the end; infinite if the run diverged."""
        return math.inf if self.diverged else self.losses[-1]

    @property
    def halfway(self) -> float:
        """The first loss at or after half of the tokens; infinite if the run diverged."""
        if self.diverged:
            return math.inf
        half = self.tokens[-1] / 2
        return next(x for x, at in zip(self.losses, self.tokens, strict=True) if at >= half)


def read_outcome(config: Config, held_out: str) -> Outcome | None:
    """What came of the run of `config`; None where it has not ended.

    A run has ended when result.json says so, which is written last: its metrics alone would not
    tell a diverged run from an interrupted one. `held_out` identifies the samples of the losses.
    Raises UserError for a run with another config or other data.
    """
    folder = config.run_directory
    if (folder / "config.toml").exists():
        saved = {k: v for k, v in read_toml(folder / "config.toml").items() if k not in _FREE_KEYS}
        asked = {k: v for k, v in config.resolved().items() if k not in _FREE_KEYS}
        _refuse_other(folder, differences(saved, asked))
    if not (folder / _RESULT).exists():
        return None
    result = json.loads((folder / _RESULT).read_text())
    if result["held_out"] != held_out:
        _refuse_other(folder, [f"held-out samples: {result['held_out']} -> {held_out}"])
    rows = read_metrics(folder / "metrics.jsonl")
    checks = [row for row in rows if "validation_loss" in row]
    # Without the first step, which also builds what the others use.
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row][1:]
    if result["diverged"] is None and (not rows or rows[-1]["step"] != result["steps"]):
        return None  # the metrics were lost or cut
    return Outcome(
        directory=folder,
        tokens=tuple(row["tokens"] for row in checks),
        losses=tuple(row["validation_loss"] for row in checks),
        step_seconds=statistics.fmean(seconds) if seconds else None,
        diverged=result["diverged"] or _not_finite(checks),
    )


def _not_finite(checks: list[dict[str, Any]]) -> str | None:
    last = checks[-1]["validation_loss"]
    return None if math.isfinite(last) else f"held-out loss {last} at the end"


def write_result(folder: Path, steps: int, held_out: str, diverged: str | None) -> None:
    """Say that a run has ended, after `steps` steps."""
    text = json.dumps({"steps": steps, "held_out": held_out, "diverged": diverged}, indent=1)
    (folder / "result.new").write_text(text + "\n")
    (folder / "result.new").rename(folder / _RESULT)


def _refuse_other(folder: Path, changes: list[str]) -> None:
    if changes:
        raise UserError(
            f"{folder} holds a run of another comparison:\n    " + "\n    ".join(changes) + "\n"
            "  rule: runs that lie in --output are used again, so they must be the same\n"
            "  cure: choose another --output, or remove this folder"
        )


@dataclass(frozen=True)
class Standing:
    """How an optimizer did: its runs by (rate, seed) in the order in which they were made, its
    best rate on the first seed, and `edge`: "lowest" or "highest" where that is the end of the
    rates tried, so that a better one may lie beyond."""

    entry: Entry
    runs: dict[tuple[float, int], Outcome]
    best: float
    edge: str

    @property
    def rates(self) -> list[float]:
        """All rates tried, rising."""
        return sorted({rate for rate, _ in self.runs})

    @property
    def at_best(self) -> list[Outcome]:
        """The runs at the best rate, one a seed."""
        return [outcome for (rate, _), outcome in self.runs.items() if rate == self.best]

    @property
    def diverged(self) -> int:
        """How many of the runs at the best rate diverged."""
        return sum(outcome.diverged is not None for outcome in self.at_best)

    @property
    def mean(self) -> float:
        """Mean final loss over the seeds; infinite if one of them diverged."""
        return statistics.fmean(outcome.final for outcome in self.at_best)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final loss over the seeds; None for a single one."""
        finals = [outcome.final for outcome in self.at_best]
        return statistics.stdev(finals) if len(finals) > 1 and not self.diverged else None

    @property
    def halfway(self) -> float:
        """Mean loss halfway."""
        return statistics.fmean(outcome.halfway for outcome in self.at_best)

    @property
    def step_seconds(self) -> float | None:
        """Seconds a step in the fastest of all runs, since what else the machine does only adds to
        them. Of a run the mean counts, which does not hide work that is done every tenth step."""
        found = [o.step_seconds for o in self.runs.values() if o.step_seconds is not None]
        return min(found, default=None)


def compete(
    comparison: Comparison,
    entry: Entry,
    train: Callable[[float, int], Outcome],
    expect: Callable[[int], None] = lambda runs: None,
) -> Standing:
    """Find an entry's best rate on the first seed, then run the other seeds with it.

    A best rate at the end of the grid may be the best of nothing, so the grid grows by one in that
    direction, at most twice. `expect` is told of runs more or fewer than planned.
    """
    first, *others = comparison.seeds
    half = comparison.rates // 2
    lowest, highest = -half, half
    outcomes = {k: train(comparison.rate(entry, k), first) for k in range(lowest, highest + 1)}

    def best() -> int:
        return min(sorted(outcomes), key=lambda k: outcomes[k].final)  # of equals the lowest rate

    # A single rate was chosen by the user: there is no grid to have an edge.
    extensions = _MOST_EXTENSIONS if comparison.rates > 1 else 0
    for _ in range(extensions):
        if best() not in (lowest, highest):
            break
        expect(1)
        k = lowest - 1 if best() == lowest else highest + 1
        lowest, highest = min(lowest, k), max(highest, k)
        outcomes[k] = train(comparison.rate(entry, k), first)
    at = best()
    rate = comparison.rate(entry, at)
    runs = {(comparison.rate(entry, k), first): outcome for k, outcome in outcomes.items()}
    if outcomes[at].diverged:
        expect(-len(others))  # no rate works, so other seeds tell nothing
    else:
        runs |= {(rate, seed): train(rate, seed) for seed in others}
    edge = "lowest" if at == lowest else "highest" if at == highest else ""
    return Standing(entry, runs, rate, edge if comparison.rates > 1 else "")
