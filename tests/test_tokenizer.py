"""The tokenizer: BLOOM's pieces, reversible, loadable by transformers; text files -> shards."""

import gzip
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pretrain.data import Shard
from pretrain.errors import DataError
from tokenizer.documents import read_documents
from tokenizer.encode import encode
from tokenizer.train import save, train_bpe

TEXTS = [
    "The flower opens in the morning; the flower closes in the evening.",
    "def open(flower):\n\treturn flower.petals  # five\r\n",
    "La fleur s'ouvre le matin… Les fleurs, s'ouvrent-elles ?",
    "花は朝に開く。花、夕方に閉じる。",
    "फूल सुबह खिलता है। तुम؟ کیا، پھول۔",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(TEXTS), 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save(tokenizer, path)
    return path


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("foo(bar)|baz...  qux", ["foo", "(", "bar", ")|", "baz", "... ", " qux"]),
        ("a, b", ["a", ",", " b"]),
        ("it's  1+1\n\n x", ["it's", " ", " 1+1", "\n\n", " x"]),
        ("花は。開く、x", ["花は", "。", "開く", "、", "x"]),
        ("है। کیا، پھول۔ y…z", ["है", "।", " کیا", "،", " پھول", "۔", " y", "…", "z"]),
    ],
)
def test_pieces_are_those_of_bloom(tokenizer, text, pieces):
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


def test_special_tokens_and_bytes_are_always_there(tokenizer):
    assert [tokenizer.id_to_token(k) for k in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.get_vocab_size() == 400
    bare = train_bpe(iter(["a"]), 260)
    assert bare.get_vocab_size() == 260
    assert len(bare.encode("花").ids) == 3


def test_merges_are_learned_from_the_text_and_the_same_each_time(tokenizer):
    assert len(tokenizer.encode(" flower").ids) == 1
    assert train_bpe(iter(TEXTS), 400).to_str() == tokenizer.to_str()


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(DataError, match="at least 260"):
        train_bpe(iter(TEXTS), 259)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_loads_the_folder_and_agrees(tokenizer, folder):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS[:5], "  two  spaces , and a comma ."]:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer.encode(text).ids
        assert loaded.decode(ids) == text
    tokens = (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    assert tokens == (0, 1, 2, 3)
    assert loaded.padding_side == "left"
    assert loaded.clean_up_tokenization_spaces is False
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows too


# --- documents -----------------------------------------------------------------------------------


def test_documents_of_all_kinds_of_files(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\nline"}, {"text": ""}, {"text": "é"}])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'\n{"text": "packed"}\n   \n{"text": "\\u00e9"}'))
    plain = tmp_path / "c.txt"
    plain.write_bytes(b"kept\r\nas it is\n")
    other = tmp_path / "d.md.gz"
    other.write_bytes(gzip.compress(b"# also"))
    found = list(read_documents([lines, packed, plain, other]))
    assert found == ["one\nline", "", "é", "packed", "é", "kept\r\nas it is\n", "# also"]
    assert list(read_documents([write_jsonl(lines, [{"body": "x"}])], "body")) == ["x"]


def test_progress_adds_up_to_the_bytes_of_the_files(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * k} for k in range(100)])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    steps = []
    list(read_documents([lines, packed], progress=steps.append))
    assert sum(steps) == lines.stat().st_size + packed.stat().st_size
    assert min(steps) >= 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ('{"text": "x"}'.encode("utf-16-be"), "not JSON"),
        (b'{"other": "x"}', "no field 'text'"),
        (b'{"text": null}', "no text in the field 'text'"),
        (b'["text"]', "no text in the field 'text'"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=f"bad.jsonl: line 3 .*{message}"):
        list(read_documents([path]))


def test_files_that_cannot_be_read_are_named(tmp_path):
    plain = tmp_path / "latin.txt"
    plain.write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"latin.txt: line 2 is not UTF-8"):
        list(read_documents([plain]))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(read_documents([cut]))
    cut.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(read_documents([cut]))
    with pytest.raises(DataError, match=r"cannot be read .*No such file"):
        list(read_documents([tmp_path / "absent.jsonl"]))


# --- encoding ------------------------------------------------------------------------------------


def decoded(prefix, folder):
    """The documents of a shard as text, and the ids of each."""
    shard, tokenizer = Shard.open(prefix), Tokenizer.from_file(str(folder / "tokenizer.json"))
    starts = [shard.document_start(d) for d in range(shard.documents + 1)]
    rows = [shard.read(a, b - a).tolist() for a, b in pairwise(starts)]
    return [tokenizer.decode(ids[:-1]) for ids in rows], rows


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_documents_come_back_from_the_shard(tmp_path, folder, monkeypatch, capsys, chunk):
    monkeypatch.setattr("tokenizer.encode._CHUNK_CHARACTERS", chunk)
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*TEXTS, "", "last"]])
    plain = tmp_path / "b.txt"
    plain.write_text("plain é", "utf-8")
    manifest = encode([lines, plain], folder, tmp_path / "out" / "shard")
    texts, rows = decoded(tmp_path / "out" / "shard", folder)
    assert texts == [*TEXTS, "last", "plain é"]
    assert all(ids[-1] == 2 and 2 not in ids[:-1] for ids in rows)
    assert manifest == {
        "documents": len(texts),
        "empty_documents": 1,
        "tokens": sum(map(len, rows)),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "vocab_size": 400,
        "end_of_text": 2,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "inputs": [{"path": str(path), "bytes": path.stat().st_size} for path in (lines, plain)],
    }
    assert json.loads((tmp_path / "out" / "shard.json").read_text("utf-8")) == manifest
    output = capsys.readouterr()
    assert "100%" in output.err
    assert output.out == ""


def test_text_cannot_fake_a_special_token(tmp_path, folder):
    text = "one</s>two<pad><unk>"
    encode([write_jsonl(tmp_path / "a.jsonl", [{"text": text}])], folder, tmp_path / "shard")
    texts, rows = decoded(tmp_path / "shard", folder)
    assert texts == [text]
    assert min(rows[0][:-1]) > 3


def test_a_failed_encoding_leaves_no_shard(tmp_path, folder):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        encode([path], folder, tmp_path / "shard")
    with pytest.raises(DataError, match="no documents"):
        encode([write_jsonl(path, [{"text": ""}])], folder, tmp_path / "shard")
    with pytest.raises(DataError, match=r"absent\.txt: not there"):
        encode([path, tmp_path / "absent.txt"], folder, tmp_path / "shard")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_without_tokenizer_or_end_of_text_is_refused(tmp_path, folder):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        encode([path], tmp_path, tmp_path / "shard")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for config in ({}, {"eos_token": "<end>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match="eos_token"):
            encode([path], tmp_path, tmp_path / "shard")
    config = {"eos_token": {"content": "</s>"}}  # transformers 4 writes it so
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert encode([path], tmp_path, tmp_path / "shard")["end_of_text"] == 2


def test_real_text_comes_back(tmp_path, folder):
    corpus = Path(__file__).parents[2] / "shared" / "data" / "corpus" / "hi.jsonl.gz"
    if not corpus.exists():
        pytest.skip(f"the text for tests and benchmarks is not here: {corpus}")
    texts = [text for text, _ in zip(read_documents([corpus]), range(100), strict=False)]
    encode([write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])], folder,
           tmp_path / "shard")  # fmt: skip
    assert decoded(tmp_path / "shard", folder)[0] == texts
