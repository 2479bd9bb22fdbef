"""Is a shard what it was when it was written, and is its layout sound? All of it, on all cores."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pretrain.data.shards import Shard
from pretrain.errors import DataError
from tokenizer import manifest as manifests

_SEQUENCES = 2**21  # of the index, looked at in one task
_TOKENS = 2**23


def check(prefixes: list[Path]) -> str:
    """Check shards in full; what was checked, as a line for each.

    Raises DataError with all that is wrong in all of them.
    """
    faults: list[str] = []
    lines = []
    for prefix in prefixes:
        try:
            shard, manifest = Shard.open(prefix), manifests.read(prefix)
            found = list(_faults(shard, manifest))
        except DataError as error:
            faults.append(str(error))
            continue
        faults += found
        known = "checksums, layout and tokens" if manifest else "layout only (it has no manifest)"
        lines.append(
            f"{prefix}: {shard.documents:,} documents, {shard.tokens:,} tokens: "
            + (f"{len(found)} faults" if found else f"sound: {known}")
        )
    if faults:
        raise DataError(
            "\n".join([*lines, *(f"  {fault}" for fault in faults)])
            + "\n  cure: copy the shard again from where it is sound, or encode it again"
        )
    return "\n".join(lines)


def _faults(shard: Shard, manifest: dict[str, Any] | None) -> Iterator[str]:
    sizes = [Path(f"{shard.prefix}.{suffix}").stat().st_size for suffix in ("bin", "idx")]
    total = sum(sizes) * (2 if manifest else 1)
    with tqdm(total=total, unit="B", unit_scale=True, desc=shard.prefix.name) as bar:
        if manifest:
            for key, found in (("documents", shard.documents), ("tokens", shard.tokens)):
                if manifest[key] != found:
                    yield f"{shard.prefix}: {found:,} {key}, but {manifest[key]:,} were written"
            yield from manifests.faults(shard.prefix, manifest, bar.update)
        yield from _parallel(lambda first: _index_fault(shard, first), shard.sequences, _SEQUENCES)
        yield from _parallel(
            lambda first: _document_fault(shard, manifest, first), shard.documents, _SEQUENCES
        )
        bar.update(sizes[1])

        def look_at(first: int) -> tuple[str | None, int]:
            result = _token_fault(shard, manifest, first)
            bar.update(min(_TOKENS, shard.tokens - first) * shard.dtype.itemsize)
            return result

        ends = []
        for fault, count in manifests.over_blocks(look_at, shard.tokens, _TOKENS):
            ends.append(count)
            if fault:
                yield fault
        if manifest and sum(ends) != shard.documents:
            yield (
                f"{shard.prefix}.bin: the end-of-text token {manifest['end_of_text']} stands there "
                f"{sum(ends):,} times, but there are {shard.documents:,} documents"
            )


def _index_fault(shard: Shard, first: int) -> str | None:
    """The first sequence from `first` on that does not begin where the one before it ends."""
    lengths, pointers, _ = shard.tables
    end = min(first + _SEQUENCES, shard.sequences)
    here = lengths[first:end].astype(np.int64)
    starts = pointers[first : end + 1]
    after = starts[1:] - starts[:-1]
    wrong = here < 0
    wrong[: len(after)] |= after != here[: len(after)] * shard.dtype.itemsize
    if not wrong.any():
        return None
    number = int(np.argmax(wrong))
    return (
        f"{shard.prefix}.idx: sequence {first + number} of {here[number]} tokens begins at byte "
        f"{starts[number]}, but the next does not follow it"
    )


def _document_fault(shard: Shard, manifest: dict[str, Any] | None, first: int) -> str | None:
    """The first document that ends before it begins or, if we wrote it, not with its end token."""
    borders = shard.tables[2][first : min(first + _SEQUENCES, shard.documents) + 1]
    wrong = np.diff(borders) < 0
    wrong |= (borders[:-1] < 0) | (borders[1:] > shard.sequences)
    if wrong.any():
        number = int(np.argmax(wrong))
        return (
            f"{shard.prefix}.idx: document {first + number} has the sequences {borders[number]} to "
            f"{borders[number + 1]} of {shard.sequences}"
        )
    if manifest is None:
        return None
    last = borders[1:] - 1
    ends = shard.sequence_starts(last) + shard.sequence_lengths[last] - 1
    if ((ends < 0) | (ends >= shard.tokens)).any():
        return None  # said of the index already
    wrong = shard.stored_tokens[ends] != manifest["end_of_text"]
    if not wrong.any():
        return None
    return (
        f"{shard.prefix}.bin: document {first + int(np.argmax(wrong))} does not end with the "
        f"end-of-text token {manifest['end_of_text']}"
    )


def _token_fault(
    shard: Shard, manifest: dict[str, Any] | None, first: int
) -> tuple[str | None, int]:
    """(the first token outside the vocabulary, how many end-of-text tokens there are)."""
    tokens = shard.stored_tokens[first : first + _TOKENS]
    vocab_size = manifest["vocab_size"] if manifest else 2**63 - 1
    ends = int((tokens == manifest["end_of_text"]).sum()) if manifest else 0
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return None, ends
    number = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
    return (
        f"{shard.prefix}.bin: token {first + number} is {tokens[number]}, outside the vocabulary "
        f"of {vocab_size}"
    ), ends


def _parallel(look: Callable[[int], str | None], count: int, step: int) -> Iterator[str]:
    yield from (fault for fault in manifests.over_blocks(look, count, step) if fault)
