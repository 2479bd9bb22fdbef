"""`launch.node`, below which commands of a launch run, here and on hosts: it passes on how they
end, asks ranks to stop, and leaves nothing behind, whatever ends first."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pretrain.config_file import load
from pretrain.stopping import STOPPED
from tests.test_stopping import long_config, saved_step, steps_of

ANTHESIS = str(Path(sys.executable).parent / "anthesis")
# Processes of all kinds: a child, one in a session of its own, one whose parent is gone.
FAMILY = """
sleep 300 & echo $! >> pids
setsid sh -c 'echo $$ >> pids; exec sleep 300' &
sh -c 'setsid sh -c "echo \\$\\$ >> pids; exec sleep 300" &'
(sh -c 'echo $$ >> pids; exec sleep 300' &)
while [ $(wc -l < pids) -lt 4 ]; do sleep 0.05; done
echo $$ >> pids
"""
# Says which signals it gets; as `python -m NAME`.
SAYS = """
import os, signal, sys, time
name = sys.argv[1]
def say(number, _):
    with open(f"{name}.got", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if name != "bystander" or number == signal.SIGTERM:
        os._exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, say)
open(f"{name}.ready", "w").close()
time.sleep(300)
"""


@pytest.fixture
def node(tmp_path):
    """Start a command below `launch.node`, in a folder of its own."""
    started = []

    def start(*command):
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.node", *command], cwd=tmp_path, text=True,
            stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def pids_of(folder, count):
    file = folder / "pids"
    wait_for(lambda: file.exists() and len(file.read_text().split()) == count)
    return [int(pid) for pid in file.read_text().split()]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", f"exit {STOPPED}"], STOPPED),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["no-such-program"], 127),
        ([], 2),
    ],
    ids=str,
)
def test_exit_codes(node, command, code):
    assert node(*command).wait(30) == code


def test_the_end_of_its_input_ends_everything(node, tmp_path):
    """The launch is gone, or the network to it."""
    process = node("sh", "-c", FAMILY + "wait; sleep 300")
    pids = pids_of(tmp_path, 5)
    assert all(map(runs, pids))
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    wait_for(lambda: not any(map(runs, pids)), 5)


def test_sigterm_ends_everything(node, tmp_path):
    process = node("sh", "-c", FAMILY + "wait; sleep 300")
    pids = pids_of(tmp_path, 5)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM  # no success: others would wait for this host
    wait_for(lambda: not any(map(runs, pids)), 5)


def test_nothing_outlives_the_command(node, tmp_path):
    process = node("sh", "-c", FAMILY + "exit 3")
    assert process.wait(20) == 3
    wait_for(lambda: not any(map(runs, pids_of(tmp_path, 5))), 5)


def test_stop_reaches_ranks_only(node, tmp_path):
    """Not launchers, which would end at once, nor what only has `pretrain` among its words."""
    for name in ("pretrain", "other"):
        (tmp_path / f"{name}.py").write_text(SAYS)
    process = node(
        "sh", "-c", f"{sys.executable} -m pretrain rank & {sys.executable} -m other bystander "
        "-m pretrain & wait %1; exit $?",
    )  # fmt: skip
    for name in ("rank", "bystander"):
        wait_for((tmp_path / f"{name}.ready").exists)
    process.stdin.write("what?\nstop\n")
    process.stdin.flush()
    assert process.wait(20) == STOPPED
    assert (tmp_path / "rank.got").read_text() == "SIGUSR1\n"
    assert not (tmp_path / "bystander.got").exists()


def test_stop_before_there_are_ranks(node, tmp_path):
    (tmp_path / "other.py").write_text(SAYS)
    process = node(sys.executable, "-m", "other", "launcher")
    wait_for((tmp_path / "launcher.ready").exists)
    process.stdin.write("stop\n")
    process.stdin.flush()
    assert process.wait(20) == STOPPED
    assert (tmp_path / "launcher.got").read_text() == "SIGTERM\n"


@pytest.mark.parametrize("code", [0, 3])
def test_what_comes_after_comes_however_it_ends(node, tmp_path, code):
    process = node("--after", "touch", "removed", "--", "sh", "-c", f"exit {code}")
    assert process.wait(20) == code
    assert (tmp_path / "removed").exists()
    (tmp_path / "removed").unlink()
    process = node("--after", "touch", "removed", "--", "sleep", "300")
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert (tmp_path / "removed").exists()


@pytest.fixture(params=[0, 3], ids=["once", "with restarts"])
def launched(tmp_path, request):
    """A launch of two ranks that trains, its config, and all its processes."""
    path = long_config(tmp_path)
    restarts = [f"--restarts={request.param}"] if request.param else []
    process = subprocess.Popen(
        [ANTHESIS, "launch", "local", str(path), "--ranks-per-node=2", *restarts], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    everyone = []
    try:
        wait_for(lambda: process.poll() is not None or len(steps_of(path, "tiny")) > 4, 90)
        assert process.poll() is None, process.stdout.read()
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(everyone) >= 4  # node, torchrun, two ranks
        yield process, path, [one.pid for one in everyone]
    finally:
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()


def test_a_launch_makes_way(launched):
    process, path, everyone = launched
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED, output
    step = saved_step(path, "tiny")
    assert 4 < step < 138
    assert f"stopped after step {step}" in output
    wait_for(lambda: not any(map(runs, everyone)), 5)


def test_a_launch_that_is_killed_leaves_no_worker(launched):
    process, path, everyone = launched
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(runs, everyone)), 15)
    assert len(steps_of(path, "tiny")) < 138
    assert (load(path).run_directory / "checkpoints").exists()
