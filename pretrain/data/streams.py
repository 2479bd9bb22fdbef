"""One source as an endless axis of samples: where each lies, and its tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pretrain.data.megatron import MegatronIndex
from pretrain.data.permutation import Permutation, derive_key
from pretrain.data.shards import Shard


class Span(NamedTuple):
    """Consecutive tokens of one document, which begin at `token_offset` of the shard."""

    document: int
    token_offset: int
    tokens: int


@dataclass(frozen=True)
class KeyedStream:
    """The tokens of one split of a source, cut into windows and shuffled anew each epoch.

    `seed`, `name` and `split` key the permutation of an epoch; nothing is stored.
    """

    name: str
    shard: Shard
    first_token: int
    tokens: int
    length: int
    seed: int
    split: str

    @property
    def epoch_samples(self) -> int:
        """Samples of one pass: each predicts `length` tokens, and the first token is never one."""
        return (self.tokens - 1) // self.length

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Samples `numbers` of this stream, int64 [n, length + 1]."""
        rows = np.empty((len(numbers), self.length + 1), np.int64)
        for row, offset in enumerate(self.offsets(numbers).tolist()):
            rows[row] = self.shard.read(offset, self.length + 1)
        return rows

    def offsets(self, numbers: np.ndarray) -> np.ndarray:
        """Token offsets in the shard at which samples `numbers` begin, int64 [n]."""
        epochs, positions = np.divmod(numbers, self.epoch_samples)
        offsets = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            order = _order(self.epoch_samples, self.seed, self.name, self.split, epoch)
            offsets[rows] = order(positions[rows]) * self.length
        return offsets + self.first_token

    def epoch(self, number: int) -> int:
        """The pass that sample `number` belongs to, from 0."""
        return number // self.epoch_samples

    def spans(self, number: int) -> list[Span]:
        """The parts of documents that sample `number` is made of."""
        offset = int(self.offsets(np.array([number]))[0])
        return list(_cut(self.shard, offset, self.length + 1))


@dataclass(frozen=True)
class MegatronStream:
    """The train split of a source in the order that Megatron publishes."""

    name: str
    shard: Shard
    tokens: int
    length: int
    index: MegatronIndex

    @property
    def epoch_samples(self) -> int:
        """Samples of one pass."""
        return self.index.epoch_samples

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Samples `numbers` of this stream, int64 [n, length + 1]."""
        rows = [self.index.read(number) for number in numbers.tolist()]
        return np.array(rows, np.int64).reshape(len(numbers), self.length + 1)

    def epoch(self, number: int) -> None:
        """Unknown: Megatron shuffles its epochs together."""
        return None

    def spans(self, number: int) -> list[Span]:
        """The parts of documents that sample `number` is made of."""
        pieces = self.index.pieces(number)
        return [span for p in pieces for span in _cut(self.shard, p.token_offset, p.count)]


@lru_cache(maxsize=1024)  # of some sources and their latest epochs: a batch needs the same again
def _order(samples: int, seed: int, name: str, split: str, epoch: int) -> Permutation:
    return Permutation(samples, derive_key(seed, "epoch", name, split, epoch))


def _cut(shard: Shard, offset: int, tokens: int) -> Iterator[Span]:
    """The spans of a run of tokens, cut at the borders of documents."""
    end = offset + tokens
    document = shard.document_at(offset) if tokens else 0
    while offset < end:
        stop = min(end, shard.document_start(document + 1))
        if stop > offset:
            yield Span(document, offset, stop - offset)
        offset, document = max(stop, offset), document + 1
