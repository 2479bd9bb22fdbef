"""What the model sees: documents, samples by number, and the batch of any step, as text."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import Config
from pretrain.config_file import load
from pretrain.data.corpus import Corpus, Split
from pretrain.data.shards import Shard
from pretrain.errors import DataError, UserError
from tokenizer import manifest as manifests
from tokenizer.folder import load as load_tokenizer

_START_CHARACTERS = 42


def load_run(target: Path) -> Config | None:
    """The config that `target` is, or that a run's folder holds; None if it is neither."""
    if target.is_dir():
        target /= "config.toml"
    return load(target) if target.suffix == ".toml" else None


def open_corpus(config: Config, split: Split) -> Corpus:
    """The corpus that a run reads."""
    samples = config.build_recipe().train_samples
    return Corpus(config.data, config.seed, config.model.vocab_size, split, samples)


def show_document(prefix: Path, number: int, tokenizer_dir: Path | None) -> str:
    """Document `number` of a shard as text; the tokenizer is by default that of its manifest."""
    shard = Shard.open(prefix)
    if not 0 <= number < shard.documents:
        raise UserError(
            f"{prefix}: document {number} is not there\n"
            f"  rule: it has documents 0 to {shard.documents - 1}\n  cure: choose one of these"
        )
    start, end = shard.document_start(number), shard.document_start(number + 1)
    manifest = manifests.read(prefix)
    if tokenizer_dir is None and manifest and Path(manifest["tokenizer"]).exists():
        tokenizer_dir = Path(manifest["tokenizer"])
    return (
        f"document {number} of {prefix}: tokens {start:,} to {end - 1:,} ({end - start:,})\n"
        + _Decoder(tokenizer_dir)(shard.read(start, end - start))
    )


def show_sample(config: Config, sample: int, split: Split = "train") -> str:
    """A training sample by its number, with its source, documents and offsets."""
    recipe = config.build_recipe()
    # Held-out samples are as many as one asks for: they begin again after the last.
    last = recipe.total_samples - 1 if split == "train" else 2**62
    if not 0 <= sample <= last:
        raise UserError(
            f"sample {sample} is not in the run\n  rule: it has samples 0 to {last}\n"
            "  cure: choose one of these"
        )
    corpus, decode = open_corpus(config, split), _Decoder(config.data.tokenizer)
    clock = recipe.clock_at(samples=sample)
    when = f" (step {clock.step + 1}, row {sample - clock.samples})" if split == "train" else ""
    return _sample_text(corpus, sample, decode, when)


def show_step(config: Config, step: int, full: bool = False) -> str:
    """The batch of a step, counted from 1: a table of its samples, or with `full` all its text.

    `distinct` is the share of different tokens in a sample: low for text that repeats itself, a
    common cause of spikes in the loss.
    """
    recipe = config.build_recipe()
    if not 1 <= step <= recipe.total_steps:
        raise UserError(
            f"step {step} is not in the run\n  rule: it has steps 1 to {recipe.total_steps}\n"
            "  cure: choose one of these"
        )
    clock = recipe.clock_at(step=step - 1)
    batch = recipe.at(clock).batch_samples
    applied, _ = recipe.learning_rate_at(step)
    corpus, decode = open_corpus(config, "train"), _Decoder(config.data.tokenizer)
    lines = [
        f"step {step:,}: samples {clock.samples:,} to {clock.samples + batch - 1:,} "
        f"({batch} of {recipe.sequence_length} tokens), learning rate {applied:.4g}"
    ]
    numbers = range(clock.samples, clock.samples + batch)
    if full:
        lines += [_sample_text(corpus, n, decode, f" (row {n - clock.samples})") for n in numbers]
        return "\n".join(lines)
    lines.append("  row  sample        source       document      distinct  text begins")
    shares = Counter()
    for number, tokens in zip(numbers, corpus.batch(clock.samples, batch), strict=True):
        source, _, spans = corpus.locate(number)
        shares[source] += 1
        distinct = len(np.unique(tokens)) / len(tokens)
        lines.append(
            f"{number - clock.samples:>5}  {number:<12}  {source[:11]:<11}  "
            f"{spans[0].document:<12}  {distinct:>7.0%}  "
            f"{decode(tokens[: 2 * _START_CHARACTERS])[:_START_CHARACTERS]!r}"
        )
    lines.append(", ".join(f"{name} {count / batch:.1%}" for name, count in shares.most_common()))
    return "\n".join(lines)


def _sample_text(corpus: Corpus, sample: int, decode: "_Decoder", when: str) -> str:
    source, epoch, spans = corpus.locate(sample)
    tokens = corpus.batch(sample, 1)[0]
    known = "" if epoch is None else f", epoch {epoch}"
    lines, at = [f"sample {sample:,}{when}: source {source}{known}"], 0
    for document, offset, count in spans:
        lines.append(
            f"--- document {document}, tokens {offset:,} to {offset + count - 1:,} of the shard"
        )
        lines.append(decode(tokens[at : at + count]))
        at += count
    return "\n".join(lines)


class _Decoder:
    """Token ids -> text, special tokens included; the ids themselves without a tokenizer."""

    def __init__(self, directory: Path | None) -> None:
        self._tokenizer: Any = load_tokenizer(directory).tokenizer if directory else None

    def __call__(self, ids: np.ndarray) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids.tolist()))
        known = self._tokenizer.get_vocab_size()
        if ids.max() >= known:
            raise DataError(
                f"id {ids.max()} is not in the tokenizer, which has {known}; name the tokenizer "
                "that the text was encoded with"
            )
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
