"""How a replica that is a launch of its own reaches the coordinator and the other replicas."""

import contextlib
import ipaddress
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from pretrain.sync.roster import Epoch

_CONNECT_SECONDS = 3.0
_SILENCE_SECONDS = 5.0  # who waits gets a line each second
_PAUSE_SECONDS = 0.2
_GLOO_CONNECT_TIMEOUTS = 5  # that gloo waits for a peer to connect
_CPU = torch.device("cpu")


class Link:
    """A connection to the coordinator, made again whenever it breaks.

    `hello` is what to say to a coordinator that does not know us; None says nothing.
    """

    def __init__(self, address: str, hello: Callable[[], dict[str, Any]] | None = None) -> None:
        self._address, self._hello = address, hello
        self._lines: BinaryIO | None = None
        self._socket: socket.socket | None = None

    def ask(self, request: dict[str, Any], patience_seconds: float) -> Iterator[str | dict]:
        """Yield whom the coordinator waits for, at least every few seconds, and last its answer.

        That is a dict with the one key "refused", a text for the user, also where the coordinator
        cannot be reached for `patience_seconds`.
        """
        lost: float | None = None
        while True:
            try:
                answer = self._tell(request)
                while "wait" in answer:
                    lost = None
                    yield answer["wait"]
                    answer = self._read()
                if "unknown" in answer and self._hello:
                    answer = self._tell(self._hello())
                    if "refused" not in answer:
                        continue
                if "refused" in answer:
                    answer = {"refused": f"{self._address}: {answer['refused']}"}
                yield answer
                return
            except (OSError, ValueError) as error:
                self.close()
                if lost is None:  # it may only have closed a connection that was idle for long
                    lost = time.monotonic()
                    continue
                if time.monotonic() - lost > patience_seconds:
                    yield {"refused": _unreachable(self._address, patience_seconds, error)}
                    return
                yield f"the coordinator ({error})"
                time.sleep(_PAUSE_SECONDS)

    def tell(self, request: dict[str, Any]) -> bool:
        """One request whose answer does not matter; whether there was one."""
        try:
            self._tell(request)
        except (OSError, ValueError):
            self.close()
            return False
        return True

    def close(self) -> None:
        """End the connection; the next request makes a new one."""
        if self._socket:
            self._lines.close()  # type: ignore[union-attr]
            self._socket.close()
        self._socket = self._lines = None

    def _tell(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            host, port = self._address.rsplit(":", 1)
            self._socket = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
            self._socket.settimeout(_SILENCE_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines = self._socket.makefile("rb")
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()  # type: ignore[union-attr]
        if not line.endswith(b"\n"):
            raise ConnectionError("it hung up")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("it is no coordinator")
        return answer


def _unreachable(address: str, patience_seconds: float, error: Exception) -> str:
    return (
        f"{address}: no coordinator answers, tried for {patience_seconds:.0f} s: {error}\n"
        "  rule: replicas that are launches of their own meet at a coordinator\n"
        "  cure: start `anthesis coordinator` there, open that port for this host, or mend "
        "sync.coordinator"
    )


class Heart:
    """Says hello every `period_seconds`, whatever else this process does."""

    def __init__(
        self, address: str, hello: Callable[[], dict[str, Any]], period_seconds: float
    ) -> None:
        self._address, self._hello, self._period = address, hello, period_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say hello no more."""
        self._stopped.set()
        self._thread.join(1.0)

    def _beat(self) -> None:
        link = Link(self._address)
        while not self._stopped.is_set():
            told = link.tell(self._hello())
            self._stopped.wait(self._period if told else _PAUSE_SECONDS)
        link.close()


class Board(dist.Store):
    """Where those who want to connect find each other's addresses: at the coordinator.

    Raises RuntimeError where the round of `epoch` is over or an address does not come within
    `seconds`.
    """

    def __init__(self, address: str, epoch: Epoch, prefix: str, seconds: float) -> None:
        super().__init__()
        self._link, self._epoch, self._prefix = Link(address), epoch, prefix
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def set(self, key: str, value: bytes) -> None:
        """For gloo: leave a value."""
        self._ask("put", key, value=value.hex())

    def get(self, key: str) -> bytes:
        """For gloo: wait for the value that another one leaves."""
        return bytes.fromhex(self._ask("take", key)["value"])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """For gloo: wait for several."""
        for key in keys:
            self.get(key)

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    def _ask(self, what: str, key: str, **more: str) -> dict[str, Any]:
        request = {"do": what, "epoch": self._epoch, "key": self._prefix + key, **more}
        for answer in self._link.ask(request, self._seconds):
            if isinstance(answer, dict):
                if "over" in answer or "refused" in answer:
                    break
                return answer
            if time.monotonic() > self._deadline:
                break
        raise RuntimeError(f"not all of a round connect: {answer}")


class Line:
    """A process group of gloo between ranks of different launches: `group`.

    Collectives raise RuntimeError where a peer is silent for `seconds`, or dead. Making it raises
    RuntimeError as well where not all `size` connect.
    """

    def __init__(
        self, name: str, board: Board, rank: int, size: int, own_address: str, seconds: float
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=seconds / _GLOO_CONNECT_TIMEOUTS)
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        place = {"interface": interface} if interface else {"hostname": own_address}
        options._devices = [dist.ProcessGroupGloo.create_device(**place)]
        before = _sockets()
        backend = dist.ProcessGroupGloo(board, rank, size, options)
        self._sockets = _sockets() - before
        backend.set_timeout(timedelta(seconds=seconds))
        kind = dist.ProcessGroup.BackendType.GLOO
        self.group = dist.ProcessGroup(board, rank, size)
        self.group._set_default_backend(kind)
        self.group._register_backend(_CPU, kind, backend)
        self.group._set_group_name(name)
        # torch knows groups by their default group's ranks; without an entry, what it raises is
        # not what went wrong but that it does not know the group.
        dist.distributed_c10d._register_pg_in_world(
            self.group, "gloo", board, name, "cpu:gloo", {dist.get_rank(): rank}
        )

    def close(self) -> None:
        """Break the connections, so that whatever still goes on in the group, here and at its
        other ends, fails now: gloo itself has no such thing."""
        for descriptor, inode in self._sockets:
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    with socket.socket(fileno=os.dup(descriptor)) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ValueError):  # gone with the default group
            dist.destroy_process_group(self.group)


def own_address(peers: list[str], coordinator: str) -> str:
    """The address of this host on the way to its peers, given their own as the coordinator sees
    them. One that runs on the coordinator's host looks like 127.0.0.1 from there."""
    targets = [peer for peer in peers if not ipaddress.ip_address(peer).is_loopback]
    for target in [*targets, coordinator.rsplit(":", 1)[0]]:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        ):
            probe.connect((target, 9))  # nothing is sent
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _sockets() -> set[tuple[int, int]]:
    """Descriptors and inodes of this process's open sockets; empty where there is no /proc."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(name), status.st_ino))
    return found
