"""Training with the sentencepiece library, and its model as a tokenizer.json of the same ids.

With normalization = "identity" every text comes back as it was, with two exceptions: U+2581, which
stands for a space in the pieces and comes back as one, and characters outside of the vocabulary
where byte_fallback = false. With "nfkc" the normal form of the text comes back. Text is normalised
by `tokenizers`, in training too; sentencepiece's own map, which the model keeps for use by itself,
does not put combining marks in order (Arabic and Hindi text has such) and knows 171 newer
characters. So the ids are those of sentencepiece for text in that normal form.
"""

import re
from collections.abc import Iterable, Iterator

from sentencepiece import SentencePieceProcessor
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from pretrain.errors import DataError, UserError
from tokenizer.config import SPECIAL_TOKENS, TokenizerConfig

SPACE = "\u2581"  # sentencepiece's sign for a space
# Tokens of their own, since sentencepiece learns from lines and keeps tabs for itself.
_SEPARATORS = ["\n", "\t"]
_SPECIAL_NAMES = ("unk", "bos", "eos", "pad")  # what the library calls SPECIAL_TOKENS
# Always in the vocabulary: the characters that special tokens are spelled with, see _unigram.
_ASCII = "".join(map(chr, range(33, 127)))
# sentencepiece passes over lines with NUL or U+2585, its sign for unknown characters.
_CUTS = re.compile("[\n\t\0\u2585]")
_LINE_CHARACTERS = 1000  # below sentencepiece's limit of 4,192 bytes, above which lines are dropped
_THREADS = 16  # fixed on any machine: sums of probabilities are rounded differently with others
# A piece is spaces and what follows them up to the next space. No piece is learned across such a
# border, so cutting there first leaves the ids as they are and long texts quick.
_WORD = f"{SPACE}+[^{SPACE}\n\t]*|[^{SPACE}\n\t]+|\n|\t"
# Scores are rounded to this, so that their sums in sentencepiece's 32-bit floats are exact up to
# 262,144 (about 100 kB of text) and equal those in the 64-bit floats of `tokenizers`: otherwise
# one text in sixty gets other ids, by rounding alone.
_SCORE_UNIT = 2.0**-6


def train_sentencepiece(documents: Iterable[str], config: TokenizerConfig) -> bytes:
    """A sentencepiece model of `config.tokens` pieces, the same for the same text on any machine.

    Lines are cut at 1,000 characters. With byte_fallback the rarest characters, 0.05% of the text,
    are left to the bytes, as there are thousands of them; without it all get a piece. Raises
    DataError where vocab_size is too large or too small for the text.
    """
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    failures: list[BaseException] = []  # the library knows only its own exceptions
    model = _Written()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(documents, config.normalization, failures),
            model_writer=model,
            model_type=config.family.removeprefix("sentencepiece-"),
            vocab_size=config.tokens,
            byte_fallback=config.byte_fallback,
            character_coverage=0.9995 if config.byte_fallback else 1.0,
            required_chars=_ASCII + SPACE,
            normalization_rule_name=config.normalization,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation of code
            user_defined_symbols=_SEPARATORS,
            **{f"{name}_id": k for k, name in enumerate(_SPECIAL_NAMES)},
            **{f"{name}_piece": SPECIAL_TOKENS[k] for k, name in enumerate(_SPECIAL_NAMES)},
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _explain(str(error), config) or error from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.content)
    for piece in proto.pieces:
        if piece.piece in _SEPARATORS:
            # Else sentencepiece gives them a score off the unit.
            piece.type, piece.score = piece.NORMAL, 0.0
        if config.family == "sentencepiece-unigram":
            piece.score = round(piece.score / _SCORE_UNIT) * _SCORE_UNIT
    return proto.SerializeToString(deterministic=True)


class _Written:
    """What sentencepiece writes its model to."""

    content = b""

    def write(self, content: bytes) -> None:
        self.content = content


def _lines(
    documents: Iterable[str], normalization: str, failures: list[BaseException]
) -> Iterator[str]:
    normalize = normalizers.NFKC().normalize_str if normalization == "nfkc" else str
    yield " ".join(_ASCII)  # so that these characters are in the text, which is required of them
    try:
        for document in documents:
            for line in _CUTS.split(normalize(document)):
                for start in range(0, len(line), _LINE_CHARACTERS):
                    yield line[start : start + _LINE_CHARACTERS]
    except BaseException as error:
        failures.append(error)
        raise


def _explain(message: str, config: TokenizerConfig) -> UserError | None:
    """The trainer's complaint about the size of the vocabulary in our words."""
    found = f"vocab_size = {config.vocab_size} ({config.tokens} tokens to train)"
    if most := re.search(r"Please set it to a value <= (\d+)", message):
        return DataError(
            f"{found}: the text yields no more than {most[1]} pieces; sentencepiece finds exactly "
            "as many as are asked for; lower vocab_size, or raise sample or give more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{found}: the text's characters alone need {least[1]}; every character is a piece "
            "(with byte_fallback = true all but the rarest); raise vocab_size, or set "
            "byte_fallback = true"
        )
    return None


def to_tokenizer(model: bytes, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that gives the same ids as the sentencepiece library with `model`."""
    pieces = SentencePieceProcessor(model_proto=model)
    names = [pieces.id_to_piece(k) for k in range(pieces.vocab_size())]
    learned = {
        name: pieces.get_score(k)
        for k, name in enumerate(names)
        if not (pieces.is_control(k) or pieces.is_unknown(k) or pieces.is_byte(k))
    }
    build = _bpe if config.family == "sentencepiece-bpe" else _unigram
    tokenizer = Tokenizer(build(names, learned, config.byte_fallback))
    steps = [normalizers.NFKC()] if config.normalization == "nfkc" else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _unigram(names: list[str], learned: dict[str, float], byte_fallback: bool) -> models.Unigram:
    # `tokenizers` would also find pieces like "</s>" and "<0x41>" where a text spells them. Their
    # characters are pieces too, so with a score as low as this the spelling is always better.
    never = 10 * min(learned.values())
    return models.Unigram([(n, learned.get(n, never)) for n in names], 0, byte_fallback)


def _bpe(names: list[str], learned: dict[str, float], byte_fallback: bool) -> models.BPE:
    # sentencepiece merges any two neighbours that make up a piece, the best piece first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(learned, key=lambda piece: -learned[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in learned and piece[cut:] in learned
    ]
    ids = {name: number for number, name in enumerate(names)}
    return models.BPE(
        ids, merges, unk_token=SPECIAL_TOKENS[0], fuse_unk=True, byte_fallback=byte_fallback
    )
