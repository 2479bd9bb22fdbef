"""The hosts that other tests run on: they fail as real ones do, and count what they send."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.hosts import ROOT, Hosts, reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

PORT = 5001
MEGABYTE = 10**6
SERVER = f"""
import socket
server = socket.create_server(("", {PORT}))
while True:
    peer, _ = server.accept()
    while peer.recv(2**20):
        pass
    peer.close()
"""
CLIENT = f"""
import socket, sys, time

def connect():
    for _ in range(200):
        start = time.perf_counter()
        try:
            return socket.create_connection((sys.argv[1], {PORT})), time.perf_counter() - start
        except ConnectionRefusedError:
            time.sleep(0.05)

round_trip = min(connect()[1] for _ in range(5))
server, _ = connect()
start = time.perf_counter()
server.sendall(bytes(int(sys.argv[2])))
server.shutdown(socket.SHUT_WR)
assert not server.recv(1)
print(round_trip, time.perf_counter() - start)
"""
TICKS = f"""
import socket, sys, time
server = socket.create_connection((sys.argv[1], {PORT}))
while True:
    server.sendall(bytes(1000))
    time.sleep(0.02)
"""
ALL_REDUCE = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
numbers = torch.full((2_000_000,), 1.0 + dist.get_rank())
dist.all_reduce(numbers)
assert numbers.eq(3).all()
print("reduced")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def hosts():
    with Hosts(2) as two:
        yield two


@pytest.fixture
def server(hosts, tmp_path):
    """A process on h1 that swallows what it is sent."""
    process = hosts.start(1, [sys.executable, "-c", SERVER], {}, tmp_path / "server")
    yield process
    process.kill()
    process.wait()


def test_counters_tell_what_was_sent(hosts, server, tmp_path):
    sent, received = hosts.sent_bytes(0), hosts.received_bytes(1)
    back = hosts.sent_bytes(1)
    _transfer(hosts, 50 * MEGABYTE, tmp_path)
    assert 1 <= (hosts.sent_bytes(0) - sent) / (50 * MEGABYTE) < 1.03
    assert 1 <= (hosts.received_bytes(1) - received) / (50 * MEGABYTE) < 1.03
    assert hosts.sent_bytes(1) - back < MEGABYTE


def test_shaped_link_is_as_slow_as_asked(hosts, server, tmp_path):
    hosts.shape(0, "100mbit")
    _, seconds = _transfer(hosts, 8 * MEGABYTE, tmp_path)
    hosts.shape(0, None)
    assert 60 < 8 * 8 / seconds < 105, seconds
    _, unlimited = _transfer(hosts, 8 * MEGABYTE, tmp_path)
    assert unlimited < seconds / 2


def test_delayed_link_has_the_round_trip_and_keeps_its_rate(hosts, server, tmp_path):
    direct, _ = _transfer(hosts, 1, tmp_path)
    assert direct < 0.01
    hosts.shape(0, "100mbit")
    hosts.delay(0, 0.02)
    before = hosts.sent_bytes(0)
    round_trip, seconds = _transfer(hosts, 8 * MEGABYTE, tmp_path)
    sent = hosts.sent_bytes(0) - before
    hosts.shape(0, None)
    hosts.delay(0, 0)
    assert 0.04 <= round_trip < 0.06
    assert 40 < 8 * 8 / seconds < 105, seconds
    assert 1 <= sent / (8 * MEGABYTE) < 1.05
    assert _transfer(hosts, 1, tmp_path)[0] < 0.01


def test_cut_stalls_a_connection_and_restore_resumes_it(hosts, server, tmp_path):
    _transfer(hosts, 1, tmp_path)
    ticks = _start_python(hosts, TICKS, tmp_path / "ticks", hosts.address(1))
    _await_bytes(hosts, 10_000)
    hosts.cut(1)
    before = hosts.received_bytes(1)
    time.sleep(0.6)
    assert hosts.received_bytes(1) == before
    assert ticks.poll() is None
    hosts.restore(1)
    _await_bytes(hosts, 10_000)
    ticks.kill()
    assert ticks.wait() == -signal.SIGKILL


def test_power_cut_leaves_nothing_and_says_nothing(hosts, server, tmp_path):
    _transfer(hosts, 1, tmp_path)
    ticks = _start_python(hosts, TICKS, tmp_path / "ticks", hosts.address(1))
    orphans = hosts.start(1, ["sh", "-c", "sleep 60 & sleep 60 & exit 3"], {}, tmp_path / "sh")
    assert orphans.wait() == 3
    _await_bytes(hosts, 10_000)
    namespace = os.readlink(f"/proc/{server.pid}/ns/pid")

    def is_on_host(process: Path) -> bool:
        return os.readlink(process / "ns/pid") == namespace

    assert len(_processes(is_on_host)) >= 4
    heard = hosts.received_bytes(0)
    hosts.kill(1)
    assert server.poll() == -signal.SIGKILL
    assert not _processes(is_on_host)
    with pytest.raises(RuntimeError, match="h1 is not up"):
        hosts.start(1, ["true"], {}, tmp_path / "true")
    time.sleep(0.4)
    assert ticks.poll() is None  # neither FIN nor RST reached it
    assert hosts.received_bytes(0) - heard < 2000
    ticks.kill()
    hosts.boot(1)
    name = hosts.start(1, ["sh", "-c", "cat /proc/sys/kernel/hostname"], {}, tmp_path / "name")
    assert name.wait() == 0
    assert (tmp_path / "name").read_text() == "h1\n"
    again = hosts.start(1, [sys.executable, "-c", SERVER], {}, tmp_path / "server")
    assert _transfer(hosts, MEGABYTE, tmp_path)
    again.kill()


def test_started_process_is_the_process_itself(hosts, tmp_path):
    script = "trap 'echo told; exit 7' TERM; echo $HERE $PWD; sleep 0.1; while :; do :; done"
    process = hosts.start(0, ["sh", "-c", script], {"HERE": "there"}, tmp_path / "out")
    while not (tmp_path / "out").read_text():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(10) == 7
    assert (tmp_path / "out").read_text() == f"there {os.getcwd()}\ntold\n"


def test_hosts_share_neither_memory_nor_loopback(hosts, server, tmp_path):
    _transfer(hosts, 1, tmp_path)
    memory = hosts.start(0, ["sh", "-c", "echo > /dev/shm/mine; ls /dev/shm"], {}, tmp_path / "0")
    assert memory.wait() == 0
    other = hosts.start(1, ["sh", "-c", "ls /dev/shm; cat /etc/hosts"], {}, tmp_path / "1")
    assert other.wait() == 0
    assert (tmp_path / "0").read_text() == "mine\n"
    assert (tmp_path / "1").read_text() == "127.0.0.1 localhost\n10.77.0.10 h0\n10.77.0.11 h1\n"
    assert not Path("/dev/shm/mine").exists()
    ticks = _start_python(hosts, TICKS, tmp_path / "ticks", "127.0.0.1")
    assert ticks.wait(20) == 1
    assert "ConnectionRefusedError" in (tmp_path / "ticks").read_text()


def test_two_ranks_reduce_over_the_link(hosts, tmp_path):
    before = hosts.sent_bytes(0), hosts.sent_bytes(1)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
    ranks = [
        hosts.start(
            rank,
            [sys.executable, "-c", ALL_REDUCE],
            {**variables, "RANK": str(rank)},
            tmp_path / f"rank{rank}",
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        assert process.wait(60) == 0, (tmp_path / f"rank{rank}").read_text()
        # 2 (n - 1) / n times what is reduced: once, between two ranks
        assert 1 <= (hosts.sent_bytes(rank) - before[rank]) / (2_000_000 * 4) < 1.03


@pytest.mark.parametrize("end", ["raise KeyError('test')", "os.kill(os.getpid(), 9)"])
def test_nothing_is_left(end, tmp_path):
    """Whether the one who made the hosts fails or is killed."""
    script = (
        "import os; from pathlib import Path; from tests.hosts import Hosts\n"
        "with Hosts(1) as hosts:\n"
        "    hosts.delay(0, 0.001)\n"
        "    made_by = {'MADE_BY': os.environ['MADE_BY']}\n"
        "    hosts.start(0, ['sleep', '60'], made_by, Path(os.devnull))\n"
        "    print('up', flush=True)\n"
        f"    {end}\n"
    )
    mark = f"MADE_BY={tmp_path}"
    maker = subprocess.run(
        ["env", mark, sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert maker.stdout == "up\n", maker.stderr
    deadline = time.monotonic() + 10
    while _processes(lambda process: mark.encode() in (process / "environ").read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _transfer(hosts: Hosts, size: int, folder: Path) -> tuple[float, float]:
    """Send `size` bytes from h0 to h1: the seconds of a round trip, and of all."""
    client = _start_python(hosts, CLIENT, folder / "client", hosts.address(1), str(size))
    assert client.wait(60) == 0, (folder / "client").read_text()
    round_trip, seconds = (folder / "client").read_text().split()
    return float(round_trip), float(seconds)


def _start_python(hosts: Hosts, script: str, output: Path, *arguments: str) -> subprocess.Popen:
    return hosts.start(0, [sys.executable, "-c", script, *arguments], {}, output)


def _await_bytes(hosts: Hosts, more: int) -> None:
    """Until h1 has received `more` bytes."""
    wanted, deadline = hosts.received_bytes(1) + more, time.monotonic() + 20
    while hosts.received_bytes(1) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _processes(condition: Callable[[Path], bool]) -> list[str]:
    """The processes whose folder in /proc fulfills a condition."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or a zombie
            if condition(process):
                found.append(process.name)
    return found
