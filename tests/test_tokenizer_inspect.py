"""Inspecting tokenizers: words, sizes of tokens, unknown characters, round trips, the plot."""

import json
import struct

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pretrain.errors import DataError
from tokenizer.config import TokenizerConfig
from tokenizer.folder import save
from tokenizer.inspection import _WORD, inspect_tokenizers, plot, table
from tokenizer.train import train, train_bpe


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Byte-level BPE that knows no merges, one that knows some, and sentencepiece with bytes."""
    path = tmp_path_factory.mktemp("folders")
    save(train_bpe(iter([]), 260), path / "bytes")
    save(train_bpe(iter(["flower power tower"] * 9), 270), path / "merged")
    text = write_jsonl(path / "a.jsonl", ["The flower opens.", "the tower — power"] * 50)
    train(TokenizerConfig(family="sentencepiece-bpe", output=path / "pieces", vocab_size=380,
                          inputs=[text], normalization="nfkc"))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 1.5 naïve_words", ["It", "s", "1", "5", "naïve", "words"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # marks belong to the word
        ("e\u0301a", ["e\u0301a"]),
        ("花は朝", ["花", "は", "朝"]),
        ("データbase", ["デ", "ー", "タ", "base"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("한국어 123x", ["한국어", "123x"]),
        (" \n—!", []),
    ],
)
def test_words(text, words):
    assert _WORD.findall(text) == words


def test_counts_are_those_of_the_text(tmp_path, folders):
    texts = ["flower é", "two words\n", ""]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "never reached"])
    report = inspect_tokenizers([folders / "bytes"], {"a": [source]}, documents=3)
    count = report.counts["bytes"]["a"]
    assert (count.documents, count.words) == (3, 4)
    assert (count.bytes, count.characters) == (19, 18)
    assert count.tokens == 19  # a byte is a token here
    assert count.fertility == 19 / 4
    assert (count.unknown, count.normalised, count.failed) == (0, 0, 0)
    row = next(line for line in table(report).splitlines() if line.startswith("a "))
    assert row.split() == ["a", "4", "1.00", "0.95", "4.750", "0.000%", "0"]


def test_bytes_for_unknown_characters_and_normal_forms_are_counted(tmp_path, folders):
    source = write_jsonl(tmp_path / "a.jsonl", ["the花", "ﬁne", "plain", "a▁b"])
    report = inspect_tokenizers([folders / "pieces"], {"a": [source]})
    count = report.counts["pieces"]["a"]
    assert count.unknown == 3
    assert (count.normalised, count.failed) == (2, 0)
    assert "2 documents come back in their normal form" in table(report)


def test_what_does_not_come_back_is_shown(tmp_path):
    ids = {token: k for k, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *"abc "])}
    lossy = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    lossy.pre_tokenizer = pre_tokenizers.Split("c", "removed")
    lossy.normalizer = normalizers.Lowercase()
    lossy.decoder = decoders.Fuse()
    save(lossy, tmp_path / "lossy")
    good = write_jsonl(tmp_path / "good.jsonl", ["ab a", "AB"])
    bad = write_jsonl(tmp_path / "bad.jsonl", ["ab", "abca", "aé", *["c"] * 5])
    report = inspect_tokenizers([tmp_path / "lossy"], {"good": [good], "bad": [bad]})
    counts = report.counts["lossy"]
    assert (counts["good"].failed, counts["good"].normalised) == (0, 1)
    assert (counts["bad"].failed, counts["bad"].unknown) == (7, 1)
    first, second = report.failures[:2]
    assert (first.source, first.document, first.place) == ("bad", 1, 2)
    assert (first.text, first.decoded) == ("abca", "aba")
    assert (second.document, second.place, second.text, second.decoded) == (2, 1, "aé", "a<unk>")
    text = table(report)
    assert "lossy: document 1 of bad does not come back; character 2:" in text
    assert "  text    'abca'\n  decoded 'aba'" in text
    assert text.endswith("and 2 more")


def test_tokenizers_stand_side_by_side(tmp_path, folders):
    flowers = write_jsonl(tmp_path / "flowers.jsonl", ["flower"] * 100)
    others = write_jsonl(tmp_path / "a-source-with-a-very-long-name.jsonl", ["xyz"] * 100)
    sources = {"flowers": [flowers], "a-source-with-a-very-long-name": [others]}
    report = inspect_tokenizers([folders / "bytes", folders / "merged"], sources)
    text = table(report)
    assert max(map(len, text.splitlines())) <= 80
    lines = text[text.index("A = bytes") :].splitlines()
    assert lines[1] == "B = merged"
    assert lines[2].split() == ["tokens", "/", "word", "A", "B", "B/A"]
    fertility = report.counts["merged"]["flowers"].fertility
    assert lines[3].split() == ["flowers", "6.000", f"{fertility:.3f}", f"{fertility / 6:.3f}"]
    assert fertility < 3
    assert lines[4].split()[1:] == ["3.000", "3.000", "1.000"]
    assert lines[5].split() == ["all", "4.500", f"{(fertility + 3) / 2:.3f}",
                                f"{(fertility + 3) / 9:.3f}"]  # fmt: skip


def test_folders_of_one_name_are_told_apart(tmp_path, folders):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "bytes").symlink_to(folders / "merged")
    both = [folders / "bytes", tmp_path / "bytes"]
    report = inspect_tokenizers(both, {"a": [source]})
    assert list(report.counts) == list(map(str, both))
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        inspect_tokenizers([tmp_path], {"a": [source]})


def test_the_plot_grows_with_the_sources(tmp_path, folders):
    source = write_jsonl(tmp_path / "a.jsonl", ["flower"])
    heights = []
    for count in (1, 30):
        sources = {f"source-{k}": [source] for k in range(count)}
        report = inspect_tokenizers([folders / "bytes", folders / "merged"], sources)
        plot(report, tmp_path / "f.png")
        header = (tmp_path / "f.png").read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        heights.append(struct.unpack(">I", header[20:24])[0])
    assert heights[1] > 4 * heights[0]
