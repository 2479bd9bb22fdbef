"""What a corpus holds, and how often a run would read each source: a table and a plot."""

from pathlib import Path
from typing import NamedTuple

from pretrain.config import Config
from pretrain.data.shards import Shard
from pretrain.quantities import human_count
from tokenizer import manifest as manifests
from tokenizer.corpus_show import open_corpus


class SourceStats(NamedTuple):
    """One source; what concerns a run is None without one, `bytes_per_token` without manifest."""

    source: str
    documents: int
    tokens: int
    bytes_per_token: float | None
    run_tokens: int | None
    run_share: float | None
    epochs: float | None


def shard_stats(prefixes: list[Path]) -> list[SourceStats]:
    """A row for each shard."""
    return [_row(prefix.name, prefix) for prefix in prefixes]


def run_stats(config: Config) -> list[SourceStats]:
    """A row for each source that the run reads."""
    corpus = open_corpus(config, "train")
    paths = {source.name: source.path for source in config.data.sources}
    return [
        _row(taken.source, paths[taken.source])._replace(
            run_tokens=taken.tokens, run_share=taken.share, epochs=taken.epochs
        )
        for taken in corpus.summary(config.build_recipe().total_samples)
    ]


def _row(name: str, prefix: Path) -> SourceStats:
    shard, manifest = Shard.open(prefix), manifests.read(prefix)
    # The end-of-text tokens stand for no text.
    ratio = manifest["text_bytes"] / max(shard.tokens - shard.documents, 1) if manifest else None
    return SourceStats(name, shard.documents, shard.tokens, ratio, None, None, None)


def table(rows: list[SourceStats], epoch_limit: float | None = None) -> str:
    """The rows and their sum, at most 80 characters wide; sources over the limit are marked."""
    tokens = sum(row.tokens for row in rows)
    whole = SourceStats(
        "all",
        sum(row.documents for row in rows),
        tokens,
        None,
        sum(row.run_tokens or 0 for row in rows),
        sum(row.run_share or 0 for row in rows),
        sum(row.run_tokens or 0 for row in rows) / tokens,
    )
    with_run = any(row.run_tokens is not None for row in rows)
    header = f"{'source':<20}{'documents':>10}{'tokens':>9}{'share':>8}{'B/token':>9}"
    lines = [header + (f"{'in run':>9}{'share':>8}{'epochs':>8}" if with_run else "")]
    for row in [*rows, whole]:
        ratio = f"{row.bytes_per_token:.2f}" if row.bytes_per_token else ""
        line = (
            f"{row.source[:19]:<20}{human_count(row.documents):>10}{human_count(row.tokens):>9}"
            f"{row.tokens / tokens:>8.1%}{ratio:>9}"
        )
        if with_run:
            line += f"{human_count(row.run_tokens):>9}{row.run_share:>8.1%}{row.epochs:>8.2f}"
            line += "  !" if epoch_limit and row is not whole and row.epochs > epoch_limit else ""
        lines.append(line.rstrip())
    if epoch_limit and any((row.epochs or 0) > epoch_limit for row in rows):
        lines.append(f"! more epochs than data.mixture.epoch_limit = {epoch_limit:g}")
    return "\n".join(lines)


def plot(rows: list[SourceStats], path: Path) -> None:
    """Bars of each source's tokens and shares and, of a run, its epochs; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_run = any(row.run_tokens is not None for row in rows)
    rows = sorted(rows, key=lambda row: row.tokens)
    names, places = [row.source for row in rows], range(len(rows))
    tokens = sum(row.tokens for row in rows)
    figure, axes = pyplot.subplots(
        1, 3 if with_run else 2, figsize=(11, 1.5 + 0.26 * len(rows)), sharey=True, squeeze=False
    )
    tokens_axis, share_axis, *epochs_axis = axes[0]
    bars = tokens_axis.barh(names, [row.tokens for row in rows])
    tokens_axis.bar_label(bars, [human_count(row.tokens) for row in rows], padding=2, fontsize=7)
    tokens_axis.set(xlabel="tokens", xticks=[])
    tokens_axis.margins(x=0.2)
    height = 0.4 if with_run else 0.8
    shift = height / 2 if with_run else 0
    share_axis.barh(
        [p + shift for p in places], [row.tokens / tokens for row in rows], height, label="corpus"
    )
    share_axis.set(xlabel="share of the tokens")
    if with_run:
        shares = [row.run_share for row in rows]
        share_axis.barh([p - shift for p in places], shares, height, label="run")
        share_axis.legend()
        epochs_axis[0].barh(names, [row.epochs for row in rows], color="tab:green")
        epochs_axis[0].set(xlabel="epochs in the run")
    for axis in axes[0]:
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
