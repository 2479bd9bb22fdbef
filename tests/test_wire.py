"""Bytes on the wire: each sync method by formula, ZeRO's traffic against an interface's counter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import BloomModel
from pretrain.config_sync import AllReduce, parse_sync
from pretrain.sizes import ModelShape, shape_of
from pretrain.wire import sync_bytes, zero_traffic

ROOT = Path(__file__).parents[1]

M98 = BloomModel(vocab_size=16_384, hidden_size=768, layers=12, heads=12)


def test_bytes_of_each_method_on_98_million_parameters():
    shape = shape_of(M98)
    assert shape.parameters == pytest.approx(98e6, rel=0.02)
    plain = sync_bytes(AllReduce(), shape, 1, 1, 2)
    assert plain == 4 * shape.parameters  # a ring of two sends all of it once
    assert sync_bytes(AllReduce(), shape, 1, 1, 4) == 1.5 * plain
    assert sync_bytes(AllReduce(), shape, 2, 4, 2) == plain / 4
    ratio = {
        text: plain / sync_bytes(parse_sync(text), shape, 1, 1, 2)
        for text in ("allreduce:bf16", "powersgd:4", "powersgd:1", "int8", "int4", "diloco:50",
                     "diloco:50:int4", "localsgd:10")
    }  # fmt: skip
    assert ratio["allreduce:bf16"] == 2
    assert ratio["localsgd:10"] == 10
    assert ratio["diloco:50"] == 50
    assert ratio["int4"] == pytest.approx(4 / (0.5 + 4 / 256))
    assert ratio["int8"] == pytest.approx(4 / (1 + 4 / 256))
    assert ratio["diloco:50:int4"] == pytest.approx(50 * ratio["int4"])
    assert ratio["diloco:50:int4"] > 350
    assert ratio["powersgd:1"] > ratio["powersgd:4"] > 40


def test_powersgd_sends_small_matrices_whole_and_row_blocks_under_zero_3():
    shape = ModelShape(8, 1, 1, 8, 8, ((100, 50, 1), (4, 6, 2)), vectors=30)
    sent = sync_bytes(parse_sync("powersgd:2"), shape, 1, 1, 2)
    # 2 (100 + 50) factors; 4 x 6 would not shrink by two; vectors whole: all-reduced by a ring of 2
    assert sent == 4 * (2 * (100 + 50) + 2 * 24 + 30)
    sliced = sync_bytes(parse_sync("powersgd:2"), shape, 3, 2, 2)
    assert sliced == 4 * (2 * (50 + 50) + 2 * 12 + 15)


@pytest.mark.parametrize("text", ["", "powersgd:x", "int8:2", "diloco:5:int2", "allreduce:int8"])
def test_methods_that_are_none(text):
    with pytest.raises(ValueError, match="one of allreduce"):
        parse_sync(text)


COUNT = """
import sys, torch
from pathlib import Path
from pretrain.config import BloomModel, Engine
from pretrain.config_optim import AdamW
from pretrain.engine.world import join_world
from pretrain.engine.deepspeed_setup import sharded_construction
from pretrain.engine.zero import ZeroEngine
from pretrain.model import build_model
from pretrain.recipe import StepPlan
sent = lambda: int(Path("/proc/net/dev").read_text().split("lo:")[1].split()[8])
stage, precision = int(sys.argv[1]), sys.argv[2]
with join_world(120) as world:
    config = Engine(zero_stage=stage, precision=precision)
    with sharded_construction(config, world):
        model = build_model(BloomModel(vocab_size=512, hidden_size=256, layers=2, heads=4))
    engine = ZeroEngine(model, AdamW(), config, world)
    counts = []
    for step in range(3):
        world.barrier()
        before = sent()
        stats = engine.forward_backward(torch.zeros(2, 9, dtype=torch.long), 4)
        engine.step(StepPlan(4, 1e-3, 0.1, (0.9, 0.95), 1.0), stats)
        world.barrier()
        counts.append(sent() - before)
    if world.is_first:
        Path(sys.argv[3]).write_text(f"{engine.parameter_count()} {counts[-1]}")
"""


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_planned_traffic_is_what_the_interface_counts(tmp_path, stage, precision):
    """Two ranks in a network namespace of their own, so that nothing else is counted."""
    inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("needs root, unshare and ip for a network namespace")
    script, result = tmp_path / "count.py", tmp_path / "count.txt"
    script.write_text(COUNT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(script), str(stage), precision, str(result)]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*inside, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, found = map(int, result.read_text().split())
    width = 2 if precision == "bf16" else 4
    traffic = zero_traffic(count, 2, stage, width, passes=2, on_cpu=True)
    a_rank = sum(part.factor * part.payload_bytes / 2 for part in traffic)
    assert found == pytest.approx(2 * a_rank, rel=0.05)
