"""The sections `mesh` and `sync`: what they accept, how problems are told, short forms of plans."""

import pytest

from pretrain.config_file import load
from pretrain.config_sync import AllReduce, DiLoCo, LocalSgd, PowerSgd, Quantized, parse_sync
from pretrain.errors import ConfigError
from tests.ranks import run_ranks
from tests.test_resume import train_ranks
from tests.tiny import write_config


@pytest.mark.parametrize(("overrides", "key", "rule"), [
    (["sync.method=gossip"], "sync.method", "allreduce"),
    (["sync.method=powersgd", "sync.start=10 steps"], "sync.start", "the clock is tokens"),
    (["mesh.check_every=0 steps"], "mesh.check_every", "greater than 0"),
    (["sync.method=diloco", "sync.parts=60"], "sync.parts", "at most every_steps = 50"),
    (["sync.method=diloco", "sync.parts=5", "sync.delay_steps=11"], "sync.delay_steps",
     "at most every_steps / parts = 10"),
    (["sync.method=diloco", "sync.coordinator=host:1", "mesh.shard_ranks=2"], "mesh.shard_ranks",
     "each launch is one replica"),
    (["sync.method=diloco", "sync.coordinator=host:1", "start=fresh"], "start", "move the folder"),
    (["sync.method=diloco", "sync.coordinator=host"], "sync.coordinator", "pattern"),
    (["sync.method=diloco", "sync.parts=2", "optimizer.name=schedulefree"], "sync.parts",
     "cannot be streamed"),
    (["sync.method=localsgd", "sync.outer_rate=0.5"], "sync.outer_rate", "no such key"),
    (["sync.method=quantized", "sync.bits=2"], "sync.bits", "8 or 4"),
])  # fmt: skip
def test_problems_name_the_key_and_the_cure(tmp_path, overrides, key, rule):
    with pytest.raises(ConfigError) as error:
        load(write_config(tmp_path), overrides)
    (problem,) = error.value.problems
    assert key in problem.key
    assert rule in str(problem), str(problem)
    assert problem.cure


def test_groups_of_equal_size(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(AssertionError, match=r"mesh\.shard_ranks = 2: the run has 3 ranks"):
        run_ranks(3, train_ranks, path, ["mesh.shard_ranks=2"])


def test_short_forms_are_sections():
    assert parse_sync("allreduce") == AllReduce()
    assert parse_sync("allreduce:bf16") == AllReduce(precision="bf16")
    assert parse_sync("powersgd:2") == PowerSgd(rank=2)
    assert parse_sync("int4") == Quantized(bits=4)
    assert parse_sync("diloco:10:int8") == DiLoCo(every_steps=10, precision="int8")
    assert parse_sync("localsgd") == LocalSgd()
