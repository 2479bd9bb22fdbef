"""The picture of a run: loss, learning rate and batch against tokens."""

from pathlib import Path

from pretrain.errors import UserError
from pretrain.observe.metrics import read_metrics
from pretrain.quantities import human_count


def plot_run(run_directory: Path, target: Path) -> Path:
    """Draw metrics.jsonl of a run to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    rows = read_metrics(run_directory / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise UserError(f"{run_directory}: no steps recorded here\n  cure: name a run's folder")
    tokens = [row["tokens"] for row in steps]
    checks = [row for row in rows if "validation_loss" in row]
    figure, (loss, rate, batch) = plt.subplots(
        3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1, 1), constrained_layout=True
    )
    loss.plot(tokens, [row["loss"] for row in steps], color="#9ab", lw=0.8, label="training")
    loss.plot(tokens, _smooth([row["loss"] for row in steps]), color="#1f4e79", label="smoothed")
    if checks:
        loss.plot(
            [row["tokens"] for row in checks],
            [row["validation_loss"] for row in checks],
            "o-", color="#c0504d", ms=4, label="validation",
        )  # fmt: skip
        loss.annotate(
            f"{checks[-1]['validation_loss']:.3f}",
            (checks[-1]["tokens"], checks[-1]["validation_loss"]),
            textcoords="offset points", xytext=(0, 8), ha="right", color="#c0504d",
        )  # fmt: skip
    loss.set_ylabel("loss (nats a token)")
    loss.legend(frameon=False)
    loss.set_title(f"{run_directory.name}: {len(steps)} steps, {human_count(tokens[-1])} tokens")
    rate.plot(tokens, [row["lr"] for row in steps], color="#1f4e79")
    rate.set_ylabel("learning rate")
    batch.step(tokens, [row["batch_samples"] for row in steps], where="pre", color="#1f4e79")
    batch.set_ylabel("batch (samples)")
    batch.set_xlabel("tokens")
    batch.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    for axes in (loss, rate, batch):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, tokens[-1])
        axes.spines[["top", "right"]].set_visible(False)
    rate.set_ylim(bottom=0)
    batch.set_ylim(bottom=0)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the run, corrected for its start."""
    weight = min(0.99, max(0.0, 1 - 50 / len(values)))
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
