"""The sample order Megatron publishes, so that a run begun there goes on here with the same data.

`MegatronIndex` is the order of one source (Megatron-DeepSpeed, BigScience's fork,
`megatron/data/gpt_dataset.py` and `helpers.cpp`), `Blend` the order of the sources
(`blendable_dataset.py`). Both are built once, kept as .npy files in a folder and memory-mapped.
Unlike `mixture` and `permutation` they know only as many samples as were asked for at the start.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pretrain.data.shards import Shard, fault

_SURPLUS = 1.005  # samples are indexed beyond a source's share, since a blend is not exact
_LAST_EPOCH_APART = 0.95  # of an epoch; BigScience's figure, where Megatron-LM has 0.80
_CHUNK = 2**18  # documents placed at once when sample_idx is built
_BLOCK = 4096  # samples of a blend between two counts of what was taken
_STREAMS = 256  # parts of a blend computed side by side
_MOST_SOURCES = 255  # a source's number is kept as u8
_MOST_NARROW = 2**31 - 1  # entries of doc_idx that sample_idx can number in i32
_MOST_UNSIGNED = 2**32 - 3  # samples that Megatron numbers in u32


class Piece(NamedTuple):
    """A run of consecutive tokens of one sequence; offset absolute in the shard, in tokens."""

    sequence: int
    token_offset: int
    count: int


class _Request(NamedTuple):
    """What the index of a source is built from; `tokens` are those of one pass."""

    shard: Shard
    sequences: range
    samples: int
    length: int
    seed: int
    stem: Path
    tokens: int


@dataclass(frozen=True)
class MegatronIndex:
    """The order of one source's samples: doc_idx, sample_idx and shuffle_idx, memory-mapped.

    Sequences are repeated and shuffled (doc_idx), laid end to end, and cut into samples of
    `sequence_length + 1` tokens that share one with the next (sample_idx), which are shuffled too
    (shuffle_idx). Attributes: `samples`, how many there are (at least those asked for), and
    `epoch_samples`, whole samples in one pass, (tokens - 1) // sequence_length.
    """

    samples: int
    epoch_samples: int
    _of: _Request
    _tables: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def open(
        cls,
        shard: Shard,
        sequences: range,
        samples: int,
        sequence_length: int,
        seed: int,
        cache: Path,
        name: str,
    ) -> "MegatronIndex":
        """Open the index kept in the folder `cache`, or build it there.

        `sequences` of the shard are used (what Megatron's GPT data set calls documents), `samples`
        is the number to have (`wanted_samples`), `name` is Megatron's name of the data set, such as
        "train". Files of Megatron's own are used as they are; beside ours lies a JSON of what they
        were built from. Raises DataError for files that do not fit, and if none can be written.
        Reads the lengths of all `sequences`; building holds doc_idx and then shuffle_idx in memory.
        """
        if not 0 <= sequences.start < sequences.stop <= shard.sequences or sequences.step != 1:
            raise ValueError(f"{sequences} of {shard.sequences} sequences in {shard.prefix}")
        lengths = shard.sequence_lengths[sequences.start : sequences.stop]
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens < 1:
            cure = "add text to it or change data.validation_fraction"
            found, rule = f"no tokens in sequences {sequences}", "a split has at least one"
            raise fault(f"{shard.prefix}.idx", found, rule, cure)
        stem = f"{shard.prefix.name}_{name}_indexmap_{samples}ns_{sequence_length}sl_{seed}s"
        of = _Request(shard, sequences, samples, sequence_length, seed, cache / stem, tokens)
        tables = _tables(of)
        index = cls(len(tables[2]), (tokens - 1) // sequence_length, of, tables)
        for number in (0, index.samples - 1)[: index.samples]:  # other data shows at the ends
            index.pieces(number)
        return index

    def pieces(self, number: int) -> list[Piece]:
        """The runs of tokens that make up sample `number`, sequence_length + 1 tokens in all.

        `number` counts in the shuffled order. Raises DataError if the cached files do not give a
        sample of that length out of the source's sequences.
        """
        if not 0 <= number < self.samples:
            raise ValueError(f"sample {number} of {self.samples} in {self._of.stem}")
        row = int(self._tables[2][number])
        found = self._runs(row) if 0 <= row < self.samples else []
        tokens, width = sum(piece.count for piece in found), self._of.length + 1
        if tokens != width:
            found = f"sample {number} (row {row}) has {tokens} tokens of {self._of.sequences}"
            cure = "they are damaged or of other data: delete them to have them built again"
            raise fault(f"{self._of.stem}_*.npy", found, f"each has {width}", cure)
        return found

    def _runs(self, row: int) -> list[Piece]:
        """The pieces from one entry of sample_idx to the next; none if these make no sense."""
        shard, sequences = self._of.shard, self._of.sequences
        doc_idx, sample_idx, _ = self._tables
        (first, skip), (last, final) = sample_idx[row : row + 2].tolist()
        if not (0 <= first <= last < len(doc_idx) and skip >= 0):
            return []
        order = doc_idx[first : last + 1]
        if order.min() < sequences.start or order.max() >= sequences.stop:
            return []
        starts, lengths = shard.sequence_starts(order), shard.sequence_lengths[order]
        begins, ends = starts.copy(), starts + lengths
        begins[0] += skip
        ends[-1] = starts[-1] + final + 1  # included: it is the first token of the next sample
        if final >= lengths[-1] or starts.min() < 0 or ends.max() > shard.tokens:
            return []
        rows = zip(order.tolist(), begins.tolist(), (ends - begins).tolist(), strict=True)
        return [Piece(*found) for found in rows if found[2] > 0]

    def read(self, number: int) -> np.ndarray:
        """Tokens of sample `number` in the shuffled order, int64 [sequence_length + 1]."""
        runs = self.pieces(number)
        return np.concatenate([self._of.shard.read(run.token_offset, run.count) for run in runs])


@dataclass(frozen=True)
class Blend:
    """Which source a sample comes from: at i the k of the greatest weight_k * max(i, 1) - taken_k.

    In double precision, ties to the lowest k. That of n samples begins that of more. With one
    source nothing is computed or kept. `samples` are as many as were asked for.
    """

    samples: int
    _sources: int
    _file: Path
    _blocks: np.ndarray

    @classmethod
    def open(cls, weights: Sequence[float], samples: int, cache: Path) -> "Blend":
        """Open the blend kept in the folder `cache`, or build it there (some 0.1 us a sample).

        Raises DataError beyond 255 sources and for a damaged file, and if none can be written.
        """
        if len(weights) > _MOST_SOURCES:
            found, rule = f"{len(weights)} with a weight", f"at most {_MOST_SOURCES} are blended"
            raise fault("data.sources", found, rule, "join some, or leave Megatron's order")
        shares = _normalised(weights)
        shares /= shares.sum()  # again, for Megatron does: it may change the last bit
        if len(shares) == 1:
            return cls(samples, 1, cache, np.empty(0))
        stem = f"blend_{hashlib.blake2b(shares.tobytes(), digest_size=8).hexdigest()}"
        blocks = max(-(-samples // _BLOCK), 1)
        kept = [path.stem.rpartition("_")[2] for path in cache.glob(f"{stem}_*.npy")]
        enough = [int(found) for found in kept if found.isdecimal() and int(found) >= blocks]
        blocks = min(enough, default=blocks)
        file = cache / f"{stem}_{blocks}.npy"
        record = np.dtype([("taken", "<i8", (len(shares),)), ("sources", "u1", (_BLOCK,))])
        if not enough:
            _write(file, chain([_header(record, (blocks,))], _blend(shares, blocks, record)))
        return cls(samples, len(shares), file, _load(file, [record], (blocks,)))

    def place(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source) of samples [first, first + count), int64 [count].

        The numbers of each source run over 0, 1, 2, ... Raises DataError for a damaged file.
        """
        if not 0 <= first <= first + count <= self.samples:
            raise ValueError(f"samples [{first}, {first} + {count}) of {self.samples}")
        if self._sources == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count)
        block = first // _BLOCK
        blocks = self._blocks[block : -(-(first + count) // _BLOCK)] if count else self._blocks[:0]
        sources = blocks["sources"].reshape(-1).astype(np.int64)
        numbers = np.empty_like(sources)
        for k in np.unique(sources).tolist():
            taken = blocks["taken"][0, k] if k < self._sources else -1
            if not 0 <= taken <= block * _BLOCK:
                found = f"in block {block}, {taken} samples of source {k} were taken before"
                rule = f"0 to {block * _BLOCK}, of {self._sources} sources"
                raise fault(self._file, found, rule, "delete it to have it built again")
            rows = np.flatnonzero(sources == k)
            numbers[rows] = taken + np.arange(len(rows))
        rows = slice(first - block * _BLOCK, first - block * _BLOCK + count)
        return sources[rows], numbers[rows]

    def taken(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source gives, int64 [sources]."""
        if self._sources == 1:
            return np.array([samples])
        block = max(samples - 1, 0) // _BLOCK
        sources, _ = self.place(block * _BLOCK, samples - block * _BLOCK)
        return self._blocks["taken"][block] + np.bincount(sources, minlength=self._sources)


def wanted_samples(samples: int, weights: Sequence[float]) -> list[int]:
    """Samples to index of each source for a blend of `samples`, with 0.5% to spare.

    One source alone is not blended and has none to spare, as in Megatron.
    """
    if len(weights) == 1:
        return [samples]
    return [math.ceil(samples * share * _SURPLUS) for share in _normalised(weights).tolist()]


def _normalised(weights: Sequence[float]) -> np.ndarray:
    """Weights over their sum, float64 [sources]."""
    found = np.array(weights, np.float64)
    if not len(found) or not found.min() >= 0 or not 0 < found.sum() < math.inf:
        raise ValueError(f"weights {weights}: finite, at least 0, and one above it")
    # Added one after another as Megatron does; numpy's sum and Python's own differ in the last bit.
    return found / found.cumsum()[-1]


def _tables(of: _Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """doc_idx i32 [epochs * sequences], sample_idx i32 [samples + 1, 2], shuffle_idx u32 [samples].

    The latter two are i64 where 32 bits do not suffice.
    """
    tokens, length, sequences = of.tokens, of.length, of.sequences
    epochs = -(-(of.samples * length + 1) // tokens)  # the fewest that hold them
    total, before_last = ((e * tokens - 1) // length for e in (epochs, epochs - 1))
    together, cuts = [epochs], [0, total]
    if epochs > 1 and of.samples - before_last < int(_LAST_EPOCH_APART * ((tokens - 1) // length)):
        together, cuts = [epochs - 1, 1], [0, before_last, total]
    entries = epochs * len(sequences)
    narrow = "<i4" if entries <= _MOST_NARROW else "<i8"
    unsigned = "<u4" if total <= _MOST_UNSIGNED else "<i8"
    names = ("doc_idx.npy", "sample_idx.npy", "shuffle_idx.npy", "built_from.json")
    docs, rows, shuffle, note = (Path(f"{of.stem}_{name}") for name in names)
    ends, shard = [sequences.start, sequences.stop], of.shard.fingerprint()
    built_from = json.dumps({"shard": shard, "sequences": ends, "samples": of.samples})
    if not (docs.exists() and rows.exists() and shuffle.exists()):
        # First of all the note, so that no file of ours ever lies there without it.
        _write(note, [built_from.encode()])
        random = np.random.RandomState(of.seed)  # one stream: the order of its uses matters
        epoch = np.arange(*ends, dtype="<i4")
        doc_idx = _shuffled(random, [np.tile(epoch, count) for count in together])
        _write(docs, [_header("<i4", (entries,)), doc_idx])
        chunks = _sample_rows(doc_idx, of.shard.sequence_lengths, length, narrow)
        _write(rows, chain([_header(narrow, (total + 1, 2))], chunks))
        del doc_idx, chunks
        parts = [np.arange(*part, dtype=unsigned) for part in pairwise(cuts)]
        _write(shuffle, [_header(unsigned, (total,)), _shuffled(random, parts)])
    # Megatron's own files have no note.
    if note.exists() and (found := note.read_text(errors="replace")) != built_from:
        found, rule = f"beside files built from {found}", f"this source needs {built_from}"
        cure = "give sources of one file name caches of their own, or delete these files"
        raise fault(note, found, rule, cure)
    return (
        _load(docs, ["<i4"], (entries,)),
        _load(rows, [narrow, "<i8"], (total + 1, 2)),  # i64 in some forks of Megatron always
        _load(shuffle, [unsigned], (total,)),
    )


def _shuffled(random: np.random.RandomState, parts: list[np.ndarray]) -> np.ndarray:
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _sample_rows(
    doc_idx: np.ndarray, lengths: np.ndarray, length: int, dtype: str
) -> Iterator[np.ndarray]:
    """sample_idx in chunks: row i is where token i * length of the stream lies.

    That is its place in `doc_idx` and its offset there; sequences without tokens hold none.
    """
    start = row = 0
    for first in range(0, len(doc_idx), _CHUNK):
        counts = lengths[doc_idx[first : first + _CHUNK]]
        ends = start + np.cumsum(counts, dtype=np.int64)
        next_start = int(ends[-1])
        next_row = -(-next_start // length)
        tokens = np.arange(row, next_row) * length
        at = np.searchsorted(ends, tokens, side="right")
        rows = np.empty((len(tokens), 2), dtype)
        rows[:, 0] = first + at
        rows[:, 1] = tokens - (ends - counts)[at]
        if row == 0:
            rows[:1] = 0  # Megatron begins at the first sequence even if that has no tokens
        yield rows
        start, row = next_start, next_row


def _blend(weights: np.ndarray, blocks: int, record: np.dtype) -> Iterator[np.ndarray]:
    """Records of the first `blocks` blocks of a blend, in runs of some.

    Each choice depends on all before it, yet streams that start in different states soon agree. So
    256 stretches are computed side by side from guessed states, and again from where the one
    before really ended until each starts there: the result is exact, only the time is a matter of
    the guesses (at worst every pass mends one stretch).
    """
    chunks = -(-blocks // _STREAMS)
    streams = -(-blocks // chunks)
    starts = np.arange(streams, dtype=np.float64) * (chunks * _BLOCK)
    taken = np.full((chunks + 1, streams, len(weights)), -1.0)  # exact: counts below 2^53
    shares = weights * starts[:, None]
    taken[0] = np.floor(shares)
    missing = starts - taken[0].sum(axis=1)
    taken[0] += (taken[0] - shares).argsort(axis=1).argsort(axis=1) < missing[:, None]
    sources = np.empty((streams, chunks, _BLOCK), np.uint8)
    wrong = np.arange(streams)
    while len(wrong):
        scale = len(wrong) * _BLOCK
        bar = tqdm(range(chunks), "blend", unit_scale=scale, delay=2, disable=None, leave=False)
        for chunk in bar:
            at = starts[wrong] + chunk * _BLOCK
            sources[wrong, chunk], after = _greedy(weights, at, taken[chunk, wrong])
            if np.array_equal(after, taken[chunk + 1, wrong]):
                break  # from here on nothing differs from the pass before
            taken[chunk + 1, wrong] = after
        wrong = 1 + np.flatnonzero((taken[0, 1:] != taken[-1, :-1]).any(axis=1))
        taken[0, wrong] = taken[-1, wrong - 1]
    for stream in range(streams):
        records = np.empty(min(chunks, blocks - stream * chunks), record)
        records["taken"] = taken[: len(records), stream]
        records["sources"] = sources[stream, : len(records)]
        yield records


def _greedy(weights: np.ndarray, at: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, ...]:
    """A block of choices for each stream: (sources u8 [streams, _BLOCK], `taken` after it).

    Streams stand at samples `at`, float64 [streams], having `taken`, float64 [streams, sources].
    """
    sources = np.empty((len(at), _BLOCK), np.uint8)
    taken, behind = taken.copy(), np.empty_like(taken)
    flat, first_of_row = taken.reshape(-1), np.arange(len(at)) * len(weights)
    for i in range(_BLOCK):
        np.multiply(weights, np.maximum(at + i, 1)[:, None], out=behind)
        np.subtract(behind, taken, out=behind)
        sources[:, i] = picked = behind.argmax(axis=1)  # the lowest of equals
        flat[first_of_row + picked] += 1
    return sources, taken


def _load(path: Path, dtypes: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An array in a .npy file, memory-mapped; a plain array, whose slices are quick to make."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        fits, found = array.dtype in map(np.dtype, dtypes), f"{array.dtype} {list(array.shape)}"
    except Exception as error:  # numpy's reader lets through whatever a damaged header causes
        fits, found = False, f"cannot be read: {error}"
    if not fits or array.shape != shape:
        rule = f"the data and settings call for {np.dtype(dtypes[0])} {list(shape)}, whole"
        raise fault(path, found, rule, "delete it to have it built again")
    return array.view(np.ndarray)


def _header(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """What stands before the entries of an array in a .npy file."""
    file, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    about = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def _write(path: Path, parts: Iterable[Any]) -> None:
    """Write a file aside and rename it: whoever builds it at the same time writes the same."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        found = f"cannot be written: {error.strerror or error}"
        rule = "the folder of the sample order is writable and has room"
        raise fault(path, found, rule, "free space there or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
