"""Who is where, and how the batch is dealt: what a run shows before it begins."""

from dataclasses import dataclass

from pretrain.config import Config
from pretrain.quantities import human_count
from pretrain.recipe import Recipe

_MOST_ROWS = 16  # ranks with a row of their own; more are shown by host
_HEADER = ("host", "rank", "local rank", "device", "shard group", "replica group")


@dataclass(frozen=True)
class RankRow:
    """Where a rank is: its host, its device, and its groups in the mesh, counted from 0."""

    host: str
    rank: int
    local_rank: int
    device: str
    shard_group: int
    replica_group: int


def rank_table(rows: list[RankRow], full: bool = False) -> str:
    """A table of all ranks: a row a rank, or for many (not `full`) a row a host."""
    if full or len(rows) <= _MOST_ROWS:
        cells = [(r.host, r.rank, r.local_rank, r.device, r.shard_group, r.replica_group)
                 for r in rows]  # fmt: skip
    else:
        hosts: dict[str, list[RankRow]] = {}
        for row in rows:
            hosts.setdefault(row.host, []).append(row)
        cells = [
            (
                host,
                _ranges([r.rank for r in here]),
                _ranges([r.local_rank for r in here]),
                ", ".join(dict.fromkeys(_kind(r.device) for r in here)),
                _ranges([r.shard_group for r in here]),
                _ranges([r.replica_group for r in here]),
            )
            for host, here in hosts.items()
        ]
    table = [_HEADER, *[tuple(map(str, row)) for row in cells]]
    widths = [max(len(row[k]) for row in table) for k in range(len(_HEADER))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def batch_arithmetic(config: Config, recipe: Recipe, ranks: int) -> str:
    """How the first and the final batch come about: ranks, passes, samples, tokens."""
    first, final = recipe.batch(0), recipe.batch.final
    lines = [f"  batch of {'every' if first == final else 'the first'} step: "
             + _one_batch(config, recipe, ranks, first)]  # fmt: skip
    if final != first:
        lines.append("  batch of the last step: " + _one_batch(config, recipe, ranks, final))
    return "\n".join(lines)


def _one_batch(config: Config, recipe: Recipe, ranks: int, batch: int) -> str:
    micro, length = config.engine.micro_batch_samples, recipe.sequence_length
    least, most = batch // ranks, -(-batch // ranks)
    passes = -(-most // micro)
    share = f"{most}" if least == most else f"{least} or {most}"
    text = (
        f"{batch} x {length} tokens = {human_count(batch * length)}; {_count(ranks, 'rank')} x "
        f"{share} sample{'s' * (most > 1)}, {_count(passes, 'pass')} of up to {min(micro, most)}"
    )
    return text + (f"; {_count(ranks - batch, 'rank')} idle" if batch < ranks else "")


def _count(number: int, word: str) -> str:
    plural = "es" if word.endswith("s") else "s"
    return f"{number} {word}{plural if number > 1 else ''}"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 -> "1-3,5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _kind(device: str) -> str:
    """A device without its number: "cuda:3 NAME" -> "cuda NAME"."""
    index, _, name = device.partition(" ")
    return f"{index.split(':')[0]} {name}".strip()
