"""Writing token shards in bounded memory; a kill costs no more than what was not committed."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.shards import DTYPES, HEADER, MAGIC, bin_and_idx, fault

_SMALL_VOCAB = 65_500  # below it Megatron stores u16, else i32
_LONGEST_DOCUMENT = 2**31 - 1  # tokens; lengths are i32
_CHUNK = 2**18  # documents handled at once when the index is written


class Position(NamedTuple):
    """How far a shard is safely on disk."""

    documents: int
    tokens: int


class ShardWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx as they come, in bounded memory.

    A context manager: files take their names when it is left in peace, and an error or a kill
    leaves no shard. With `keep`, what is half done stays on disk as PREFIX.*.partial, another
    writer goes on from a `Position` that `commit` has returned, and the caller seals and publishes.

    Raises DataError for ids outside the vocabulary, no documents, a full disk, and for partial
    files that do not reach `resume`.
    """

    def __init__(
        self,
        prefix: Path | str,
        vocab_size: int,
        keep: bool = False,
        resume: Position | None = None,
    ) -> None:
        self.prefix, self.vocab_size = Path(prefix), vocab_size
        self.dtype = np.dtype("<u2" if vocab_size < _SMALL_VOCAB else "<i4")
        self.documents, self.tokens = resume or (0, 0)
        self._keep, self._resume = keep, resume
        self._bin, self._idx = bin_and_idx(self.prefix)
        self._partial_bin, self._partial_idx, self._spool = partial_files(self.prefix)

    def __enter__(self) -> "ShardWriter":
        with self._writing():
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._tokens_file = self._open(self._partial_bin, self.tokens * self.dtype.itemsize)
            # Lengths wait on disk until the header, which counts them, can be written.
            self._lengths_file = self._open(self._spool, 4 * self.documents)
        return self

    def _open(self, path: Path, size: int) -> Any:
        """A file to append to, cut to the size it had at the position to resume from."""
        if self._resume is None:
            return path.open("wb", buffering=2**20)
        if not path.exists() or path.stat().st_size < size:
            raise fault(
                path,
                f"{path.stat().st_size if path.exists() else 0:,} bytes",
                f"{size:,} were written before the interruption",
                "the file was damaged since: begin anew with --restart",
            )
        file = path.open("r+b", buffering=2**20)
        file.truncate(size)
        file.seek(size)
        return file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._keep:
                self.seal()
                publish(self.prefix)
        finally:
            for file in (self._tokens_file, self._lengths_file):
                with contextlib.suppress(OSError):  # what cannot be flushed was not committed
                    file.close()
            if not self._keep:
                remove_partial_files(self.prefix)

    def append(self, ids: Sequence[int] | np.ndarray) -> None:
        """Write one document: its token ids, at least one."""
        self.extend(np.asarray(ids), np.array([len(ids)], np.int32))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Write documents: their ids one after another, and int32 [documents] lengths, none 0."""
        if len(lengths) == 0:
            return
        if lengths.min() < 1 or len(ids) > _LONGEST_DOCUMENT or lengths.sum() != len(ids):
            raise fault(
                self._bin,
                f"documents {self.documents} to {self.documents + len(lengths) - 1} of "
                f"{lengths.min():,} to {lengths.max():,} tokens",
                f"a document has 1 to {_LONGEST_DOCUMENT:,}",
                "skip or split it",
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            bad = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            document = self.documents + int(np.searchsorted(np.cumsum(lengths), bad, "right"))
            raise fault(
                self._bin,
                f"document {document} holds ids {low} to {high}",
                f"ids are 0 to vocab_size - 1 = {self.vocab_size - 1}",
                "give the vocab_size of the tokenizer that encoded it",
            )
        with self._writing():
            self._tokens_file.write(ids.astype(self.dtype).tobytes())
            self._lengths_file.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def commit(self) -> Position:
        """Make all that was written survive a crash; another writer can `resume` here."""
        with self._writing():
            for file in (self._tokens_file, self._lengths_file):
                file.flush()
                os.fsync(file.fileno())
        return Position(self.documents, self.tokens)

    def seal(self) -> None:
        """Write the index beside the tokens; both still wait for `publish` to be named."""
        if self.documents == 0:
            raise fault(
                self._bin,
                "no documents",
                "a shard holds at least one",
                "check that the input has text",
            )
        self.commit()
        with self._writing(), self._partial_idx.open("wb") as index:
            self._write_index(index.write)
            index.flush()
            os.fsync(index.fileno())

    def _write_index(self, write: Callable[[bytes], int]) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        write(HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1))
        for lengths in self._spooled_lengths():
            write(lengths.tobytes())
        start = 0
        for lengths in self._spooled_lengths():
            ends = start + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            write((ends - lengths * self.dtype.itemsize).tobytes())
            start = int(ends[-1])
        for first in range(0, self.documents + 1, _CHUNK):
            last = min(first + _CHUNK, self.documents + 1)
            write(np.arange(first, last, dtype="<i8").tobytes())

    def _spooled_lengths(self) -> Iterator[np.ndarray]:
        with self._spool.open("rb") as file:
            while chunk := file.read(4 * _CHUNK):
                yield np.frombuffer(chunk, "<i4").astype("<i4")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "free space there or choose another place" if full else "check the path"
            raise fault(
                self._bin,
                f"cannot be written: {error.strerror}",
                "the shard's folder is writable and has room",
                cure,
            ) from error


def partial_files(prefix: Path) -> tuple[Path, Path, Path]:
    """Where tokens, index and lengths lie until the shard is whole."""
    tokens, index, lengths = (
        Path(f"{prefix}.{name}.partial") for name in ("bin", "idx", "lengths")
    )
    return tokens, index, lengths


def publish(prefix: Path) -> None:
    """Give the files of a sealed shard their names; to be called again after an interruption."""
    final_bin, final_idx = bin_and_idx(prefix)
    partial_bin, partial_idx, spool = partial_files(prefix)
    # Without an index nothing opens, so an old one goes first and the new one comes last.
    if partial_bin.exists():
        final_idx.unlink(missing_ok=True)
        partial_bin.replace(final_bin)
    if partial_idx.exists():
        partial_idx.replace(final_idx)
    spool.unlink(missing_ok=True)


def remove_partial_files(prefix: Path) -> None:
    """Forget what is half done."""
    for path in partial_files(prefix):
        path.unlink(missing_ok=True)
