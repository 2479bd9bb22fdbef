"""Shards: Megatron's format both ways, damage refused, nothing half written."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Data, Source
from pretrain.data import Shard, ShardWriter
from pretrain.errors import DataError

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "d": 6, "H": 8}  # struct letter -> dtype code


def write_by_hand(prefix, sequences, letter="i", doc_idx=None, **changed):
    """A shard packed byte by byte, as the published layout says; `changed` falsifies the header."""
    size, n = struct.calcsize(letter), len(sequences)
    doc_idx = list(range(n + 1)) if doc_idx is None else doc_idx
    lengths = [len(tokens) for tokens in sequences]
    pointers = [size * sum(lengths[:k]) for k in range(n)]
    header = {"magic": b"MMIDIDX\x00\x00", "version": 1, "code": CODES[letter], **changed}
    index = header["magic"] + struct.pack("<QB", header["version"], header["code"])
    index += struct.pack("<QQ", n, len(doc_idx))
    index += struct.pack(f"<{n}i", *lengths) + struct.pack(f"<{n}q", *pointers)
    index += struct.pack(f"<{len(doc_idx)}q", *doc_idx)
    Path(f"{prefix}.idx").write_bytes(index)
    tokens = [token for tokens in sequences for token in tokens]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))


def write_shard(prefix, documents, vocab_size=1000):
    with ShardWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.append(document)


def make_source(folder, name, lengths, start=0, weight=1.0):
    """A source whose tokens count up from `start`, so that every token names its place."""
    ends = start + np.cumsum(lengths)
    write_shard(folder / name, [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)],
                vocab_size=10**6)  # fmt: skip
    return Source(name=name, path=folder / name, weight=weight)


def make_data(*sources, length=4, fraction=0.05):
    return Data(sequence_length=length, sources=sources, validation_fraction=fraction)


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["B", "b", "h", "i", "q", "H"])
def test_reads_a_file_packed_by_hand(tmp_path, letter):
    write_by_hand(tmp_path / "a", [[5, 6, 7], [8], [9, 10]], letter)
    shard = Shard.open(tmp_path / "a")
    assert (shard.sequences, shard.documents, shard.tokens) == (3, 3, 6)
    assert shard.dtype.char == {"q": "l"}.get(letter, letter)
    assert shard.read(0, 6).tolist() == [5, 6, 7, 8, 9, 10]
    assert shard.read(2, 3).tolist() == [7, 8, 9]
    assert shard.read(6, 0).dtype == np.int64
    assert [shard.document_start(d) for d in range(4)] == [0, 3, 4, 6]
    assert [shard.document_at(t) for t in range(6)] == [0, 0, 0, 1, 2, 2]


def test_documents_of_several_sequences_and_empty_ones(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 2], [3], [], [4, 5]], doc_idx=[0, 2, 3, 4])
    shard = Shard.open(tmp_path / "a")
    assert (shard.sequences, shard.documents) == (4, 3)
    assert [shard.document_start(d) for d in range(4)] == [0, 3, 3, 5]
    assert [shard.document_at(t) for t in range(5)] == [0, 0, 0, 2, 2]


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1),
    vocab_size=st.sampled_from([100, 65_499, 65_500, 250_680]),
)
def test_plain_numpy_reads_what_we_write(tmp_path_factory, documents, vocab_size):
    prefix = tmp_path_factory.mktemp("shard") / "v1.2"  # a dot in the name is not a suffix
    write_shard(prefix, documents, vocab_size)
    n, small = len(documents), vocab_size < 65_500
    index = Path(f"{prefix}.idx").read_bytes()
    assert len(index) == 34 + 12 * n + 8 * (n + 1)
    assert struct.unpack("<9sQBQQ", index[:34]) == (b"MMIDIDX\0\0", 1, 8 if small else 4, n, n + 1)
    lengths = np.frombuffer(index, "<i4", n, 34)
    pointers = np.frombuffer(index, "<i8", n, 34 + 4 * n)
    assert np.frombuffer(index, "<i8", n + 1, 34 + 12 * n).tolist() == list(range(n + 1))
    tokens = np.fromfile(f"{prefix}.bin", "<u2" if small else "<i4")
    starts = pointers // tokens.itemsize
    found = [tokens[s : s + k].tolist() for s, k in zip(starts, lengths, strict=True)]
    assert found == documents
    assert Shard.open(prefix).documents == n


def test_the_index_is_written_in_chunks(tmp_path, monkeypatch):
    documents = [[k] * (k % 5 + 1) for k in range(100)]
    write_shard(tmp_path / "whole", documents)
    monkeypatch.setattr("pretrain.data.shards._CHUNK", 7)
    write_shard(tmp_path / "chunks", documents)
    assert (tmp_path / "chunks.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"magic": b"TNTIDX\0\0\0"}, "begins with"),
        ({"version": 2}, "version 2"),
        ({"code": 99}, "dtype code 99"),
        ({"code": 0}, "dtype code 0"),
        ({"letter": "d"}, "float64"),
        ({"code": 7}, "float64"),
        ({"code": 8}, "promises 14"),  # promises u16 where the tokens have 4 bytes
        ({"doc_idx": [1, 2]}, "from sequence 1"),
        ({"doc_idx": [0, 1]}, "to 1"),
        ({"doc_idx": [0]}, "0 documents"),
        ({"doc_idx": []}, "0 documents"),
    ],
)
def test_a_false_header_is_refused(tmp_path, changed, message):
    write_by_hand(tmp_path / "a", [[1, 2, 3], [4]], **changed)
    with pytest.raises(DataError, match=message) as error:
        Shard.open(tmp_path / "a")
    assert str(tmp_path) in str(error.value)
    assert "cure:" in str(error.value)


def test_every_truncation_is_refused(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 2, 3], [4]])
    for name in ("a.idx", "a.bin"):
        content = (tmp_path / name).read_bytes()
        for size in [*range(len(content)), len(content) + 1]:
            (tmp_path / name).write_bytes((content + b"\0")[:size])
            with pytest.raises(DataError, match=r"a\.(idx|bin): .*bytes"):
                Shard.open(tmp_path / "a")
        (tmp_path / name).write_bytes(content)
    assert Shard.open(tmp_path / "a").tokens == 4


def test_absent_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.bin: No such file"):
        Shard.open(tmp_path / "a")
    write_by_hand(tmp_path / "a", [])
    with pytest.raises(DataError, match="0 sequences"):
        Shard.open(tmp_path / "a")
    write_by_hand(tmp_path / "a", [[]])
    with pytest.raises(DataError, match="0 bytes"):
        Shard.open(tmp_path / "a")


def test_damage_inside_the_tables_is_found_at_use(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 2, 3], [4], [5]], doc_idx=[0, 7, 2, 3])
    shard = Shard.open(tmp_path / "a")
    with pytest.raises(DataError, match="begins at sequence 7"):
        shard.document_start(1)


def test_reads_outside_are_errors(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 2, 3]])
    shard = Shard.open(tmp_path / "a")
    for offset, count in [(-1, 2), (0, 4), (3, 1), (2, -1)]:
        with pytest.raises(ValueError, match="tokens"):
            shard.read(offset, count)


HUGE = """
import resource, sys, time
from pretrain.data.shards import Shard
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = rss(), time.monotonic()
shard = Shard.open(sys.argv[1])
target = int(sys.argv[2])
found = [shard.documents, shard.tokens, shard.document_at(target * 5 + 3),
         shard.document_start(target), shard.document_at(shard.tokens - 1)]
shard.fingerprint()
print(*found, time.monotonic() - start, rss() - before)
"""


def test_a_billion_documents_open_at_once(tmp_path):
    n, target, size = 10**9, 123_456_789, 2
    touched, low, high = {0, target, n - 1}, 0, n
    while low < high:  # the entries that a bisection for the target looks at; all others stay 0
        middle = (low + high) // 2
        touched.add(middle)
        low, high = (middle + 1, high) if middle <= target else (low, middle)
    low, high = 0, n
    while low < high:  # and for the last document
        middle = (low + high) // 2
        touched.add(middle)
        low = middle + 1
    with (tmp_path / "huge.idx").open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, n, n + 1))
        index.truncate(34 + 12 * n + 8 * (n + 1))
        for document in touched:
            index.seek(34 + 4 * document)
            index.write(struct.pack("<i", 5))
            index.seek(34 + 4 * n + 8 * document)
            index.write(struct.pack("<q", document * 5 * size))
            index.seek(34 + 12 * n + 8 * document)
            index.write(struct.pack("<q", document))
        index.seek(34 + 12 * n + 8 * n)
        index.write(struct.pack("<q", n))
    with (tmp_path / "huge.bin").open("wb") as tokens:
        tokens.truncate(5 * n * size)
    command = [sys.executable, "-c", HUGE, str(tmp_path / "huge"), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    *found, seconds, growth_mb = result.stdout.split()
    assert [int(x) for x in found] == [n, 5 * n, target, 5 * target, n - 1]
    assert float(seconds) < 2
    assert float(growth_mb) < 200


# --- writer --------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def documents():
        yield [1, 2]
        raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        write_shard(tmp_path / "a", documents())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path):
    code = (
        "import sys, time\n"
        "from pretrain.data import ShardWriter\n"
        "with ShardWriter(sys.argv[1], 100) as writer:\n"
        "    for _ in range(1000): writer.append(range(100))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert all(path.suffix == ".partial" for path in tmp_path.iterdir())
    with pytest.raises(DataError, match="No such file"):
        Shard.open(tmp_path / "a")
    write_shard(tmp_path / "a", [[1, 2]])  # and what it left is in nobody's way
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["a.bin.partial", "a.lengths.partial", "a.idx.partial"])
def test_a_full_disk_is_reported(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"No space left(.|\n)*cure: free space"):
        write_shard(tmp_path / "a", [[1] * 100] * 20_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("document", "message"), [([], "0 tokens"), ([1, -1], "-1 to 1"), ([100], "100 to 100")]
)
def test_bad_documents_are_refused(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a", [[1], document], vocab_size=100)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_documents_is_not_written(tmp_path):
    with pytest.raises(DataError, match="no documents"):
        write_shard(tmp_path / "a", [])
    assert list(tmp_path.iterdir()) == []


def test_rewriting_replaces_the_shard(tmp_path):
    write_shard(tmp_path / "a", [[1, 2]])
    write_shard(tmp_path / "a", [[3], [4]])
    assert Shard.open(tmp_path / "a").read(0, 2).tolist() == [3, 4]
    assert Shard.open(tmp_path / "a").documents == 2
