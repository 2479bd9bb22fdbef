"""The config of a tokenizer's training: TOML plus `key=value` overrides, all problems at once."""

import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from pretrain.config_base import AbsolutePath, Positive, Section
from pretrain.config_file import load_as
from pretrain.config_rules import Check
from pretrain.errors import Problem

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0 to 3
SMALLEST = 256 + len(SPECIAL_TOKENS)  # tokens of a tokenizer that knows nothing but bytes

Family = Literal["byte-bpe", "sentencepiece-bpe", "sentencepiece-unigram"]
Natural = Annotated[int, Field(ge=0, strict=True)]
Inputs = Annotated[tuple[str, ...], Field(min_length=1)]


class TextSource(Section):
    """Text of one language or kind, which gets one share of the training text."""

    name: Annotated[str, Field(min_length=1)]
    inputs: Inputs = Field(description="files, globs or hub: data sets")


class TokenizerConfig(Section):
    """A whole training."""

    family: Family = "byte-bpe"
    output: AbsolutePath = Field(description="folder to write; must not be there yet")
    vocab_size: Positive = Field(description="tokens, before rounding up to multiple_of")
    multiple_of: Positive = Field(
        1,
        description="vocab_size is rounded up to it for the model's embedding (BLOOM: 1024, so "
        "250,000 becomes 250,880)",
    )
    reserved: Natural = Field(
        0,
        description="ids at the end left without a token (BLOOM: 200, so 250,680 are trained)",
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.3, description="share of a source in the training text ~ bytes^alpha"
    )
    sample: Annotated[ByteSize, Field(gt=0)] = Field(
        ByteSize(10**9), description='bytes of text that are trained on, for example "200MB"'
    )
    seed: Natural = Field(42, description="of the choice of documents")
    field: str = Field("text", description="of a JSON line or row that holds the text")
    normalization: Literal["identity", "nfkc"] = Field(
        "identity", description="of sentencepiece; identity keeps every text as it is"
    )
    byte_fallback: bool = Field(
        True,
        description="of sentencepiece: characters outside of the vocabulary become bytes; without "
        "it they become <unk> and are lost",
    )
    inputs: tuple[str, ...] = Field(
        (), description="files or globs; each file is one source, named after it"
    )
    sources: tuple[TextSource, ...] = Field((), description="the sources, in place of inputs")

    @property
    def rows(self) -> int:
        """`model.vocab_size` of a run with this tokenizer: rows of the embedding."""
        return -(-self.vocab_size // self.multiple_of) * self.multiple_of

    @property
    def tokens(self) -> int:
        """How many tokens are trained."""
        return self.rows - self.reserved


def load_tokenizer_config(
    path: str | os.PathLike[str], overrides: list[str] | None = None
) -> TokenizerConfig:
    """Read the config of a training; raises ConfigError with all problems."""
    return load_as(TokenizerConfig, path, overrides, CHECKS)


def _one_kind_of_input(
    inputs: tuple[str, ...], sources: tuple[TextSource, ...]
) -> Iterator[Problem]:
    if bool(inputs) == bool(sources):
        yield Problem("inputs", inputs or None, "exactly one of inputs and [[sources]] is given",
                      "remove one of them" if inputs else "name the text")  # fmt: skip
    names = [source.name for source in sources]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield Problem("sources", name, "names of sources are unique", "rename one")


def _room_for_bytes(vocab_size: int, multiple_of: int, reserved: int) -> Iterator[Problem]:
    if min(vocab_size, multiple_of) < 1:
        return  # reported already
    rows = -(-vocab_size // multiple_of) * multiple_of
    if rows - reserved < SMALLEST:
        yield Problem("vocab_size", vocab_size, f"rounded up to multiple_of = {multiple_of} and "
                      f"less reserved = {reserved}, it leaves {rows - reserved} tokens; 256 bytes "
                      f"and {len(SPECIAL_TOKENS)} special tokens need {SMALLEST}",
                      "choose more, for example 32_000")  # fmt: skip


def _sentencepiece_only(family: str, normalization: str, byte_fallback: bool) -> Iterator[Problem]:
    if family != "byte-bpe":
        return
    cure = "remove it, or choose family = 'sentencepiece-bpe'"
    if normalization != "identity":
        yield Problem("normalization", normalization, "byte-bpe keeps text as it is, as in BLOOM",
                      cure)  # fmt: skip
    if not byte_fallback:
        yield Problem("byte_fallback", False, "byte-bpe knows all bytes, always", cure)


CHECKS: list[Check] = [
    (("inputs", "sources"), _one_kind_of_input),
    (("vocab_size", "multiple_of", "reserved"), _room_for_bytes),
    (("family", "normalization", "byte_fallback"), _sentencepiece_only),
]
