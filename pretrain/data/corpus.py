"""The samples of a run: sample number -> seq_len + 1 tokens, from nothing but seed and config.

A rank asks for its rows of a step by their global numbers, so what a step trains on does not depend
on the number of ranks, and to resume is to go on counting.
"""

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from pretrain.config import Data
from pretrain.data.megatron import Blend, MegatronIndex, wanted_samples
from pretrain.data.mixture import PERIOD, Mixture, quantise
from pretrain.data.shards import Shard
from pretrain.data.streams import KeyedStream, MegatronStream, Span
from pretrain.errors import DataError

Split = Literal["train", "validation"]


class Location(NamedTuple):
    """Where a sample lies: its source, the pass over it (None: not known) and its documents."""

    source: str
    epoch: int | None
    spans: list[Span]


class SourceSummary(NamedTuple):
    """What a run takes from one source; `available_tokens` are those of the split."""

    source: str
    available_tokens: int
    samples: int
    tokens: int
    share: float
    epochs: float


class Corpus:
    """One split of all sources with a positive weight, as an endless axis of samples.

    As in BLOOM, a source's documents [0, round((1 - validation_fraction) * documents)) are for
    training and the rest for validation. A sample is `sequence_length + 1` tokens of the split's
    concatenated documents; neighbours share one token, which is a label of one and an input of the
    next. No token, label or input, is in both splits. The stages of the mixture are for training:
    validation has the first weights throughout, so that its losses compare.

    `samples`, the length of the run, is needed for order = "megatron" only, whose order depends on
    it (Megatron's --train-samples). Raises DataError for sources that are absent, damaged or too
    small for one sample.
    """

    def __init__(
        self, data: Data, seed: int, vocab_size: int, split: Split, samples: int | None = None
    ) -> None:
        self._data, self._seed, self._vocab_size, self._split = data, seed, vocab_size, split
        if split == "validation" and data.validation_fraction == 0:
            raise DataError(
                "data.validation_fraction = 0 leaves no documents to validate on; raise it, or "
                "remove validation.every"
            )
        stages: list[tuple[int, Mapping[str, float]]]
        stages = [(0, {source.name: source.weight for source in data.sources})]
        if split == "train":
            length = data.sequence_length
            stages += [(s.begins.samples(length), s.weights) for s in data.mixture.stages]
        megatron = data.order == "megatron" and split == "train"
        # Megatron reads a source of weight 0 too, where a blend has nothing better.
        used = [s for s in data.sources if megatron or any(w.get(s.name, 0) > 0 for _, w in stages)]
        shards = {source.name: Shard.open(source.path) for source in used}
        self._stages = [
            (first, quantise([self._weight(shards[s.name], w.get(s.name, 0)) for s in used]))
            for first, w in stages
        ]
        self._streams: list[KeyedStream | MegatronStream]
        self._mixture: Mixture | Blend
        self._samples = samples if megatron else None
        if megatron:
            if samples is None or data.index_directory is None:
                raise ValueError("order = 'megatron' needs `samples` and index_directory")
            weights = [source.weight for source in used]
            wanted = wanted_samples(samples, weights)
            self._streams = [
                self._megatron(source.name, shards[source.name], count)
                for source, count in zip(used, wanted, strict=True)
            ]
            self._mixture = Blend.open(weights, samples, data.index_directory)
        else:
            self._streams = [self._keyed(source.name, shards[source.name]) for source in used]
            self._mixture = Mixture(self._stages, seed)

    def _weight(self, shard: Shard, weight: float) -> Fraction:
        """weight * min(tokens, cap)^alpha."""
        mixture, tokens = self._data.mixture, shard.tokens
        if mixture.cap is not None:
            length = self._data.sequence_length
            tokens = min(tokens, mixture.cap.samples(length) * length)
        return Fraction(weight) * Fraction(float(tokens) ** mixture.alpha)

    def _boundary(self, items: int) -> int:
        """How many of `items` documents are for training, rounded to even halves as in Megatron."""
        # In decimals, since 1 - 0.07 is not the 0.93 that one would write for Megatron.
        return round(float(1 - Decimal(str(self._data.validation_fraction))) * items)

    def _first_held_out(self, shard: Shard) -> int:
        """The token at which validation begins."""
        if self._data.order == "keyed":
            return shard.document_start(self._boundary(shard.documents))
        # Megatron counts sequences; a document is one of them, but for split sentences.
        boundary = self._boundary(shard.sequences)
        if boundary == shard.sequences:
            return shard.tokens
        return int(shard.sequence_starts(np.array([boundary]))[0])

    def _keyed(self, name: str, shard: Shard) -> KeyedStream:
        held_out, train = self._first_held_out(shard), self._split == "train"
        first = 0 if train else held_out
        tokens = (held_out if train else shard.tokens) - first
        self._check_size(name, shard, tokens)
        length = self._data.sequence_length
        return KeyedStream(name, shard, first, tokens, length, self._seed, self._split)

    def _megatron(self, name: str, shard: Shard, samples: int) -> MegatronStream:
        tokens, length = self._first_held_out(shard), self._data.sequence_length
        self._check_size(name, shard, tokens)
        # Files of Megatron's own, which do not name the source, find their place here too.
        folder = self._data.index_directory / name
        sequences = range(self._boundary(shard.sequences))
        index = MegatronIndex.open(shard, sequences, samples, length, self._seed, folder, "train")
        return MegatronStream(name, shard, tokens, length, index)

    def _check_size(self, name: str, shard: Shard, tokens: int) -> None:
        length, fraction = self._data.sequence_length, self._data.validation_fraction
        if tokens <= length:
            train = self._boundary(shard.documents)
            documents = train if self._split == "train" else shard.documents - train
            raise DataError(
                f"{shard.prefix}: source '{name}' has {tokens} tokens in {documents} "
                f"documents to use for {self._split} (validation_fraction = {fraction}), and one "
                f"sample needs {length + 1}; add text to it, shorten data.sequence_length, "
                f"change data.validation_fraction or give the source weight 0"
            )

    def batch(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) of the run, int64 [count, sequence_length + 1].

        Raises DataError if a token is not in the vocabulary.
        """
        sources, numbers = self._mixture.place(first, count)
        batch = np.empty((count, self._data.sequence_length + 1), np.int64)
        for k in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == k)
            batch[rows] = self._streams[k].rows(numbers[rows])
        if count and not (batch.min() >= 0 and batch.max() < self._vocab_size):
            raise self._out_of_vocabulary(batch, first)
        return batch

    def locate(self, sample: int) -> Location:
        """Where sample number `sample` comes from; for a look at the text behind a loss spike."""
        sources, numbers = self._mixture.place(sample, 1)
        stream, number = self._streams[int(sources[0])], int(numbers[0])
        return Location(stream.name, stream.epoch(number), stream.spans(number))

    def _out_of_vocabulary(self, batch: np.ndarray, first: int) -> DataError:
        row, column = np.argwhere((batch < 0) | (batch >= self._vocab_size))[0].tolist()
        source, _, spans = self.locate(first + row)
        at = column
        for span in spans:
            if at < span.tokens:
                break
            at -= span.tokens
        shard = next(stream.shard for stream in self._streams if stream.name == source)
        return DataError(
            f"{shard.prefix}.bin: source '{source}', document {span.document}, token offset "
            f"{span.token_offset + at}: id {batch[row, column]} "
            f"is not in the vocabulary of model.vocab_size = {self._vocab_size}; encode the source "
            f"with the run's tokenizer, or raise model.vocab_size"
        )

    def fingerprint(self, samples: int | None = None) -> dict[str, Any]:
        """What decides the first `samples` samples, or all, as JSON; the same, the same samples.

        Stages that begin later and their sources are left out: a run may be given new ones on its
        way. Shares are those of the samples as quantised, so scaling all weights changes nothing;
        paths are left out, since data may move. `hash` sums up the rest.
        """
        stages = [s for s in self._stages if samples is None or s[0] < max(samples, 1)]
        used = [k for k in range(len(self._streams)) if any(counts[k] for _, counts in stages)]
        found: dict[str, Any] = {
            "order": "keyed" if self._samples is None else f"megatron {self._samples}",
            "seed": self._seed,
            "split": self._split,
            "sequence_length": self._data.sequence_length,
            "validation_fraction": self._data.validation_fraction,
            "stages": [
                {
                    "first_sample": first,
                    "shares": {self._streams[k].name: counts[k] / PERIOD for k in used},
                }
                for first, counts in stages
            ],
            "sources": [self._source_facts[k] for k in used],
        }
        text = json.dumps(found, sort_keys=True).encode()
        return {**found, "hash": hashlib.blake2b(text, digest_size=16).hexdigest()}

    @cached_property
    def _source_facts(self) -> list[dict[str, Any]]:
        """What each source holds; read once, since every checkpoint asks for it."""
        return [
            {
                "name": stream.name,
                "shard": stream.shard.fingerprint(),
                "documents": stream.shard.documents,
                "tokens": stream.shard.tokens,
            }
            for stream in self._streams
        ]

    def summary(self, samples: int) -> list[SourceSummary]:
        """What the first `samples` samples take from each source; exact, one row per source."""
        taken = self._mixture.taken(samples)
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
