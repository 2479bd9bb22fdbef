"""The picture of a learning-rate range test: loss over the logarithm of the rate."""

from pathlib import Path

from pretrain.errors import UserError
from pretrain.lab.range_test import Findings


def plot_findings(findings: Findings, title: str, target: Path) -> None:
    """Draw a sweep to a PNG. Raises UserError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trace = findings.trace
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    axes.plot(trace.rates, trace.losses, color="#9ab", lw=0.8, label="loss of a step")
    axes.plot(trace.smoothed_rates, trace.smoothed, color="#1f4e79", lw=2, label="average")
    marks = (
        ("minimal", findings.minimal, "#4a8b3b", "--"),
        ("steepest fall", findings.steepest, "#888", ":"),
        ("maximal", findings.maximal, "#c0504d", "--"),
        ("diverged", trace.diverged_at, "#333", "-"),
    )
    for name, rate, color, style in marks:
        if rate is not None:
            axes.axvline(rate, color=color, ls=style, lw=1.2, label=f"{name} {rate:.1e}")
    if findings.minimal and findings.maximal:
        axes.axvspan(findings.minimal, findings.maximal, color="#4a8b3b", alpha=0.08)
    axes.set_xscale("log")
    axes.set_xlim(trace.sweep.lowest, 1.5 * (trace.diverged_at or trace.rates[-1]))
    axes.set_ylim(*_visible_losses(findings))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written: {error.strerror}\n  cure: choose another --plot"
        ) from None
    finally:
        plt.close(figure)


def _visible_losses(findings: Findings) -> tuple[float, float]:
    """From below all losses to a little above those of the start: a blow-up would flatten it."""
    trace = findings.trace
    low = min(trace.losses)
    early = max(trace.losses[: trace.sweep.window])
    room = max(0.15 * (early - low), 0.01 * abs(early)) or 1.0
    return low - room, early + 2 * room
