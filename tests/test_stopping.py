"""Making way: a signal to any rank ends the run with code 75 and a checkpoint, and the run started
again is bitwise the one that was never interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import newest_checkpoint, read_state
from pretrain.config_file import load
from pretrain.observe.metrics import read_metrics
from pretrain.stopping import STOPPED
from tests.ranks import run_ranks, run_worker
from tests.test_placement import ended, free_port, start_rank
from tests.test_resume import curve, train_ranks
from tests.tiny import write_config

DILOCO = ["mesh.shard_ranks=1", 'sync={method="diloco", every_steps=4}']
WAITS = """
import time
from pretrain import stopping
stopping._AGAIN_SECONDS = {15: 1.0}
with stopping.listening():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if stopping.asked_by():
            print(stopping.asked_by(), flush=True)
"""


def long_config(folder):
    """A run of 138 steps that saves seldom by itself."""
    return write_config(folder, recipe__train="1200 samples", validation={},
                        checkpoint__every="100 steps")  # fmt: skip


def steps_of(path, name):
    """The steps that a run has recorded."""
    file = load(path, [f"name={name}"]).run_directory / "metrics.jsonl"
    return [row["step"] for row in read_metrics(file) if "loss" in row] if file.exists() else []


def wait_until(condition, *processes):
    deadline = time.monotonic() + 90
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def listens(process):
    """Whether a process remembers SIGUSR1 rather than dies of it."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def saved_step(path, name):
    """Where a run has been saved, which is where it was recorded last."""
    run = load(path, [f"name={name}"]).run_directory
    step = read_state(newest_checkpoint(run))["clock"]["step"]
    assert steps_of(path, name) == list(range(1, step + 1))
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Config and losses of a run by one process that was never interrupted."""
    path = long_config(tmp_path_factory.mktemp("whole"))
    code, output = run_worker([str(path), "name=whole"])
    assert code == 0, output
    return path, curve(path, ["name=whole"])


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name
)
def test_one_process(whole, number):
    path, losses = whole
    name = f"name={number.name}"
    process = start_rank(path, 0, 1, free_port(), name)
    wait_until(lambda: len(steps_of(path, number.name)) > 7, process)
    process.send_signal(number)
    code, output = ended(process)
    assert code == STOPPED == 75, output
    step = saved_step(path, number.name)
    assert step % 100
    assert f"stopped after step {step} by {number.name}; saved" in output
    code, output = run_worker([str(path), name])
    assert code == 0, output
    assert f"goes on after step {step}" in output
    assert curve(path, [name]) == losses


def test_during_start_up(whole):
    """A job's warning may come while torch is imported: one step is taken, and kept."""
    path, losses = whole
    process = start_rank(path, 0, 1, free_port(), "name=early")
    wait_until(lambda: listens(process), process)
    process.send_signal(signal.SIGUSR1)
    code, output = ended(process)
    assert code == STOPPED, output
    assert saved_step(path, "early") == 1
    assert run_worker([str(path), "name=early"])[0] == 0
    assert curve(path, ["name=early"]) == losses


@pytest.mark.parametrize("overrides", [[], DILOCO], ids=["together", "diloco"])
def test_a_signal_to_one_rank_of_two(tmp_path, overrides):
    """Both end after the same step; replicas that step by themselves after one at which they
    meet."""
    path, port = long_config(tmp_path), free_port()
    run_ranks(2, train_ranks, path, ["name=whole", *overrides])
    pieces = ["name=pieces", *overrides]
    ranks = [start_rank(path, rank, 2, port, *pieces) for rank in (0, 1)]
    wait_until(lambda: len(steps_of(path, "pieces")) > 4, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    for code, output in map(ended, ranks):
        assert code == STOPPED, output
    step = saved_step(path, "pieces")
    assert 4 < step < 138
    assert not overrides or step % 4 == 0
    run_ranks(2, train_ranks, path, pieces)
    assert len(curve(path, pieces)) == 138
    assert curve(path, pieces) == curve(path, ["name=whole", *overrides])


def test_a_second_sigterm_ends_what_is_stuck():
    """But not one that comes at once: launcher and scheduler may both pass on the same one."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        process.terminate()
        time.sleep(0.3)
        process.terminate()
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(0.7)
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()


def test_signals_after_the_end_are_no_failure():
    """Python takes a while to shut down, and Slurm signals ranks whose others have ended."""
    code = WAITS.split("with ")[0] + (
        "import signal\nwith stopping.listening():\n    pass\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1):\n    signal.raise_signal(number)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
