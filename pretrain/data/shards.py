"""Token shards: PREFIX.bin and PREFIX.idx in Megatron's MMap format, read and written.

PREFIX.bin holds the tokens of all documents one after another. PREFIX.idx (little-endian) holds
magic, u64 version, u8 dtype code, u64 sequences N, u64 D = documents + 1, then i32 [N] lengths in
tokens, i64 [N] byte offsets into .bin, i64 [D] first sequence of each document. The format is that
of Megatron-DeepSpeed `megatron/data/indexed_dataset.py`; corpora made for BLOOM open as they are.
"""

import hashlib
import os
import struct
from bisect import bisect_right
from pathlib import Path

import numpy as np

from pretrain.config import TOKEN_DTYPES
from pretrain.errors import DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, D
DTYPES = {code: np.dtype(name) for code, name in TOKEN_DTYPES.items()}
_FLOAT_CODES = (6, 7)
_SMALL_VOCAB = 65_500  # below it Megatron stores u16, else i32
_LONGEST_DOCUMENT = 2**31 - 1  # tokens; lengths are i32
_CHUNK = 2**18  # documents handled at once when the index is written


class Shard:
    """An encoded corpus on disk, memory-mapped: opening it and every lookup is O(1) or O(log n).

    Attributes: `prefix`, `dtype` of the stored tokens, and the numbers of `tokens`, `documents` and
    `sequences` (a document has several where the text was split into sentences).
    """

    @classmethod
    def open(cls, prefix: Path | str) -> "Shard":
        """Open PREFIX.bin and PREFIX.idx. Raises DataError if they are absent or do not fit.

        Checked: all of the header, both sizes, the ends of the three tables; not their insides,
        which are checked entry by entry as they are used.
        """
        return cls(Path(prefix))

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._bin, self._idx = bin_and_idx(prefix)
        try:
            bin_bytes, idx_bytes = self._bin.stat().st_size, self._idx.stat().st_size
            with self._idx.open("rb") as file:
                header = file.read(HEADER.size)
        except OSError as error:
            raise fault(
                Path(error.filename or prefix),
                error.strerror or str(error),
                "a source is two readable files, PATH.bin and PATH.idx",
                "check the source's path, which has no suffix, or encode it",
            ) from None
        self.dtype, self.sequences, ends = _parse_header(self._idx, header, idx_bytes)
        if self.sequences == 0 or ends < 2:
            raise fault(
                self._idx,
                f"{self.sequences} sequences in {max(ends - 1, 0)} documents",
                "a source holds at least one document",
                "encode some text",
            )
        self.documents = ends - 1
        at = HEADER.size
        self._lengths = _map(self._idx, "<i4", at, self.sequences)
        self._pointers = _map(self._idx, "<i8", at + 4 * self.sequences, self.sequences)
        self._doc_idx = _map(self._idx, "<i8", at + 12 * self.sequences, ends)
        self._check_ends(bin_bytes)
        self.tokens = bin_bytes // self.dtype.itemsize
        self._tokens = _map(self._bin, self.dtype, 0, self.tokens)

    def _check_ends(self, bin_bytes: int) -> None:
        """The first and last entries of the tables, against each other and the size of .bin."""
        first, last = int(self._doc_idx[0]), int(self._doc_idx[-1])
        if first != 0 or last != self.sequences:
            raise fault(
                self._idx,
                f"documents run from sequence {first} to {last}",
                f"they run from 0 to the number of sequences, {self.sequences}",
                "the index is damaged: encode or copy the source again",
            )
        start, length = int(self._pointers[-1]), int(self._lengths[-1])
        expected = start + length * self.dtype.itemsize
        if self._pointers[0] != 0 or start < 0 or length < 0:
            raise fault(
                self._idx,
                f"sequences from byte {self._pointers[0]}, the last of {length} "
                f"tokens at byte {start}",
                "they begin at byte 0 and none is negative",
                "the index is damaged: encode or copy the source again",
            )
        if bin_bytes != expected:
            raise fault(
                self._bin,
                f"{bin_bytes:,} bytes",
                f"its index promises {expected:,} (last sequence: {length:,} tokens of "
                f"{self.dtype.itemsize} bytes from byte {start:,})",
                "one of the two is cut short or not of this pair: copy both again",
            )
        if bin_bytes == 0 or bin_bytes % self.dtype.itemsize:
            raise fault(
                self._bin,
                f"{bin_bytes:,} bytes",
                f"one or more whole tokens of {self.dtype.itemsize} bytes",
                "encode the source again",
            )

    def read(self, token_offset: int, count: int) -> np.ndarray:
        """Tokens [token_offset, token_offset + count), int64 [count], across document borders."""
        if not 0 <= token_offset <= token_offset + count <= self.tokens:
            raise ValueError(f"tokens [{token_offset}, +{count}) of {self.tokens} in {self.prefix}")
        return self._tokens[token_offset : token_offset + count].astype(np.int64)

    def document_start(self, document: int) -> int:
        """Token offset at which a document begins; that of document `documents` is `tokens`."""
        if not 0 <= document <= self.documents:
            raise ValueError(f"document {document} of {self.documents} in {self.prefix}")
        sequence = int(self._doc_idx[document])
        if sequence == self.sequences:
            return self.tokens
        if 0 <= sequence < self.sequences:
            start, rest = divmod(int(self._pointers[sequence]), self.dtype.itemsize)
            if rest == 0 and 0 <= start <= self.tokens:
                return start
        raise fault(
            self._idx,
            f"document {document} begins at sequence {sequence}, which is not "
            "there or begins outside the tokens",
            f"{self.sequences} sequences of {self.tokens} tokens in all",
            "the index is damaged: encode or copy the source again",
        )

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 [sequences], mapped from the file."""
        return self._lengths

    def sequence_starts(self, sequences: np.ndarray) -> np.ndarray:
        """Token offsets at which `sequences` begin, int64."""
        return self._pointers[sequences] // self.dtype.itemsize

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, byte offsets, first sequence of each document), mapped; for a full check."""
        return self._lengths, self._pointers, self._doc_idx

    @property
    def stored_tokens(self) -> np.ndarray:
        """All tokens as they are stored, mapped."""
        return self._tokens

    def document_at(self, token_offset: int) -> int:
        """The document that holds a token; O(log documents)."""
        if not 0 <= token_offset < self.tokens:
            raise ValueError(f"token {token_offset} of {self.tokens} in {self.prefix}")
        return bisect_right(range(self.documents), token_offset, key=self.document_start) - 1

    def fingerprint(self) -> str:
        """Hex digest of sizes, header and 64 evenly spaced blocks of 4 KiB of each file.

        O(1): all of a shard up to 256 KiB; in a larger one a change between the blocks that keeps
        the sizes goes unseen.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path in (self._idx, self._bin):
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(struct.pack("<Q", size))
                for block in range(64):
                    file.seek(max(size - 4096, 0) * block // 63)
                    digest.update(file.read(4096))
        return digest.hexdigest()


def bin_and_idx(prefix: Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def fault(path: object, found: str, rule: str, cure: str) -> DataError:
    return DataError(f"{path}: {found}\n      rule: {rule}\n      cure: {cure}")


def _map(path: Path, dtype: str | np.dtype, offset: int, count: int) -> np.ndarray:
    """A read-only view of a file; a plain array, since slices of np.memmap are slow to make."""
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


def _parse_header(path: Path, header: bytes, idx_bytes: int) -> tuple[np.dtype, int, int]:
    """(dtype, sequences, documents + 1), of an index whose size agrees with them."""
    again = "encode the source again, or copy it again if the copy was cut short"
    if len(header) < HEADER.size:
        raise fault(path, f"{idx_bytes} bytes", f"the header alone has {HEADER.size}", again)
    magic, version, code, sequences, ends = HEADER.unpack(header)
    if magic != MAGIC:
        raise fault(
            path,
            f"begins with {magic!r}",
            f"an index begins with {MAGIC!r}",
            "give a source in Megatron's MMap format",
        )
    if version != 1:
        raise fault(path, f"version {version}", "only version 1 of the format is known", again)
    if code in _FLOAT_CODES:
        raise fault(
            path,
            f"dtype code {code} (float64)",
            "token ids are integers",
            "encode the source again as token ids",
        )
    if code not in DTYPES:
        raise fault(path, f"dtype code {code}", f"one of {sorted(DTYPES)}", again)
    expected = HEADER.size + 12 * sequences + 8 * ends
    if idx_bytes != expected:
        raise fault(
            path,
            f"{idx_bytes:,} bytes",
            f"the header ({sequences:,} sequences, "
            f"{ends:,} document borders) calls for {expected:,}",
            again,
        )
    return DTYPES[code], sequences, ends
