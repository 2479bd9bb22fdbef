"""Hosts on one box, for tests and benchmarks of runs that span several.

A host is a set of Linux namespaces with a network card on a switch of its own: it has a name, an
address, processes, /dev/shm and a loopback that no other host sees. It can lose its cable or its
power, and its link can be slow or long. The file system is shared, as on a cluster.

Namespaces here have no names: they live as long as a process that reads a pipe from this one, so
nothing is left behind even by a `kill -9` of whoever made the hosts.
"""

import ctypes
import errno
import fcntl
import functools
import gc
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "env")
_PATIENCE_SECONDS = 20

# Its own pid is read before /proc is its own, so it is the one the outside knows. The trailing
# `exit` keeps the shell from becoming `cat`: only a shell that waits reaps orphans. Another default
# than Reno may send again what was merely late (BBR does), and bytes would not be exact.
_INIT = """
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
echo "$1" > /proc/sys/kernel/hostname
echo "$2" > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
rm /dev/shm/hosts
ipv6=/proc/sys/net/ipv6/conf/default/disable_ipv6
[ ! -e $ipv6 ] || echo 1 > $ipv6
echo reno > /proc/sys/net/ipv4/tcp_congestion_control
ip link set lo up
echo "$pid"
cat > /dev/null
exit
"""
_SWITCH = """
ipv6=/proc/sys/net/ipv6/conf/default/disable_ipv6
[ ! -e $ipv6 ] || echo 1 > $ipv6
ip link add br0 type bridge
ip address add 10.77.0.1/24 dev br0
ip link set br0 up
echo $$
exec cat > /dev/null
"""
_TRIAL = """
mount -t proc proc /proc
ip link add br0 type bridge
ip link add here type veth peer name there
tc qdisc add dev here root tbf rate 1mbit burst 128kb latency 100ms
"""
_OWN_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child")

# <linux/if_tun.h>
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_LARGEST_FRAME = 70_000  # 64 KiB and headers


@functools.cache
def reason_missing() -> str | None:
    """Why hosts cannot be had on this machine, or None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are Linux namespaces and need root"
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"hosts need {', '.join(missing)} (packages iproute2, util-linux)"
    if not Path("/dev/net/tun").exists():
        return "hosts need /dev/net/tun"
    trial = ["unshare", *_OWN_NAMESPACES, "sh", "-ec", _TRIAL]
    done = subprocess.run(trial, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    if done.returncode:
        return f"this kernel or container allows no hosts: {done.stderr.strip()}"
    return None


@dataclass
class _Host:
    rate: str | None = None
    delay: float = 0.0
    init: subprocess.Popen | None = None
    pid: int = 0
    relay: subprocess.Popen | None = None
    processes: list[subprocess.Popen] = field(default_factory=list)


class Hosts:
    """`count` hosts h0, h1, ... from `with` on; at its end nothing is left of them."""

    def __init__(self, count: int):
        self._hosts = [_Host() for _ in range(count)]
        self._switch: subprocess.Popen | None = None
        self._switch_pid = 0

    def __enter__(self) -> "Hosts":
        try:
            self._switch, self._switch_pid = _start_namespace(
                ["unshare", "--net", "sh", "-ec", _SWITCH]
            )
            for i in range(len(self._hosts)):
                self.boot(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """All hosts and their switch gone, whatever state they are in."""
        for i, host in enumerate(self._hosts):
            if host.init:
                with suppress(RuntimeError):  # a link may be gone already
                    self.cut(i)
                self._stop(host)
        if self._switch:
            self._switch.kill()
            _wait(self._switch)
            self._switch = None

    # --- power ------------------------------------------------------------------------------------

    def boot(self, i: int) -> None:
        """Host `i` up and reachable, with the address and the link that it had before."""
        host = self._hosts[i]
        if host.init:
            raise RuntimeError(f"h{i} is up already")
        lines = [f"{self.address(k)} h{k}" for k in range(len(self._hosts))]
        names = "\n".join(["127.0.0.1 localhost", *lines])
        host.init, host.pid = _start_namespace(
            ["unshare", *_OWN_NAMESPACES, "sh", "-ec", _INIT, "init", f"h{i}", names]
        )
        self._plug(i)

    def kill(self, i: int) -> None:
        """A power cut: all processes of host `i` die and no farewell of theirs leaves it."""
        self.cut(i)
        self._stop(self._hosts[i])
        with suppress(RuntimeError):  # the kernel may have been faster
            _run_in_network(self._switch_pid, "ip", "link", "delete", f"h{i}")

    def start(
        self, i: int, command: list[str], env: dict[str, str], stdout: Path
    ) -> subprocess.Popen:
        """`command` on host `i`, in this process's folder, with no variables but `env` and ours.

        What comes back is the process itself: signals reach it and its exit code is its own.
        """
        host = self._up(i)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "HOME": os.environ.get("HOME", "/"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            **env,
        }
        enter = ["nsenter", f"--target={host.pid}", "--net", "--uts", "--ipc", "--mount"]
        # nsenter would stand between us and a process in a namespace of pids that it enters.
        with stdout.open("wb") as output, _inside(host.pid, "pid"):
            process = subprocess.Popen(
                [*enter, "env", f"--chdir={os.getcwd()}", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        host.processes.append(process)
        return process

    # --- network ----------------------------------------------------------------------------------

    def address(self, i: int) -> str:
        """The address of host `i`, known to all hosts as `h{i}`, and to none but them."""
        return f"10.77.0.{10 + i}"

    def sent_bytes(self, i: int) -> int:
        """What host `i` has sent since its link was made (by booting it or by `delay`)."""
        return self._counter(i, "tx_bytes")

    def received_bytes(self, i: int) -> int:
        """What host `i` has received since its link was made (by booting it or by `delay`)."""
        return self._counter(i, "rx_bytes")

    def shape(self, i: int, rate: str | None) -> None:
        """Limit what host `i` sends and what it receives to `rate` each, as in "100mbit"."""
        host = self._up(i)
        for pid, device in ((host.pid, "eth0"), (self._switch_pid, f"h{i}")):
            tc = ("tc", "qdisc", "replace" if rate else "delete", "dev", device, "root")
            limit = ("tbf", "rate", rate, "burst", "128kb", "latency", "200ms") if rate else ()
            if rate or host.rate:
                _run_in_network(pid, *tc, *limit)
        host.rate = rate

    def delay(self, i: int, one_way_seconds: float) -> None:
        """Hold back each frame to and from host `i`; a new link, so before its processes start."""
        host = self._up(i)
        self._unplug(i)
        host.delay = one_way_seconds
        self._plug(i)

    def cut(self, i: int) -> None:
        """Pull the cable of host `i` at the switch: what is sent to it or by it vanishes."""
        self._up(i)
        _run_in_network(self._switch_pid, "ip", "link", "set", f"h{i}", "down")

    def restore(self, i: int) -> None:
        """Put the cable back and wait until the link is up."""
        self._up(i)
        _run_in_network(self._switch_pid, "ip", "link", "set", f"h{i}", "up")
        self._await_link(i)

    # --- inside -----------------------------------------------------------------------------------

    def _up(self, i: int) -> _Host:
        host = self._hosts[i]
        if not host.init:
            raise RuntimeError(f"h{i} is not up")
        return host

    def _counter(self, i: int, name: str) -> int:
        device = Path(f"/proc/{self._up(i).pid}/root/sys/class/net/eth0")
        return int((device / "statistics" / name).read_text())

    def _stop(self, host: _Host) -> None:
        if host.init.poll() is None:
            os.kill(host.pid, 9)
        if host.relay:
            host.relay.kill()
            _wait(host.relay)
        # First these: an init is gone only once no process of its namespace is a zombie.
        for process in [*host.processes, host.init]:
            _wait(process)
        host.init, host.relay, host.processes = None, None, []

    def _plug(self, i: int) -> None:
        host = self._hosts[i]
        mac = f"02:00:0a:4d:00:{10 + i:02x}"  # one for good, or peers would ask the old one
        if host.delay:
            ends = [_open_tap(host.pid, "eth0"), _open_tap(self._switch_pid, f"h{i}")]
            arguments = [str(argument) for argument in (*ends, host.delay)]
            host.relay = subprocess.Popen(
                [sys.executable, "-m", "tests.hosts", *arguments],
                stdin=subprocess.PIPE,
                cwd=ROOT,
                pass_fds=ends,
                start_new_session=True,
            )
            for end in ends:
                os.close(end)
        else:
            peer = ("peer", "name", "eth0", "netns", str(host.pid))
            _run_in_network(self._switch_pid, "ip", "link", "add", f"h{i}", "type", "veth", *peer)
        ours = ("ip", "address", "add", f"{self.address(i)}/24", "dev", "eth0")
        _run_in_network(host.pid, *ours)
        _run_in_network(host.pid, "ip", "link", "set", "eth0", "address", mac, "up")
        _run_in_network(self._switch_pid, "ip", "link", "set", f"h{i}", "master", "br0", "up")
        if host.rate:
            self.shape(i, host.rate)
        self._await_link(i)

    def _unplug(self, i: int) -> None:
        host = self._hosts[i]
        if host.relay:
            host.relay.kill()
            _wait(host.relay)
            host.relay = None
        else:
            _run_in_network(self._switch_pid, "ip", "link", "delete", f"h{i}")

    def _await_link(self, i: int) -> None:
        """Until a port that nobody listens on refuses the switch: then frames go both ways."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with _inside(self._switch_pid, "net"), socket.socket() as probe:
                probe.settimeout(0.2 + 6 * self._hosts[i].delay)
                if probe.connect_ex((self.address(i), 9)) in (0, errno.ECONNREFUSED):
                    return
        raise RuntimeError(f"the link of h{i} does not come up")


def _start_namespace(command: list[str]) -> tuple[subprocess.Popen, int]:
    """A process that holds namespaces until its stdin ends, and the pid that it tells."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # or Ctrl-C would end hosts before those who use them
        text=True,
    )
    line = process.stdout.readline()
    if not line.strip().isdigit():
        process.kill()
        raise RuntimeError(f"no namespace: {line}{process.communicate()[0]}")
    return process, int(line)


def _wait(process: subprocess.Popen) -> None:
    process.wait(_PATIENCE_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _run_in_network(pid: int, *command: str) -> None:
    whole = ["nsenter", f"--net=/proc/{pid}/ns/net", *command]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def _inside(pid: int, kind: str) -> Iterator[None]:
    """This thread in the network of process `pid`, or its children among the pids there."""
    own = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY)
    other = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
    try:
        _set_namespace(other)
        try:
            yield
        finally:
            _set_namespace(own)
    finally:
        os.close(own)
        os.close(other)


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), "setns")


# --- latency, since few kernels have netem -----------------------------------------------------


def _open_tap(pid: int, name: str) -> int:
    """A new card in the network of process `pid`: frames it sends are read from what comes back.

    The kernel leaves segments as large as TCP hands them over, so one read takes up to 64 KiB.
    """
    with _inside(pid, "net"):
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return descriptor


def _relay(one: int, other: int, delay: float) -> None:
    """Frames from each card to the other one after `delay` seconds, until stdin ends."""
    gc.disable()
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)  # on time even when all cores compute
    routes = ((one, other, deque()), (other, one, deque()))
    while True:
        due = min((waiting[0][0] for _, _, waiting in routes if waiting), default=None)
        pause = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([one, other, sys.stdin], [], [], pause)
        if sys.stdin in ready:
            return
        for source, target, waiting in routes:
            if source in ready:
                with suppress(BlockingIOError):
                    for _ in range(16):
                        frame = os.read(source, _LARGEST_FRAME)
                        waiting.append((time.monotonic() + delay, frame))
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                with suppress(OSError):  # the cable is out
                    os.write(target, waiting.popleft()[1])


if __name__ == "__main__":
    _relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
