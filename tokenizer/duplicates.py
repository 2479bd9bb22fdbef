"""Exact duplicates of lines and documents, found on disk: memory does not grow with their number.

As BLOOM did (arXiv 2303.03915, section 3): lines are stripped, and empty and already seen ones
dropped; then documents whose text, spaces apart, was seen before. The first occurrence in the order
of the inputs stays. "Seen" is equality of 128-bit BLAKE2b hashes: the same on every machine, and
two different texts in 10^12 collide with probability below 10^-14.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
_HASH_BYTES = 16
_BUFFER_RECORDS = 2**18  # kept in memory before they go to disk
_BUCKET_RECORDS = 2**21  # sorted in memory at once (48 MiB)
_FAN_OUT_BITS = 6


class Seen:
    """Which items of a stream occurred before: one bit an item, mapped from a file."""

    def __init__(self, path: Path) -> None:
        self._bits = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, "u1")

    def __getitem__(self, number: int) -> bool:
        return bool(self._bits[number >> 3] >> (number & 7) & 1)


def find_seen(texts: Iterable[str], path: Path) -> Seen:
    """Write to `path` which of `texts` repeat an earlier one; uses the folder PATH.work."""
    work = Path(f"{path}.work")
    shutil.rmtree(work, ignore_errors=True)
    (work / "buckets").mkdir(parents=True)
    count = 0
    with (work / "repeated").open("wb") as repeated:
        for records in _hashed(texts):
            count += len(records)
            # What repeats within a buffer is settled here: else all copies of a line that is
            # everywhere, a closing brace say, would meet in one bucket.
            first_ones, numbers = _first_ones(records)
            repeated.write(numbers.tobytes())
            _spread(first_ones, work / "buckets", 0)
        for numbers in _repeated(work / "buckets", _FAN_OUT_BITS):
            repeated.write(numbers.tobytes())
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.truncate(-(-count // 8))
    if count:
        bits = np.memmap(partial, np.uint8, "r+")
        with (work / "repeated").open("rb") as repeated:
            while content := repeated.read(8 * _BUFFER_RECORDS):
                numbers = np.frombuffer(content, "<i8")
                np.bitwise_or.at(bits, numbers >> 3, (1 << (numbers & 7)).astype(np.uint8))
        bits.flush()
    partial.replace(path)
    shutil.rmtree(work)
    return Seen(path)


def lines_of(document: str) -> list[str]:
    """The lines of a document, stripped, without empty ones."""
    return [line for part in document.split("\n") if (line := part.strip())]


def without_spaces(document: str) -> str:
    """What makes two documents the same: their text without white space."""
    return "".join(document.split())


def _hashed(texts: Iterable[str]) -> Iterator[np.ndarray]:
    buffer, first = bytearray(), 0
    for text in texts:
        buffer += hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()
        if len(buffer) == _BUFFER_RECORDS * _HASH_BYTES:
            yield _records(buffer, first)
            first += _BUFFER_RECORDS
            buffer.clear()
    if buffer:
        yield _records(buffer, first)


def _records(hashes: bytearray, first: int) -> np.ndarray:
    parts = np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2)
    records = np.empty(len(parts), _RECORD)
    records["high"], records["low"] = parts[:, 0], parts[:, 1]
    records["number"] = np.arange(first, first + len(parts))
    return records


def _spread(records: np.ndarray, folder: Path, used_bits: int) -> None:
    """Append records to files by the next bits of their hashes."""
    shift = np.uint64(64 - used_bits - _FAN_OUT_BITS)
    buckets = (records["high"] >> shift) & np.uint64(2**_FAN_OUT_BITS - 1)
    order = np.argsort(buckets, kind="stable")
    borders = np.searchsorted(buckets[order], np.arange(2**_FAN_OUT_BITS + 1))
    for bucket, (begin, end) in enumerate(pairwise(borders)):
        if begin < end:
            with (folder / f"{bucket:02x}").open("ab") as file:
                file.write(records[order[begin:end]].tobytes())


def _repeated(folder: Path, used_bits: int) -> Iterator[np.ndarray]:
    """Numbers of the records in a folder of buckets whose hash has a smaller number, int64."""
    for path in sorted(folder.iterdir()):
        # Equal hashes cannot be told apart by more bits, so those are sorted whatever their number.
        if path.stat().st_size > _BUCKET_RECORDS * _RECORD.itemsize and used_bits + 6 <= 64:
            deeper = folder / f"{path.name}.split"
            deeper.mkdir()
            with path.open("rb") as file:
                while content := file.read(_BUFFER_RECORDS * _RECORD.itemsize):
                    _spread(np.frombuffer(content, _RECORD), deeper, used_bits)
            path.unlink()
            yield from _repeated(deeper, used_bits + _FAN_OUT_BITS)
            continue
        yield _first_ones(np.fromfile(path, _RECORD))[1]


def _first_ones(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the records of each hash's smallest number, the numbers of all others as int64)."""
    order = np.lexsort((records["number"], records["low"], records["high"]))
    high, low = records["high"][order], records["low"][order]
    again = np.zeros(len(records), bool)
    again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return records[order[~again]], records["number"][order[again]].astype("<i8")
