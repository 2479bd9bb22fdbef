"""Text files -> shards: on any number of workers, over kills, without what repeats."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pretrain.data import Shard
from pretrain.errors import DataError
from tests.test_documents import write_jsonl
from tests.test_tokenizer_train import TEXTS
from tokenizer import duplicates
from tokenizer.duplicates import find_seen
from tokenizer.encode import encode
from tokenizer.train import save, train_bpe

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "data" / "corpus"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save(train_bpe(iter(TEXTS), 400), path)
    return path


def decoded(prefix, folder):
    """The documents of a shard as text, and the ids of each."""
    shard, tokenizer = Shard.open(prefix), Tokenizer.from_file(str(folder / "tokenizer.json"))
    starts = [shard.document_start(d) for d in range(shard.documents + 1)]
    rows = [shard.read(a, b - a).tolist() for a, b in pairwise(starts)]
    return [tokenizer.decode(ids[:-1]) for ids in rows], rows


def contents(prefix):
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


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
    assert json.loads((tmp_path / "out" / "shard.json").read_text("utf-8")) == manifest
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    files = manifest.pop("files")
    assert manifest.pop("versions").keys() == {
        "python", "anthesis", "tokenizers", "datasets", "numpy",
    }  # fmt: skip
    assert manifest == {
        "documents": len(texts),
        "tokens": sum(map(len, rows)),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "empty_documents": 1,
        "bad_documents": 0,
        "bad_examples": [],
        "duplicate_documents": 0,
        "duplicate_lines": 0,
        "deduplicated": [],
        "field": "text",
        "vocab_size": 400,
        "end_of_text": 2,
        "tokenizer": str(folder),
        "tokenizer_sha256": digest,
        "inputs": [
            {
                "path": str(path),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "documents": documents,
            }
            for path, documents in ((lines, len(TEXTS) + 2), (plain, 1))
        ],
    }
    for suffix in ("bin", "idx"):
        content = (tmp_path / "out" / f"shard.{suffix}").read_bytes()
        assert files[suffix] == {
            "bytes": len(content),
            "block_bytes": 2**26,
            "sha256_blocks": [hashlib.sha256(content).hexdigest()],
        }
    assert names(tmp_path / "out") == ["shard.bin", "shard.idx", "shard.json"]
    output = capsys.readouterr()
    assert "100%" in output.err
    assert output.out == ""


def test_text_cannot_fake_a_special_token(tmp_path, folder):
    text = "one</s>two<pad><unk>"
    encode([write_jsonl(tmp_path / "a.jsonl", [{"text": text}])], folder, tmp_path / "shard")
    texts, rows = decoded(tmp_path / "shard", folder)
    assert texts == [text]
    assert min(rows[0][:-1]) > 3


# --- what is wrong -------------------------------------------------------------------------------


def test_a_failed_encoding_leaves_nothing_that_opens_and_can_be_mended(tmp_path, folder):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2 .*--on-error skip"):
        encode([path], folder, tmp_path / "shard")
    assert not (tmp_path / "shard.idx").exists()
    manifest = encode([path], folder, tmp_path / "shard", on_error="skip")
    assert (manifest["documents"], manifest["bad_documents"]) == (1, 1)
    assert manifest["bad_examples"] == [f"{path}: line 2 has no text in the field 'text'"]
    with pytest.raises(DataError, match="no documents"):
        encode([write_jsonl(path, [{"text": ""}])], folder, tmp_path / "other")
    with pytest.raises(DataError, match=r"absent\.txt: not there"):
        encode([path, tmp_path / "absent.txt"], folder, tmp_path / "shard")


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


def test_a_finished_shard_is_neither_encoded_again_nor_overwritten(tmp_path, folder):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    first = encode([path], folder, tmp_path / "shard")
    written = (tmp_path / "shard.bin").stat().st_mtime_ns
    assert encode([path], folder, tmp_path / "shard") == first
    assert (tmp_path / "shard.bin").stat().st_mtime_ns == written
    with pytest.raises(DataError, match="encoded from something else"):
        encode([path], folder, tmp_path / "shard", dedup=["lines"])
    write_jsonl(path, [{"text": "new"}])
    with pytest.raises(DataError, match="encoded from something else"):
        encode([path], folder, tmp_path / "shard")
    assert encode([path], folder, tmp_path / "shard", restart=True)["documents"] == 1
    assert decoded(tmp_path / "shard", folder)[0] == ["new"]


def test_an_interrupted_encoding_of_something_else_is_refused(tmp_path, folder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbroken\n')
    with pytest.raises(DataError, match="line 2"):
        encode([path], folder, tmp_path / "shard")
    state = tmp_path / "shard.encoding.json"
    if not state.exists():  # too quick for a first commit: what one would have left
        state.write_text(json.dumps({"settings": {"inputs": [["other", "lines", 1, 2]]}}))
    with pytest.raises(DataError, match=r"differs in: inputs, .*field"):
        encode([path], folder, tmp_path / "shard", "body", on_error="skip")


def test_two_processes_do_not_write_one_shard(tmp_path, folder):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    import fcntl

    with (tmp_path / "shard.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            encode([path], folder, tmp_path / "shard")
    assert encode([path], folder, tmp_path / "shard")["documents"] == len(TEXTS)


# --- the same result, whatever happens -----------------------------------------------------------


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Inputs of several kinds, with repetitions, empty documents and bad lines."""
    folder, generator = tmp_path_factory.mktemp("varied"), random.Random(1)
    paths = []
    for number in range(3):
        records = [
            json.dumps(
                {
                    "text": "\n".join(
                        f"{text} {generator.randrange(200_000)}"
                        for text in generator.choices(TEXTS, k=generator.randrange(40))
                    )
                }
            )
            for _ in range(1800)
        ]
        records[700:700] = ["broken", "", json.dumps({"text": ""})]
        path = folder / f"{number}.jsonl"
        path.write_text("\n".join(records), "utf-8")
        paths.append(path)
    return paths


def run(paths, folder, prefix, *options, wait=True):
    often = (  # so that the little text here is committed several times
        "import sys, launch.cli, tokenizer.encode as e\n"
        "e._COMMIT_SECONDS = 0.1\n"
        "if __name__ == '__main__': sys.exit(launch.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", often, "corpus", "encode", *map(str, paths)]
    command += [f"--tokenizer={folder}", f"--output={prefix}", "--on-error=skip", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    if wait:
        assert process.wait(300) == 0
    return process


@pytest.mark.parametrize("dedup", [[], ["lines", "documents"]], ids=["plain", "dedup"])
def test_kills_and_workers_change_nothing(tmp_path, folder, varied, dedup):
    options = ["--dedup", *dedup] if dedup else []
    run(varied, folder, tmp_path / "two" / "x", "--workers=2", *options)
    expected = contents(tmp_path / "two" / "x")
    run(varied, folder, tmp_path / "one" / "x", "--workers=1", *options)
    assert contents(tmp_path / "one" / "x") == expected

    prefix, generator, kills, resumed = tmp_path / "killed" / "x", random.Random(3), 0, 0
    while not Path(f"{prefix}.json").exists():
        resumed += Path(f"{prefix}.encoding.json").exists()
        state = Path(f"{prefix}.encoding.json")
        begun = state.stat().st_mtime_ns if state.exists() else 0
        process = run(varied, folder, prefix, f"--workers={1 + kills % 2}", *options, wait=False)
        # Every third is killed early, while looking for repetitions or starting its workers; the
        # others soon after they have got on.
        early, end = kills % 3 == 0, time.monotonic() + generator.uniform(0.8, 1.6)
        while process.poll() is None and not (early and time.monotonic() > end):
            if not early and state.exists() and state.stat().st_mtime_ns != begun:
                time.sleep(generator.uniform(0, 0.3))
                break
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
        assert kills < 40
    assert kills >= 2
    assert resumed >= 1
    assert contents(prefix) == expected
    run(varied, folder, prefix, *options)
    assert contents(prefix) == expected
    assert names(tmp_path / "killed") == ["x.bin", "x.idx", "x.json"]


def test_workers_die_with_their_parent(tmp_path, folder, varied):
    process = run(varied, folder, tmp_path / "x", "--workers=2", wait=False)
    deadline = time.monotonic() + 60
    while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2
    time.sleep(1)
    process.kill()
    process.wait()
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def test_a_worker_that_dies_is_told_and_costs_nothing(tmp_path, folder, varied):
    process = run(varied, folder, tmp_path / "x", "--workers=2", wait=False)
    deadline = time.monotonic() + 60
    while not (workers := [p for p in children(process.pid) if "spawn_main" in line_of(p)]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers[0], 9)  # as the kernel does where memory runs out
    assert process.wait(60) == 2
    run(varied, folder, tmp_path / "x")
    run(varied, folder, tmp_path / "whole")
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


def line_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("moment", ["sealed", "half published", "no manifest"])
def test_a_kill_while_files_get_their_names_loses_nothing(tmp_path, folder, monkeypatch, moment):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    encode([path], folder, tmp_path / "whole" / "x")
    prefix = tmp_path / "cut" / "x"
    encode([write_jsonl(tmp_path / "old.jsonl", [{"text": "old"}])], folder, prefix)
    code = (
        "import os, sys\nfrom pathlib import Path\nimport tokenizer.encode as e\n"
        "moment = sys.argv[4]\n"
        "def die(*a): os._exit(9)\n"
        "if moment == 'sealed': e.publish = die\n"
        "if moment == 'half published':\n"
        "    replace = Path.replace\n"
        "    def once(self, target):\n"
        "        replace(self, target)\n"
        "        if str(target).endswith('.bin'): die()\n"
        "    Path.replace = once\n"
        "if moment == 'no manifest': e.manifests.write = die\n"
        "if __name__ == '__main__':\n"
        "    e.encode([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), restart=True)\n"
    )
    script = tmp_path / "die.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, path, folder, prefix, moment]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 9
    # Neither an old manifest nor an old index stands beside new tokens.
    assert not Path(f"{prefix}.json").exists()
    if moment == "half published":
        with pytest.raises(DataError, match=r"x\.idx"):
            Shard.open(prefix)
    encode([path], folder, prefix)
    assert contents(prefix) == contents(tmp_path / "whole" / "x")
    assert names(tmp_path / "cut") == ["x.bin", "x.idx", "x.json"]


# --- duplicates ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@example(items=[*"abc"] * 30)  # meets itself in one bucket however often that is split
@given(items=st.lists(st.sampled_from("abcdefgh") | st.text(max_size=3), max_size=200))
@pytest.mark.parametrize("small", [False, True])
def test_what_was_seen_before_is_found(tmp_path_factory, small, items):
    with pytest.MonkeyPatch.context() as patch:
        if small:  # many buffers, and buckets split to the last bit
            patch.setattr(duplicates, "_BUFFER_RECORDS", 8)
            patch.setattr(duplicates, "_BUCKET_RECORDS", 2)
        items = [item for item in items if item.isascii() or item.isalpha()]
        seen = find_seen(items, tmp_path_factory.mktemp("seen") / "x")
    assert [seen[k] for k in range(len(items))] == [
        item in items[:k] for k, item in enumerate(items)
    ]


def test_lines_and_documents_are_dropped_as_bloom_did(tmp_path, folder):
    texts = ["  a b \nmenu\n\nc", "menu\nd", "x", "menu", "c\n a b", "d e", "", "de\nmenu"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    manifest = encode([path], folder, tmp_path / "both", dedup=["documents", "lines"])
    # "d e" stays; "de" without "menu" is the same without its space.
    assert decoded(tmp_path / "both", folder)[0] == ["a b\nmenu\nc", "d", "x", "d e"]
    assert manifest["deduplicated"] == ["lines", "documents"]
    assert (manifest["duplicate_lines"], manifest["duplicate_documents"]) == (5, 1)
    assert manifest["empty_documents"] == 3
    encode([path], folder, tmp_path / "documents", dedup=["documents"])
    assert decoded(tmp_path / "documents", folder)[0] == [*texts[:6], "de\nmenu"]
    encode([path], folder, tmp_path / "lines", dedup=["lines"])
    lines = ["a b\nmenu\nc", "d", "x", "d e", "de"]
    assert decoded(tmp_path / "lines", folder)[0] == lines


# --- real text -----------------------------------------------------------------------------------


def test_real_text_comes_back(tmp_path, folder):
    if not CORPUS.exists():
        pytest.skip(f"the text for tests and benchmarks is not here: {CORPUS}")
    from tokenizer.documents import read_documents

    texts = [t for t, _ in zip(read_documents([CORPUS / "hi.jsonl.gz"]), range(100), strict=False)]
    encode([write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])], folder,
           tmp_path / "shard")  # fmt: skip
    assert decoded(tmp_path / "shard", folder)[0] == texts
