"""Looking at a corpus: check finds damage, show finds the text of a step, stats add up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main as anthesis
from pretrain.config_file import load
from pretrain.data import Corpus, Shard
from pretrain.errors import DataError
from tests.test_data import write_by_hand
from tests.test_documents import write_jsonl
from tests.tiny import write_config
from tokenizer import corpus_check, manifest
from tokenizer.corpus_check import check
from tokenizer.encode import encode
from tokenizer.train import save, train_bpe

WORDS = ["a", "flower", "opens", "in", "the", "morning", "and", "closes", "at", "night", "while"]


def text_of(number):
    return " ".join(WORDS[(number * k + k // 3) % len(WORDS)] for k in range(1, 4 + number % 30))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a tokenizer, and the shards `even` and `odd` of 300 documents each."""
    folder = tmp_path_factory.mktemp("corpus")
    save(train_bpe((text_of(k) for k in range(600)), 300), folder / "tokenizer")
    for first, name in ((0, "even"), (1, "odd")):
        records = [{"text": text_of(k)} for k in range(first, 600, 2)]
        encode([write_jsonl(folder / f"{name}.jsonl", records)], folder / "tokenizer",
               folder / name)  # fmt: skip
    return folder


# --- check ---------------------------------------------------------------------------------------


def copied(corpus, folder):
    for suffix in ("bin", "idx", "json"):
        shutil.copy(corpus / f"even.{suffix}", folder)
    return folder / "even"


def test_sound_shards_are_said_to_be(corpus, capsys):
    assert anthesis(["corpus", "check", str(corpus / "even"), str(corpus / "odd.idx")]) == 0
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 2
    assert all("300 documents" in line and "sound: checksums" in line for line in output)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("place", [0.0, 0.31, 0.999])
def test_any_changed_byte_is_found(corpus, tmp_path, suffix, place):
    prefix = copied(corpus, tmp_path)
    path = Path(f"{prefix}.{suffix}")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"even\.(bin|idx)"):
        check([prefix])


def test_blocks_are_named_and_counted(corpus, tmp_path, monkeypatch):
    prefix = copied(corpus, tmp_path)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1000)
    found = manifest.read(prefix)
    content = Path(f"{prefix}.bin").read_bytes()
    for suffix in ("bin", "idx"):
        file = found["files"][suffix]
        file["block_bytes"] = 1000
        file["sha256_blocks"] = list(manifest.digests(Path(f"{prefix}.{suffix}"), 1000))
    manifest.write(prefix, found)
    assert len(found["files"]["bin"]["sha256_blocks"]) == -(-len(content) // 1000)
    assert "sound" in check([prefix])
    damaged = bytearray(content)
    damaged[3500] ^= 1
    Path(f"{prefix}.bin").write_bytes(damaged)
    with pytest.raises(DataError, match=r"bytes 3,000 to 4,000 are not those"):
        check([prefix])
    Path(f"{prefix}.bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match="its index promises"):
        check([prefix])


def test_files_of_another_shard_are_found(corpus, tmp_path):
    prefix = copied(corpus, tmp_path)
    for suffix in ("bin", "idx"):
        shutil.copy(corpus / f"odd.{suffix}", f"{prefix}.{suffix}")
    with pytest.raises(DataError, match=r"even\.bin: .* bytes, but .* were written"):
        check([prefix])


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_invariants_hold_without_checksums_too(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(corpus_check, "_SEQUENCES", chunk)
    monkeypatch.setattr(corpus_check, "_TOKENS", chunk)
    documents = [[5, 6, 2], [7, 2], [2], [8, 9, 9, 2]]
    write_by_hand(tmp_path / "a", documents)
    assert "layout only" in check([tmp_path / "a"])
    facts = {"documents": 4, "tokens": 10, "vocab_size": 10, "end_of_text": 2}

    def faults(**changes):
        shard = Shard.open(tmp_path / "a")
        files = {s: {"bytes": Path(f"{tmp_path}/a.{s}").stat().st_size, "block_bytes": 2**20,
                     "sha256_blocks": list(manifest.digests(tmp_path / f"a.{s}", 2**20))}
                 for s in ("bin", "idx")}  # fmt: skip
        return " ".join(corpus_check._faults(shard, facts | {"files": files} | changes))

    assert faults() == ""
    assert "9, outside the vocabulary" in faults(vocab_size=9)
    assert "document 0 does not end" in faults(end_of_text=9)
    assert "11 were written" in faults(tokens=11)
    write_by_hand(tmp_path / "a", [[5, 2, 2], *documents[1:]])
    assert "stands there 5 times, but there are 4 documents" in faults()
    write_by_hand(tmp_path / "a", [[5, -6, 2], *documents[1:]])
    assert "token 1 is -6" in faults()
    write_by_hand(tmp_path / "a", documents, doc_idx=[0, 3, 1, 4])
    assert "document 1 has the sequences 3 to 1" in faults(documents=3)
    write_by_hand(tmp_path / "a", documents)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[34 + 4 : 34 + 8] = (1).to_bytes(4, "little")  # sequence 1 would leave a gap
    (tmp_path / "a.idx").write_bytes(index)
    assert "sequence 1 of 1 tokens" in faults()


def test_all_shards_are_reported_at_once(corpus, tmp_path, capsys):
    write_by_hand(tmp_path / "broken", [[1, 2], [3]], doc_idx=[0, 5, 2])
    targets = [str(tmp_path / "broken"), str(corpus / "even"), str(tmp_path / "absent")]
    assert anthesis(["corpus", "check", *targets]) == 2
    error = capsys.readouterr().err
    assert "even: 300 documents" in error
    assert "document 0 has the sequences 0 to 5" in error
    assert "absent.bin" in error


# --- show ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_config(corpus, tmp_path_factory):
    path = write_config(
        tmp_path_factory.mktemp("run"),
        model__vocab_size=300,
        data__directory=str(corpus),
        data__tokenizer=str(corpus / "tokenizer"),
        data__sources=[{"name": "even", "weight": 0.7}, {"name": "odd", "weight": 0.3}],
    )
    return path


def shown(capsys, *arguments):
    assert anthesis(["corpus", "show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_document_as_text(corpus, capsys):
    output = shown(capsys, corpus / "odd", "--document", 17)
    assert output.splitlines()[1] == text_of(35) + "</s>"
    assert anthesis(["corpus", "show", str(corpus / "odd"), "--document", "300"]) == 2
    assert "documents 0 to 299" in capsys.readouterr().err


def test_the_batch_of_a_step_is_what_the_model_gets(corpus, run_config, capsys):
    config = load(run_config)
    recipe = config.build_recipe()
    table = shown(capsys, run_config, "--step", 10).splitlines()
    clock = recipe.clock_at(step=9)
    plan = recipe.at(clock)
    assert table[0].startswith(f"step 10: samples {clock.samples} to ")
    assert f"learning rate {plan.learning_rate:.4g}" in table[0]
    assert len(table) == 2 + plan.batch_samples + 1
    batch = Corpus(config.data, config.seed, 300, "train").batch(clock.samples, plan.batch_samples)
    for row, line in zip(batch, table[2:], strict=False):
        assert f"{len(np.unique(row)) / 9:.0%}" in line.split("'")[0]
    assert max(map(len, table)) <= 110

    sample = clock.samples + 3
    text = shown(capsys, run_config, "--sample", sample)
    assert text.startswith(f"sample {sample} (step 10, row 3): source ")
    assert text in shown(capsys, run_config, "--step", 10, "--full").replace(
        " (row 3)", " (step 10, row 3)"
    )
    location = Corpus(config.data, config.seed, 300, "train").locate(sample)
    joined = "".join(line for line in text.splitlines(keepends=True)[1:] if line[:3] != "---")
    first = 0 if location.source == "even" else 1
    documents = [text_of(first + 2 * span.document) + "</s>" for span in location.spans]
    for piece, document in zip(joined.splitlines(), documents, strict=True):
        assert piece in document


def test_steps_and_samples_outside_the_run_are_refused(corpus, run_config, capsys):
    for arguments, message in (
        (["--step", "0"], "steps 1 to"),
        (["--step", "999"], "steps 1 to"),
        (["--sample", "160"], "samples 0 to 158"),
        (["--sample", "-1", "--validation"], "samples 0 to"),
    ):
        assert anthesis(["corpus", "show", str(run_config), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert anthesis(["corpus", "show", str(corpus / "even"), "--step", "1"]) == 2
    assert "run config" in capsys.readouterr().err
    held_out = shown(capsys, run_config, "--sample", 0, "--validation")
    document = int(held_out.split("--- document ")[1].split(",")[0])
    assert document >= 285


# --- stats ---------------------------------------------------------------------------------------


def test_stats_of_shards_and_of_a_run(corpus, run_config, tmp_path, capsys):
    assert anthesis(["corpus", "stats", str(corpus / "even"), str(corpus / "odd")]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    tokens = [Shard.open(corpus / name).tokens for name in ("even", "odd")]
    assert rows["even"][1] == "300"
    assert rows["even"][3] == f"{tokens[0] / sum(tokens):.1%}"
    facts = json.loads((corpus / "even.json").read_text())
    assert rows["even"][4] == f"{facts['text_bytes'] / (facts['tokens'] - 300):.2f}"

    picture = tmp_path / "stats.png"
    assert anthesis(["corpus", "stats", str(run_config), "--plot", str(picture)]) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in output.splitlines()}
    config = load(run_config)
    samples = config.build_recipe().total_samples
    for found in Corpus(config.data, config.seed, 300, "train").summary(samples):
        assert rows[found.source][6:8] == [f"{found.share:.1%}", f"{found.epochs:.2f}"]
    assert "!" not in output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    limit = "data.mixture.epoch_limit=0.01"
    text = run_config.read_text().replace("[data]", f"[data]\n{limit.removeprefix('data.')}")
    (tmp_path / "strict.toml").write_text(text)
    assert anthesis(["corpus", "stats", str(tmp_path / "strict.toml")]) == 0
    assert "more epochs than data.mixture.epoch_limit = 0.01" in capsys.readouterr().out
