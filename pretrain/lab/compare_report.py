"""What a comparison of optimizers shows: a table, results.json, runs.csv and a picture."""

import csv
import json
import math
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.lab.compare_results import Outcome, Standing
from pretrain.lab.compare_setup import Comparison
from pretrain.quantities import human_count

_COLUMNS = 100
_LONGEST_LABEL = 25
# Told apart also by most who are colour-blind (Wong 2011); line styles tell the rest apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":", "-.")


def table(comparison: Comparison, standings: list[Standing]) -> str:
    """The results, the lowest mean loss first, and how they came about; at most 100 columns."""
    width = max(9, *(len(_short(standing.entry.label)) for standing in standings))
    head = ("best rate", "", "runs", "loss", "spread", "halfway", "s/step", "ratio")
    rows = [("optimizer", *head)]
    rows += [(_short(s.entry.label), *_cells(s, standings[0])) for s in ranked(standings)]
    lines = []
    for label, rate, edge, runs, *cells in rows:
        texts = [f"{cell:>{size}}" for cell, size in zip(cells, (8, 7, 8, 7, 6), strict=False)]
        lines.append("  ".join([f"  {label:{width}}", f"{rate:>9}", f"{edge:7}", f"{runs:>4}",
                                *texts]))  # fmt: skip
    for note in _notes(comparison, standings):
        lines += textwrap.wrap(note, _COLUMNS - 2, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _cells(standing: Standing, reference: Standing) -> list[str]:
    cells = [f"{standing.best:.3g}", standing.edge, str(len(standing.runs))]
    if standing.diverged:
        return [*cells, f"diverged: {standing.diverged} of {len(standing.at_best)} runs there"]
    measured = (
        (standing.mean, _loss_form(standing.mean)),
        (standing.spread, _loss_form(standing.spread)),
        (standing.halfway, _loss_form(standing.halfway)),
        (standing.step_seconds, ".3g"),
        (_ratio(standing, reference), ".2f"),
    )
    return cells + ["-" if value is None else f"{value:{form}}" for value, form in measured]


def _loss_form(loss: float | None) -> str:
    """Losses of a language model are below 12; those of one that blew up still have to fit."""
    return ".4f" if loss is None or loss < 100 else ".2e"


def ranked(standings: list[Standing]) -> list[Standing]:
    """The lowest mean loss first, diverged ones last."""
    return sorted(standings, key=lambda standing: standing.mean)


def _notes(comparison: Comparison, standings: list[Standing]) -> Iterator[str]:
    config, recipe = comparison.config, comparison.config.build_recipe()
    seeds = len(comparison.seeds)
    tokens = human_count(recipe.total_samples * recipe.sequence_length)
    yield (
        f"loss: nats a token after {tokens} tokens, mean over {seeds} seed(s), on the same "
        f"{config.validation.samples} held-out samples for all runs; spread: standard deviation "
        "over the seeds. Means that lie closer than their spreads are not told apart."
    )
    if comparison.rates > 1:
        yield (
            f"rate: the best of {comparison.rates} (a factor {comparison.factor:g} apart) on seed "
            f"{comparison.seeds[0]}, whose run counts among the seeds, by the same held-out "
            "samples."
        )
    else:
        yield "rate: the only one tried, so the optimizers may be tuned unequally well."
    if any(standing.edge for standing in standings):
        yield (
            "lowest, highest: the best rate is the end of those tried, after the grid was extended "
            "twice; a better one may lie beyond."
        )
    if len({len(standing.runs) for standing in standings}) > 1:
        yield "runs: more where the grid had to be extended, fewer where every rate diverged."
    if any(standing.entry.schedule_free for standing in standings):
        yield (
            "Schedule-Free takes a constant rate with the recipe's warm-up: that it needs no "
            "decay is its point. All others follow the recipe's shape."
        )
    yield (
        "s/step: mean seconds of a step in the fastest run (others may have shared the machine); "
        f"ratio: to {standings[0].entry.label}."
    )


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 3] + "..."


def _ratio(standing: Standing, reference: Standing) -> float | None:
    mine, its = standing.step_seconds, reference.step_seconds
    return mine / its if mine and its else None


def write_report(comparison: Comparison, standings: list[Standing]) -> list[Path]:
    """Write results.json, runs.csv and compare.png to the output folder; their paths."""
    folder = comparison.output
    paths = [folder / name for name in ("results.json", "runs.csv", "compare.png")]
    try:
        text = json.dumps(_results(comparison, standings), indent=1, allow_nan=False)
        paths[0].write_text(text + "\n", encoding="utf-8")
        with open(paths[1], "w", newline="", encoding="utf-8") as file:
            rows = list(_run_rows(standings))
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        _plot(comparison, standings, paths[2])
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}\n"
            "  cure: free space, fix the permissions, or choose another --output"
        ) from None
    return paths


def _results(comparison: Comparison, standings: list[Standing]) -> dict[str, Any]:
    return {
        "config": comparison.config.resolved(),
        "seeds": list(comparison.seeds),
        "rates": comparison.rates,
        "factor": comparison.factor,
        "optimizers": [
            {
                "label": standing.entry.label,
                "section": standing.entry.section.model_dump(mode="json"),
                "best_rate": standing.best,
                "edge": standing.edge or None,
                "runs": len(standing.runs),
                "diverged": standing.diverged,
                "final_losses": [_finite(outcome.final) for outcome in standing.at_best],
                "mean_loss": _finite(standing.mean),
                "spread": standing.spread,
                "halfway_loss": _finite(standing.halfway),
                "step_seconds": standing.step_seconds,
                "step_seconds_ratio": _ratio(standing, standings[0]),
            }
            for standing in ranked(standings)
        ],
        "runs": list(_run_rows(standings)),
    }


def _run_rows(standings: list[Standing]) -> Iterator[dict[str, Any]]:
    """A row for each run, in the order in which they were made."""
    for standing in standings:
        for (rate, seed), outcome in standing.runs.items():
            yield {
                "optimizer": standing.entry.label,
                "rate": rate,
                "seed": seed,
                "final_loss": _finite(outcome.final),
                "halfway_loss": _finite(outcome.halfway),
                "step_seconds": outcome.step_seconds,
                "diverged": outcome.diverged,
                "run": outcome.directory.name,
            }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _plot(comparison: Comparison, standings: list[Standing], target: Path) -> None:
    """Left the held-out loss of the best rates against tokens, right the final one against rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, (curves, rates) = plt.subplots(
        1, 2, figsize=(12, 5), width_ratios=(3, 2), constrained_layout=True
    )
    for place, standing in enumerate(ranked(standings)):
        index = standings.index(standing)  # a colour stays with its place in the command
        style = {
            "color": _COLORS[index % len(_COLORS)],
            "ls": _STYLES[index // len(_COLORS) % len(_STYLES)],
            "zorder": 3 - place / len(standings),
        }
        _draw_curve(curves, standing, style)
        _draw_rates(rates, standing, comparison.seeds[0], style)
    finals = [o.final for s in standings for o in s.runs.values() if math.isfinite(o.final)]
    _limit(curves, [loss for s in standings for o in s.at_best for loss in o.losses])
    _limit(rates, finals)
    curves.set(xlabel="tokens", ylabel="held-out loss (nats a token)", xlim=(0, None))
    curves.set_title(f"{comparison.config.name}: mean over {len(comparison.seeds)} seed(s), "
                     "band: one standard deviation", fontsize=10)  # fmt: skip
    curves.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    rates.set(xlabel="learning rate", xscale="log")
    rates.set_title(f"final loss by rate, seed {comparison.seeds[0]} (x: diverged)", fontsize=10)
    for axes in (curves, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False, fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _draw_curve(axes: Any, standing: Standing, style: dict[str, Any]) -> None:
    label = f"{_short(standing.entry.label)} at {standing.best:.3g}: "
    if standing.diverged:
        axes.plot([], [], label=label + "diverged", **style)
        return
    label += f"{standing.mean:.3f}" + (f" ± {standing.spread:.3f}" if standing.spread else "")
    runs: list[Outcome] = standing.at_best
    tokens, columns = runs[0].tokens, list(zip(*(run.losses for run in runs), strict=True))
    means = [statistics.fmean(column) for column in columns]
    axes.plot(tokens, means, lw=1.6, label=label, **style)
    if len(runs) > 1:
        spreads = [statistics.stdev(column) for column in columns]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(tokens, low, high, color=style["color"], alpha=0.18, lw=0)


def _draw_rates(axes: Any, standing: Standing, seed: int, style: dict[str, Any]) -> None:
    found = {rate: standing.runs[rate, seed].final for rate in standing.rates}
    good = {rate: loss for rate, loss in found.items() if math.isfinite(loss)}
    axes.plot(good.keys(), good.values(), marker="o", ms=3, lw=1.2, **style)
    if standing.best in good:
        axes.plot(standing.best, good[standing.best], "o", ms=8, mfc="none", color=style["color"])
    top = axes.get_xaxis_transform()
    for rate in found.keys() - good.keys():
        axes.plot(rate, 0.98, "x", color=style["color"], transform=top)


def _limit(axes: Any, losses: list[float]) -> None:
    """Show what happens low down: runs that blew up would flatten the rest."""
    losses = sorted(loss for loss in losses if math.isfinite(loss))
    if losses:
        low, middle = losses[0], statistics.median(losses)
        high = min(losses[-1], middle + 2 * (middle - low) + 0.1)
        axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
