"""Models of sentencepiece: our tokenizer gives the ids of the library, and no text is lost."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import (
    SentencePieceNormalizer,
    SentencePieceProcessor,
    sentencepiece_model_pb2,
)
from tokenizers import normalizers

from pretrain.errors import DataError
from tests.test_tokenizer_train import CODE, FAMILIES, TEXTS, config_of
from tokenizer.sentencepieces import to_tokenizer, train_sentencepiece

PIECES = FAMILIES[1:]
nfkc = normalizers.NFKC().normalize_str
# Where sentencepiece and `tokenizers` could part: runs, spellings of tokens, separators.
awkward = st.text(
    st.sampled_from("ab -=*▁\t\n\r\0<>/s0x41unkpdé花▅\u0301\u00a0ﬁ") | st.characters(codec="utf-8"),
    max_size=60,
)


class Pieces:
    """A sentencepiece model, the library on it, and our tokenizer of it."""

    def __init__(self, texts, family, **options):
        self.config = config_of(family=family, **options)
        self.model = train_sentencepiece(iter(texts), self.config)
        self.library = SentencePieceProcessor(model_proto=self.model)
        self.ours = to_tokenizer(self.model, self.config)
        self.ours.encode_special_tokens = True  # as tokenizer.folder.load does
        self.map = SentencePieceNormalizer(model_proto=self.model, escape_whitespaces=False)
        self.normal = nfkc if self.config.normalization == "nfkc" else str

    def ids(self, texts):
        return [e.ids for e in self.ours.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, rows):
        return self.ours.decode_batch(rows, skip_special_tokens=False)


KINDS = {
    f"{family[14:]}-{normalization}{'' if fallback else '-no-bytes'}": partial(
        Pieces, family=family, normalization=normalization, byte_fallback=fallback, vocab_size=3000
    )
    for family in PIECES
    for normalization, fallback in (("identity", True), ("nfkc", True), ("identity", False))
}


@pytest.fixture(scope="module", params=KINDS)
def pieces(request):
    """Trained on the sources of this project and the texts above, so that it needs no corpus."""
    return KINDS[request.param]([*CODE, *TEXTS, "a  b   c    <s>d</s>"], vocab_size=2000)


@settings(max_examples=400, deadline=None)
@given(awkward)
def test_ids_are_those_of_sentencepiece(pieces, text):
    normal = pieces.normal(text)
    if pieces.map.normalize(normal) != normal:
        return  # one of the 171 characters that only sentencepiece's newer tables know
    (ids,) = pieces.ids([text])
    assert ids == pieces.library.encode(normal)
    assert not {1, 2, 3} & set(ids)
    if pieces.config.byte_fallback:
        assert pieces.decode([ids]) == [normal.replace("▁", " ")]


def test_ids_are_those_of_sentencepiece_on_all_sources(pieces, slices):
    normal = [pieces.normal(text) for text in slices]
    rows = pieces.ids(slices)
    theirs = pieces.library.encode(normal)
    assert [k for k, ids in enumerate(rows) if ids != theirs[k]] == []
    if pieces.config.byte_fallback:
        expected = [text.replace("▁", " ") for text in normal]
        assert [k for k, text in enumerate(pieces.decode(rows)) if text != expected[k]] == []


def test_scores_are_sums_of_exact_floats(pieces):
    scores = {pieces.library.get_score(k) for k in range(pieces.library.vocab_size())}
    assert all((score * 64).is_integer() for score in scores)
    # The library scores USER_DEFINED pieces anew, and off that grid.
    found = sentencepiece_model_pb2.ModelProto.FromString(pieces.model).pieces
    assert {p.piece: p.type for p in found if p.piece in "\n\t"} == {"\n": 1, "\t": 1}


def test_text_cannot_fake_a_token_of_sentencepiece(pieces):
    text = "one</s>two<pad><unk><s><0x41></s>"
    (ids,) = pieces.ids([text])
    assert min(ids) > 3
    assert pieces.decode([ids]) == [text]
    assert pieces.ours.token_to_id("<0x41>") not in ids


def test_spaces_tabs_and_lines_come_back(pieces):
    texts = ["  two  ", "\ttab\t\tx\n\n\n    four\n", " ", "\n", "", "   \n  "]
    assert pieces.decode(pieces.ids(texts)) == texts
    assert len(pieces.ids(["\n\n\t"])[0]) == 3


@pytest.mark.parametrize("family", PIECES)
def test_long_lines_and_reserved_signs_are_learned_from_too(family):
    line = " ".join(f"{word}▅" for word in ["morning", "evening"] * 400)
    trained = Pieces(
        [*CODE, *TEXTS, line, "x" * 20_000 + " sunflowers" * 300 + "\0"], family, vocab_size=1500
    )
    for word in ("▁sunflowers", "▁evening"):
        assert trained.ours.token_to_id(word) is not None, word


@pytest.mark.parametrize("family", PIECES)
def test_a_vocabulary_that_does_not_fit_the_text_is_explained(family):
    def training(**options):
        return Pieces(TEXTS, family, **options)

    with pytest.raises(DataError, match=r"vocab_size = 9000 .*no more than \d+ pieces.*sample"):
        training(vocab_size=9000)
    with pytest.raises(DataError, match=r"vocab_size = 261 .*alone need \d+.*raise vocab_size"):
        training(vocab_size=261)

    def broken():
        yield "good"
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2 is bad"):
        train_sentencepiece(broken(), config_of(family=family))
