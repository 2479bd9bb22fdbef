"""The samples of a run: sample number -> seq_len + 1 tokens, from nothing but seed and config.

A rank asks for its rows of a step by their global numbers, so what a step trains on does not depend
on the number of ranks, and to resume is to go on counting.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pretrain.config import Data, Source
from pretrain.data.mixture import PERIOD, place, quantise
from pretrain.data.permutation import Permutation, derive_key
from pretrain.data.shards import Shard
from pretrain.errors import DataError

Split = Literal["train", "validation"]


class Location(NamedTuple):
    """Where a sample lies: its source by name, and there pass, first token and its document."""

    source: str
    epoch: int
    token_offset: int
    document: int


class SourceSummary(NamedTuple):
    """What a run takes from one source; `available_tokens` are those of the split."""

    source: str
    available_tokens: int
    samples: int
    tokens: int
    share: float
    epochs: float


@dataclass(frozen=True)
class _Stream:
    """The tokens of one split of one source, cut into samples and shuffled anew each epoch."""

    name: str
    shard: Shard
    first_token: int
    tokens: int
    length: int
    seed: int
    split: Split

    @property
    def epoch_samples(self) -> int:
        """Samples of one pass: each predicts `length` tokens, and the first token is never one."""
        return (self.tokens - 1) // self.length

    def find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, token offset in the shard) of samples `numbers` of this stream, int64 [n]."""
        epochs, positions = np.divmod(numbers, self.epoch_samples)
        offsets = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            key = derive_key(self.seed, "epoch", self.name, self.split, epoch)
            offsets[rows] = Permutation(self.epoch_samples, key)(positions[rows]) * self.length
        return epochs, offsets + self.first_token


class Corpus:
    """One split of all sources with a positive weight, as an endless axis of samples.

    As in BLOOM, a source's documents [0, round((1 - validation_fraction) * documents)) are for
    training and the rest for validation. A sample is `sequence_length + 1` tokens of the split's
    concatenated documents; neighbours share one token, which is a label of one and an input of the
    next. No token, label or input, is in both splits.

    Raises DataError for sources that are absent, damaged or too small for one sample.
    """

    def __init__(self, data: Data, seed: int, vocab_size: int, split: Split) -> None:
        self._data, self._seed, self._vocab_size, self._split = data, seed, vocab_size, split
        if split == "validation" and data.validation_fraction == 0:
            raise DataError(
                "data.validation_fraction = 0 leaves no documents to validate on; raise it, or "
                "remove validation.every"
            )
        sources = [source for source in data.sources if source.weight > 0]
        self._counts = quantise([source.weight for source in sources])
        self._streams = [self._open(source) for source in sources]

    def _open(self, source: Source) -> _Stream:
        shard, fraction = Shard.open(source.path), self._data.validation_fraction
        # Python's round is Megatron's (`get_split_by_range_`), halves to even included.
        boundary = round((1 - fraction) * shard.documents)
        train = self._split == "train"
        first = 0 if train else shard.document_start(boundary)
        end = shard.document_start(boundary) if train else shard.tokens
        length = self._data.sequence_length
        if end - first <= length:
            documents = boundary if train else shard.documents - boundary
            raise DataError(
                f"{source.path}: source '{source.name}' has {end - first} tokens in {documents} "
                f"documents to use for {self._split} (validation_fraction = {fraction}), and one "
                f"sample needs {length + 1}; add text to it, shorten data.sequence_length, "
                f"change data.validation_fraction or give the source weight 0"
            )
        return _Stream(source.name, shard, first, end - first, length, self._seed, self._split)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) of the run, int64 [count, sequence_length + 1].

        Raises DataError if a token is not in the vocabulary.
        """
        sources, numbers = place(first, count, self._counts, self._seed)
        width = self._data.sequence_length + 1
        batch = np.empty((count, width), np.int64)
        for k in np.unique(sources).tolist():
            stream, rows = self._streams[k], np.flatnonzero(sources == k)
            _, offsets = stream.find(numbers[rows])
            for row, offset in zip(rows.tolist(), offsets.tolist(), strict=True):
                batch[row] = stream.shard.read(offset, width)
        if count and not (batch.min() >= 0 and batch.max() < self._vocab_size):
            raise self._out_of_vocabulary(batch, first)
        return batch

    def locate(self, sample: int) -> Location:
        """Where sample number `sample` comes from; for a look at the text behind a loss spike."""
        stream, epoch, offset = self._find(sample)
        return Location(stream.name, epoch, offset, stream.shard.document_at(offset))

    def _find(self, sample: int) -> tuple[_Stream, int, int]:
        sources, numbers = place(sample, 1, self._counts, self._seed)
        stream = self._streams[int(sources[0])]
        epochs, offsets = stream.find(numbers)
        return stream, int(epochs[0]), int(offsets[0])

    def _out_of_vocabulary(self, batch: np.ndarray, first: int) -> DataError:
        row, column = np.argwhere((batch < 0) | (batch >= self._vocab_size))[0].tolist()
        stream, _, offset = self._find(first + row)
        offset += column
        return DataError(
            f"{stream.shard.prefix}.bin: source '{stream.name}', document "
            f"{stream.shard.document_at(offset)}, token offset {offset}: id {batch[row, column]} "
            f"is not in the vocabulary of model.vocab_size = {self._vocab_size}; encode the source "
            f"with the run's tokenizer, or raise model.vocab_size"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples of this corpus, as JSON; equal fingerprints, equal samples.

        `weight` is the share of the samples as quantised, so scaling all weights changes nothing;
        paths are left out, since data may move. `hash` sums up the rest.
        """
        found: dict[str, Any] = {
            "seed": self._seed,
            "split": self._split,
            "sequence_length": self._data.sequence_length,
            "validation_fraction": self._data.validation_fraction,
            "sources": [
                {
                    "name": stream.name,
                    "weight": count / PERIOD,
                    "shard": stream.shard.fingerprint(),
                    "documents": stream.shard.documents,
                    "tokens": stream.shard.tokens,
                }
                for stream, count in zip(self._streams, self._counts.tolist(), strict=True)
            ],
        }
        text = json.dumps(found, sort_keys=True).encode()
        return {**found, "hash": hashlib.blake2b(text, digest_size=16).hexdigest()}

    def summary(self, samples: int) -> list[SourceSummary]:
        """What the first `samples` samples take from each source; exact, one row per source."""
        periods, rest = divmod(samples, PERIOD)
        sources, _ = place(periods * PERIOD, rest, self._counts, self._seed)
        taken = periods * self._counts + np.bincount(sources, minlength=len(self._counts))
        return [
            SourceSummary(
                source=stream.name,
                available_tokens=stream.tokens,
                samples=count,
                tokens=count * stream.length,
                share=count / max(samples, 1),
                epochs=count / stream.epoch_samples,
            )
            for stream, count in zip(self._streams, taken.tolist(), strict=True)
        ]
