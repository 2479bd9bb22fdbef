"""Runs on several hosts one of which is lost: who is missing is said in time, and all goes on."""

import sys
import time
from pathlib import Path

import pytest

from pretrain.observe.metrics import read_metrics
from tests.hosts import Hosts, reason_missing
from tests.tiny import write_config

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
LIMIT_SECONDS = 60


def worker(hosts, i, path, overrides, output, ranks=1, rank=0, master=0, port=29500):
    env = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
           "MASTER_ADDR": f"h{master}", "MASTER_PORT": str(port)}  # fmt: skip
    command = [sys.executable, "-m", "pretrain", str(path), *overrides]
    return hosts.start(i, command, env, output)


def rows_of(folder):
    return [
        row for row in read_metrics(folder / "runs" / "tiny" / "metrics.jsonl") if "loss" in row
    ]


def wait_for(condition, what, limit=LIMIT_SECONDS):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not in {limit} s: {what}"
        time.sleep(0.1)


def slow_config(folder, sync, **changes):
    """Steps of a tenth of a second or so, for there has to be time to lose a host."""
    return write_config(
        folder, sync=sync, validation={}, timeout="6 s", data__validation_fraction=0.0,
        model={"vocab_size": 61, "hidden_size": 96, "layers": 4, "heads": 3},
        recipe__train="4000 samples", recipe__learning_rate__decay="4000 samples",
        checkpoint={"every": "5 steps", "keep": 2}, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "fault", "lost"), [
    ("allreduce", "kill", 2), ("powersgd", "cut", 1), ("diloco", "kill", 0),
])  # fmt: skip
def test_a_lost_host_is_named_and_the_run_resumes(tmp_path, method, fault, lost):
    path = slow_config(tmp_path, {"method": method}, mesh={"shard_ranks": 1})
    outputs = [tmp_path / f"h{i}.txt" for i in range(3)]
    with Hosts(3) as hosts:
        workers = [worker(hosts, i, path, [], outputs[i], 3, i) for i in range(3)]
        wait_for(lambda: len(rows_of(tmp_path)) >= 7, "seven steps")
        getattr(hosts, fault)(lost)
        began = time.monotonic()
        for i in range(3):
            if i != lost:
                assert workers[i].wait(LIMIT_SECONDS) == 2, outputs[i].read_text()[-3000:]
                text = outputs[i].read_text()
                named = (
                    f"missing: rank {lost} on h{lost}" if lost else "missing: whatever ran at h0"
                )
                assert named in text, text[-3000:]
                assert "cure: start the run again" in text
        assert time.monotonic() - began < 6 + 25
    done = rows_of(tmp_path)[-1]["step"]
    with Hosts(2) as hosts:
        workers = [worker(hosts, i, path, ["start=resume"], outputs[i], 2, i) for i in range(2)]
        wait_for(lambda: rows_of(tmp_path)[-1]["step"] > done + 3, "more steps")
    steps = [row["step"] for row in rows_of(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert "goes on after step" in outputs[0].read_text()


class Elastic:
    """A DiLoCo run of launches on hosts 0 and 1, with its coordinator on host 2."""

    def __init__(self, hosts, folder, **sync):
        self.hosts, self.folder = hosts, folder
        section = {"method": "diloco", "every_steps": 4, "coordinator": "h2:29400",
                   "lost_after": "3 s", **sync}  # fmt: skip
        self.path = slow_config(folder, section)
        self.launches = 0
        self.told = folder / "coordinator.txt"
        hosts.start(
            2, [str(Path(sys.executable).parent / "anthesis"), "coordinator"], {}, self.told
        )

    def start(self, i, *overrides):
        """A launch on a host; its process and where it writes."""
        self.launches += 1
        output = self.folder / f"launch{self.launches}.txt"
        port = 29500 + self.launches
        return worker(self.hosts, i, self.path, overrides, output, master=i, port=port), output

    def steps(self):
        return [row["step"] for row in rows_of(self.folder)]

    def replicas(self):
        """Of the last step; 1 where the row says nothing of others."""
        return rows_of(self.folder)[-1].get("replicas", 1)


SHORT = ("recipe.train=3600 samples", "recipe.learning_rate.decay=3600 samples")


@pytest.mark.parametrize("lost", [1, 0])
def test_replicas_go_on_without_a_lost_host_and_take_it_back(tmp_path, lost):
    """Of the two one is the first, which records and saves: either may be lost."""
    with Hosts(3) as hosts:
        run = Elastic(hosts, tmp_path)
        workers = [run.start(i, *SHORT)[0] for i in range(2)]
        wait_for(lambda: len(run.steps()) > 8 and run.replicas() == 2, "steps of two replicas")
        hosts.kill(lost)
        wait_for(lambda: run.replicas() == 1, "steps of the other alone", 30)
        hosts.boot(lost)
        back, output = run.start(lost, *SHORT)
        wait_for(lambda: run.replicas() == 2, "the host being back")
        for process in (workers[1 - lost], back):
            assert process.wait(2 * LIMIT_SECONDS) == 0, output.read_text()[-3000:]
    steps = run.steps()
    assert steps == list(range(1, len(steps) + 1))
    rows = rows_of(tmp_path)
    assert rows[-1]["samples"] > 3590
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def test_a_replica_that_was_cut_off_comes_back_by_itself(tmp_path):
    with Hosts(3) as hosts:
        run = Elastic(hosts, tmp_path, precision="int8")
        workers = [run.start(i, *SHORT) for i in range(2)]
        wait_for(lambda: len(run.steps()) > 8 and run.replicas() == 2, "steps of two replicas")
        hosts.cut(1)
        wait_for(lambda: run.replicas() == 1, "steps of the other alone", 30)
        hosts.restore(1)
        wait_for(lambda: run.replicas() == 2, "the replica being back")
        for process, output in workers:
            assert process.wait(2 * LIMIT_SECONDS) == 0, output.read_text()[-3000:]
    steps = run.steps()
    assert steps == list(range(1, len(steps) + 1))
