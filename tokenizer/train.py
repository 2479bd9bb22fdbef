"""Training a tokenizer: BLOOM's byte-level BPE without normalisation, or sentencepiece.

BLOOM's is reversible for any text, spaces and line ends included. Its pre-tokenizer's regex is that
of `tokenizer.json` of bigscience/bloom, its nested character class written flat, which is the same.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import ByteSize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pretrain.errors import DataError
from tokenizer.config import SMALLEST, SPECIAL_TOKENS, TokenizerConfig
from tokenizer.folder import check_absent, new_folder, save
from tokenizer.sampling import Draw, allocate, draw_text, find_sources, measure

__all__ = ["TrainingReport", "save", "train", "train_bpe"]

# A piece is a run of anything but space and punctuation, with the one space before it; what lies
# between such runs stays in one piece.
_PIECE = r" ?[^()|\s.,!?…。，、।۔،]+"


@dataclass(frozen=True)
class TrainingReport:
    """What a training did; as text a table of at most 80 columns."""

    config: TokenizerConfig
    draws: tuple[Draw, ...]
    tokens: int  # with the special ones; fewer than asked for where the text has no more

    def __str__(self) -> str:
        config, taken = self.config, sum(draw.taken for draw in self.draws)
        lines = [f"{'source':<26}{'text':>10}{'wanted':>10}{'sampled':>10}{'got':>10}"]
        for draw in self.draws:
            lines.append(
                f"{draw.name[:25]:<26}{_size(draw.bytes):>10}{draw.share:>10.2%}"
                f"{_size(draw.taken):>10}{draw.taken / taken:>10.2%}"
                f"{'  whole' if draw.whole else ''}"
            )
        total = _size(sum(draw.bytes for draw in self.draws))
        lines.append(f"{'all':<26}{total:>10}{1:>10.2%}{_size(taken):>10}{1:>10.2%}")
        if whole := [draw for draw in self.draws if draw.whole]:
            lines.append(
                f"{len(whole)} of {len(self.draws)} sources are used whole: their shares would "
                "need more than\nthey have, the others fill the rest"
            )
        lines += ["", f"family: {config.family}", f"tokens trained: {self.tokens}"]
        if self.tokens < config.tokens:
            lines[-1] += f" of {config.tokens}: the text has no more pairs to merge"
        lines += [
            f"ids without a token: {config.rows - self.tokens}",
            f"for the run config: model.vocab_size = {config.rows}",
            f"folder: {config.output}",
        ]
        return "\n".join(lines)


def train(config: TokenizerConfig) -> TrainingReport:
    """Read the text twice (to count, to sample), train, and write the folder `config.output`.

    The folder has tokenizer.json and tokenizer_config.json for `transformers`, training.json with
    all that went into it, and sentencepiece.model for those families. Progress goes to stderr.
    Raises DataError for text that cannot be read, an output in use, or a vocabulary that does not
    fit the text.
    """
    check_absent(config.output)
    sources = find_sources(config)
    draws = measure(sources, config.field)
    shares, quotas = allocate([d.bytes for d in draws], config.alpha, config.sample)
    for draw, share, quota in zip(draws, shares, quotas, strict=True):
        draw.share, draw.quota = share, quota
    documents = _told(draw_text(sources, draws, config.field, config.seed))
    model = None
    if config.family == "byte-bpe":
        tokenizer = train_bpe(documents, config.tokens)
    else:
        from tokenizer.sentencepieces import to_tokenizer, train_sentencepiece

        model = train_sentencepiece(documents, config)
        tokenizer = to_tokenizer(model, config)
    if not any(draw.taken for draw in draws):
        raise DataError(
            f"sample = {config.sample}: no text was drawn for it; a sample holds many documents or "
            "parts of 4 kB; raise it, for example to 100MB"
        )
    report = TrainingReport(config, tuple(draws), tokenizer.get_vocab_size())
    with new_folder(config.output) as folder:
        save(tokenizer, folder)
        if model is not None:
            (folder / "sentencepiece.model").write_bytes(model)
        text = json.dumps(_record(report), indent=2, ensure_ascii=False) + "\n"
        (folder / "training.json").write_text(text, encoding="utf-8")
    return report


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` entries, or fewer where the text has no more pairs to merge.

    All 256 bytes and the special tokens are always in. Raises DataError for a smaller `vocab_size`.
    """
    if vocab_size < SMALLEST:
        raise DataError(
            f"vocab_size = {vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"at least {SMALLEST}; choose more, for example 32,000"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _told(documents: Iterator[str]) -> Iterator[str]:
    """Say when the last document is drawn: sentencepiece shows nothing of what follows."""
    yield from documents
    if sys.stderr.isatty():
        print("learning the vocabulary", file=sys.stderr)


def _record(report: TrainingReport) -> dict[str, Any]:
    """All that the tokenizer depends on, and nothing else: the same training, the same bytes."""
    settings = report.config.model_dump(mode="json", exclude={"output", "inputs", "sources"})
    return {
        "settings": settings,
        "tokens": report.tokens,
        "model_vocab_size": report.config.rows,
        "sources": [
            {
                "name": draw.name,
                "inputs": draw.files,
                "documents": draw.documents,
                "bytes": draw.bytes,
                "share_wanted": draw.share,
                "sampled_bytes": draw.taken,
                "whole": draw.whole,
            }
            for draw in report.draws
        ],
        "versions": {name: version(name) for name in ("anthesis", "tokenizers", "sentencepiece")},
    }


def _size(count: int) -> str:
    return ByteSize(count).human_readable(decimal=True)
