"""What a run shows before it begins: who is where, and how the batch is dealt."""

from pretrain.config_file import load
from pretrain.rank_table import RankRow, batch_arithmetic, rank_table
from tests.tiny import write_config


def rows_of(hosts, per_host, shard_ranks, device="cpu"):
    """Ranks host by host, in shard groups of consecutive ranks."""
    return [
        RankRow(
            f"node{rank // per_host}",
            rank,
            rank % per_host,
            device.format(rank % per_host),
            rank // shard_ranks,
            rank % shard_ranks,
        )
        for rank in range(hosts * per_host)
    ]


def test_four_ranks_in_two_shard_groups():
    lines = [line.split() for line in rank_table(rows_of(2, 2, 2)).splitlines()]
    assert lines == [
        ["host", "rank", "local", "rank", "device", "shard", "group", "replica", "group"],
        ["node0", "0", "0", "cpu", "0", "0"],
        ["node0", "1", "1", "cpu", "0", "1"],
        ["node1", "2", "0", "cpu", "1", "0"],
        ["node1", "3", "1", "cpu", "1", "1"],
    ]


def test_columns_stand_below_their_names():
    head, *rows = rank_table(rows_of(2, 2, 2, "cuda:{} NVIDIA H100 80GB HBM3")).splitlines()
    for name in ("device", "shard group", "replica group"):
        assert all(row[head.index(name) - 1] == " " != row[head.index(name)] for row in rows)


def test_many_ranks_have_a_row_a_host():
    """384 ranks on 48 hosts, as BLOOM's: what fits a terminal."""
    rows = rows_of(48, 8, 48, "cuda:{} NVIDIA A100-SXM4-80GB")
    lines = rank_table(rows).splitlines()
    assert len(lines) == 1 + 48
    assert max(map(len, lines)) <= 100
    assert lines[2].split()[:3] == ["node1", "8-15", "0-7"]
    assert lines[2].split()[-2:] == ["0", "8-15"]
    assert lines[48].split()[:3] == ["node47", "376-383", "0-7"]
    assert lines[48].split()[-2:] == ["7", "40-47"]
    assert "cuda NVIDIA A100-SXM4-80GB" in lines[1]
    assert len(rank_table(rows, full=True).splitlines()) == 1 + 384


def test_a_host_whose_ranks_are_not_in_a_row():
    rows = [RankRow("ab"[rank % 2], rank, rank // 2, "cpu", 0, 0) for rank in range(18)]
    line = rank_table(rows).splitlines()[1].split()
    assert line[:3] == ["a", "0,2,4,6,8,10,12,14,16", "0-8"]


def test_batches(tmp_path):
    config = load(write_config(tmp_path))  # batches of 3, later of 9; 8 tokens; 2 a pass
    first, final = batch_arithmetic(config, config.build_recipe(), 2).splitlines()
    assert first == (
        "  batch of the first step: 3 x 8 tokens = 24; 2 ranks x 1 or 2 samples, 1 pass of up to 2"
    )
    assert "batch of the last step: 9 x 8 tokens = 72; 2 ranks x 4 or 5 samples" in final
    assert "3 passes of up to 2" in final
    assert "idle" not in first + final


def test_idle_ranks_are_named(tmp_path):
    config = load(write_config(tmp_path))
    first, final = batch_arithmetic(config, config.build_recipe(), 5).splitlines()
    assert first.endswith("; 2 ranks idle")
    assert "0 or 1 sample," in first
    assert "idle" not in final


def test_a_batch_that_stays(tmp_path):
    config = load(write_config(tmp_path), ["recipe.batch={final=4}"])
    text = batch_arithmetic(config, config.build_recipe(), 2)
    assert text == (
        "  batch of every step: 4 x 8 tokens = 32; 2 ranks x 2 samples, 1 pass of up to 2"
    )
