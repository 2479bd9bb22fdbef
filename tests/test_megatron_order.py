"""Megatron's order: the published rules transcribed step by step, and files kept of the result."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import Shard, megatron
from pretrain.data.megatron import Blend, MegatronIndex
from pretrain.errors import DataError
from tests.test_data import write_by_hand

ROOT = Path(__file__).parents[1]
TABLES = ("doc", "sample", "shuffle")
# The published example: sequences of these lengths, samples of 4 tokens, 6 wanted, seed 42.
ORACLE = {
    "doc": [1, 3, 0, 2, 1, 3, 0, 2],
    "sample": [[0, 0], [1, 1], [2, 3], [3, 2], [3, 6], [5, 0], [6, 2], [7, 1], [7, 5]],
    "shuffle": [3, 0, 1, 2, 5, 4, 7, 6],
}


def transcribed_index(sizes, sequences, target, length, seed):
    """(doc_idx, sample_idx, shuffle_idx, parts) as lists: the published rules, token by token."""
    tokens = sum(sizes[k] for k in sequences)
    epochs = 1
    while (epochs * tokens - 1) // length < target:
        epochs += 1
    total = (epochs * tokens - 1) // length
    all_but_one = ((epochs - 1) * tokens - 1) // length
    apart = epochs > 1 and target - all_but_one < int(0.95 * ((tokens - 1) // length))
    random = np.random.RandomState(seed)
    doc_idx = []
    for passes in [epochs - 1, 1] if apart else [epochs]:
        part = np.array(list(sequences) * passes)
        random.shuffle(part)
        doc_idx += part.tolist()
    stream = [(at, j) for at, k in enumerate(doc_idx) for j in range(sizes[k])]
    sample_idx = [[0, 0]] + [list(stream[i * length]) for i in range(1, total + 1)]
    shuffle_idx = []
    for part in [range(all_but_one), range(all_but_one, total)] if apart else [range(total)]:
        part = np.array(part)
        random.shuffle(part)
        shuffle_idx += part.tolist()
    return doc_idx, sample_idx, shuffle_idx, 2 if apart else 1


def make_shard(folder, sizes, letter="i", name="a"):
    """A shard whose tokens are numbered from 0, so that every token names its place."""
    ends = np.cumsum(sizes)
    write_by_hand(folder / name, [range(e - n, e) for e, n in zip(ends, sizes, strict=True)],
                  letter)  # fmt: skip
    return Shard.open(folder / name)


def table_file(cache, kind, target=6, length=4, seed=42):
    return cache / f"a_train_indexmap_{target}ns_{length}sl_{seed}s_{kind}_idx.npy"


def kept(cache, *key):
    """(doc_idx, sample_idx, shuffle_idx) as they lie on disk."""
    return [np.load(table_file(cache, kind, *key)) for kind in TABLES]


@pytest.fixture
def oracle(tmp_path):
    """(open, cache) of the published example; `open` takes changes to it."""
    shard, cache = make_shard(tmp_path, [5, 3, 7, 2]), tmp_path / "cache"

    def open_index(shard=shard, sequences=range(4), target=6, length=4, seed=42):
        return MegatronIndex.open(shard, sequences, target, length, seed, cache, "train")

    return open_index, cache


# --- index ---------------------------------------------------------------------------------------


def test_the_published_index(oracle):
    open_index, cache = oracle
    index = open_index()
    assert (index.samples, index.epoch_samples) == (8, 4)
    assert [table.tolist() for table in kept(cache)] == list(ORACLE.values())
    assert [table.dtype.name for table in kept(cache)] == ["int32", "int32", "uint32"]
    # Sample 0 is row 3: from (3, 2) to (3, 6), inside one sequence; sample 1 is row 0.
    assert index.pieces(0) == [(2, 10, 5)]
    assert index.pieces(1) == [(1, 5, 3), (3, 15, 2)]
    assert index.read(1).tolist() == [5, 6, 7, 15, 16]
    assert index.read(1).dtype == np.int64
    for number in (-1, 8):
        with pytest.raises(ValueError, match="of 8"):
            index.pieces(number)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 8, 12, 31]), min_size=1, max_size=12),
    cut=st.tuples(st.integers(0, 11), st.integers(1, 12)),
    length=st.integers(1, 9),
    target=st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
    chunk=st.sampled_from([1, 2, 3, 2**18]),
    letter=st.sampled_from("Hi"),
)
def test_equals_a_plain_transcription(
    tmp_path_factory, sizes, cut, length, target, seed, chunk, letter
):
    folder = tmp_path_factory.mktemp("index")
    sequences = range(min(cut[0], len(sizes) - 1), min(cut[0] + cut[1], len(sizes)))
    if sum(sizes[k] for k in sequences) == 0:
        sizes[sequences.start] = 7
    doc_idx, sample_idx, shuffle_idx, _ = transcribed_index(sizes, sequences, target, length, seed)
    shard, cache = make_shard(folder, sizes, letter), folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "_CHUNK", chunk)
        index = MegatronIndex.open(shard, sequences, target, length, seed, cache, "train")
    found = [table.tolist() for table in kept(cache, target, length, seed)]
    assert found == [doc_idx, sample_idx, shuffle_idx]
    assert index.samples == len(shuffle_idx) >= target
    starts = np.cumsum([0, *sizes])
    stream = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in doc_idx])
    for number, row in enumerate(shuffle_idx):
        expected = stream[row * length : row * length + length + 1]
        assert index.read(number).tolist() == expected.tolist()
        runs = index.pieces(number)
        assert all(run.count > 0 for run in runs)
        assert all(starts[k] <= at and at + n <= starts[k + 1] for k, at, n in runs)


@pytest.mark.parametrize(
    ("target", "epochs", "parts"),
    [(19, 1, 1), (20, 2, 2), (36, 2, 2), (37, 2, 1), (39, 2, 1), (40, 3, 2), (57, 3, 1)],
)
def test_the_last_epoch_stands_apart_below_95_percent(tmp_path, target, epochs, parts):
    # 200 tokens, 19 samples an epoch (39 in two, 59 in three): int(0.95 * 19) = 18 of the last.
    shard, sizes = make_shard(tmp_path, [10] * 20), [10] * 20
    index = MegatronIndex.open(shard, range(20), target, 10, 3, tmp_path, "train")
    doc_idx, _, shuffle_idx, expected_parts = transcribed_index(sizes, range(20), target, 10, 3)
    assert (len(doc_idx) // 20, expected_parts) == (epochs, parts)
    found = kept(tmp_path, target, 10, 3)
    assert (found[0].tolist(), found[2].tolist()) == (doc_idx, shuffle_idx)
    if epochs > 1:
        before = ((epochs - 1) * 200 - 1) // 10
        assert (max(shuffle_idx[:before]) < before) == (parts == 2)
    assert index.epoch_samples == 19


def test_samples_cover_an_epoch_exactly(tmp_path):
    shard = make_shard(tmp_path, [3, 0, 14, 1, 9, 13])
    index = MegatronIndex.open(shard, range(6), 13, 3, 1, tmp_path, "train")
    assert index.samples == index.epoch_samples == 13
    labels = np.concatenate([index.read(number)[1:] for number in range(13)])
    # Every token but the first in the order, which is an input only, is a label once.
    assert len(labels) == len(set(labels.tolist())) == 39
    (first,) = set(range(40)) - set(labels.tolist())
    assert [index.read(number)[0] for number in range(13)].count(first) == 1


def test_wider_numbers_where_32_bits_do_not_suffice(oracle, monkeypatch):
    open_index, cache = oracle
    monkeypatch.setattr(megatron, "_MOST_NARROW", 7)
    monkeypatch.setattr(megatron, "_MOST_UNSIGNED", 7)
    index = open_index()
    assert [table.tolist() for table in kept(cache)] == list(ORACLE.values())
    assert [table.dtype.name for table in kept(cache)] == ["int32", "int64", "int64"]
    assert index.read(1).tolist() == [5, 6, 7, 15, 16]


def test_a_split_without_tokens_or_sequences_is_refused(tmp_path):
    shard = make_shard(tmp_path, [0, 0, 3])
    with pytest.raises(DataError, match="no tokens"):
        MegatronIndex.open(shard, range(2), 1, 2, 0, tmp_path, "train")
    for sequences in (range(2, 2), range(4), range(-1, 2), range(0, 3, 2)):
        with pytest.raises(ValueError, match="of 3 sequences"):
            MegatronIndex.open(shard, sequences, 1, 2, 0, tmp_path, "train")


# --- files ---------------------------------------------------------------------------------------


def test_files_are_used_again(oracle, monkeypatch):
    open_index, cache = oracle
    first = [open_index().read(number).tolist() for number in range(8)]
    files = {path.name for path in cache.iterdir()}
    assert files == {*(table_file(cache, kind).name for kind in TABLES),
                     "a_train_indexmap_6ns_4sl_42s_built_from.json"}  # fmt: skip
    monkeypatch.setattr(megatron, "_write", None)
    assert [open_index().read(number).tolist() for number in range(8)] == first


@pytest.mark.parametrize("sample_dtype", ["i4", "i8"])
def test_megatrons_own_files_are_used(oracle, monkeypatch, sample_dtype):
    open_index, cache = oracle
    cache.mkdir()
    other_order = {**ORACLE, "shuffle": ORACLE["shuffle"][::-1]}  # shows which files are read
    for kind, dtype in zip(TABLES, ("i4", sample_dtype, "u4"), strict=True):
        np.save(table_file(cache, kind), np.array(other_order[kind], dtype), allow_pickle=True)
    monkeypatch.setattr(megatron, "_write", None)
    assert open_index().pieces(7) == [(2, 10, 5)]


def test_files_built_from_other_data_are_refused(oracle, tmp_path):
    open_index, cache = oracle
    open_index()
    (tmp_path / "other").mkdir()
    other = make_shard(tmp_path / "other", [5, 3, 7, 2], "q")  # as long, but other bytes
    note = cache / "a_train_indexmap_6ns_4sl_42s_built_from.json"
    for changes, found in [({"shard": other}, "shard"), ({"sequences": range(1, 4)}, "1, 4")]:
        with pytest.raises(DataError, match=rf"built_from\.json(.|\n)*{found}(.|\n)*delete"):
            open_index(**changes)
    note.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"built_from\.json"):
        open_index()


@pytest.mark.parametrize("kind", TABLES)
def test_damaged_files_are_refused(oracle, kind):
    open_index, cache = oracle
    open_index()
    path = table_file(cache, kind)
    whole, entry = path.read_bytes(), np.load(path)
    damaged = [whole[:size] for size in (0, 5, 60, 127, 128, len(whole) - 1)]
    for at in (0, 6, 8, 12, 20, 40, 60):
        damaged.append(whole[:at] + b"\0\xff" + whole[at + 2 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{kind}_idx\.npy") as error:
            open_index()
        assert "delete it" in str(error.value)
    for array in (entry[:-1], entry.astype("f8"), entry[None], entry.astype(object)):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(DataError, match=rf"{kind}_idx\.npy"):
            open_index()
    path.unlink()
    assert open_index().read(1).tolist() == [5, 6, 7, 15, 16]


@pytest.mark.parametrize(
    ("kind", "changed", "number"),
    [
        ("doc", {0: 4}, 1),  # not a sequence of the shard
        ("doc", {3: -1}, 0),
        ("doc", {0: 0}, 1),  # one of another length
        ("sample", {4: [9, 6]}, 0),
        ("sample", {4: [2, 6]}, 0),
        ("sample", {4: [3, 7]}, 0),
        ("sample", {3: [3, -2], 4: [3, 2]}, 0),  # right in number, before or beyond the sequence
        ("sample", {3: [3, 4], 4: [3, 8]}, 0),
        ("shuffle", {0: 8}, 0),
        ("shuffle", {0: 2**32 - 1}, 0),
    ],
)
def test_entries_that_make_no_sample_are_refused(oracle, kind, changed, number):
    open_index, cache = oracle
    open_index()
    array = np.load(table_file(cache, kind))
    for at, value in changed.items():
        array[at] = value
    np.save(table_file(cache, kind), array)
    with pytest.raises(DataError, match=f"sample {number} .* tokens of range") as error:
        open_index().pieces(number)  # opening looks at the first and the last
    assert "each has 5" in str(error.value)


def test_sequences_of_another_split_are_refused(tmp_path):
    shard = make_shard(tmp_path, [4] * 10)
    MegatronIndex.open(shard, range(5), 4, 4, 0, tmp_path, "train")
    (tmp_path / "a_train_indexmap_4ns_4sl_0s_built_from.json").unlink()  # as Megatron leaves it
    with pytest.raises(DataError, match=r"tokens of range\(5, 10\)"):
        MegatronIndex.open(shard, range(5, 10), 4, 4, 0, tmp_path, "train")


def test_an_error_while_building_leaves_nothing_half_written(oracle, monkeypatch):
    open_index, cache = oracle

    def fails(*_):
        yield np.zeros((1, 2), "i4")
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(megatron, "_sample_rows", fails)
        with pytest.raises(MemoryError):
            open_index()
    assert not table_file(cache, "sample").exists()
    assert not list(cache.glob("*.partial"))
    assert open_index().read(1).tolist() == [5, 6, 7, 15, 16]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    shard, cache = make_shard(tmp_path, [5, 3]), tmp_path / "a.bin"
    with pytest.raises(DataError, match="cannot be written"):
        MegatronIndex.open(shard, range(2), 1, 4, 0, cache, "train")
    with pytest.raises(DataError, match="cannot be written"):
        Blend.open([1, 2], 10, cache)


BUILD = """
import sys, numpy as np
from pathlib import Path
from pretrain.data import Shard
from pretrain.data.megatron import Blend, MegatronIndex
shard, cache = Shard.open(sys.argv[1]), Path(sys.argv[2])
input()  # all have started
for seed in range(25):
    index = MegatronIndex.open(shard, range(300), 2000, 8, seed, cache, "train")
    numbers = range(0, index.samples, 97)
    print(seed, sum(int(index.read(n) @ np.arange(9)) * (n + 1) for n in numbers))
for k in range(5):
    print(k, Blend.open([k + 1, 2, 3], 5000 * (k + 1), cache).place(4000, 900)[1].tolist())
"""


def test_processes_that_build_at_once_all_end_up_right(tmp_path):
    make_shard(tmp_path, [k % 23 for k in range(300)])

    def start(cache):
        return subprocess.Popen(
            [sys.executable, "-c", BUILD, tmp_path / "a", tmp_path / cache],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    together, alone = [start("shared") for _ in range(3)], start("alone")
    for process in together:
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate()[0] for process in together]
    expected = alone.communicate("\n")[0]
    assert expected.count("\n") == 30
    assert printed == [expected] * 3
    files = [{p.name: p.read_bytes() for p in (tmp_path / cache).iterdir()}
             for cache in ("shared", "alone")]  # fmt: skip
    assert files[0] == files[1]
