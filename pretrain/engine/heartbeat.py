"""Who is missing when ranks wait for each other in vain.

Each rank writes a count to the store by which the ranks met, once a second. Nobody reads it until a
collective has failed; then those whose count stands still are the missing ones.
"""

import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from pretrain.engine.meeting import attempt
from pretrain.errors import UserError

_BEAT_SECONDS = 1.0
_LISTEN_SECONDS = 4.0  # for which a count must stand still
_STORE_SECONDS = 5.0
_FOUND = "missing"


class LostRankError(UserError):
    """A rank is gone, or cannot be reached."""


class Heartbeat:
    """The beats of this rank, and those of the others where they are asked for."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = self._connect()
        self._stop = threading.Event()
        self._beat(0)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """No more beats."""
        self._stop.set()

    def missing(self) -> str:
        """The ranks that do not beat, with their hosts, as text; empty if all do."""
        try:
            # A new connection, for only that fails in time where the other end is cut off.
            store = self._connect()
            if store.check([_FOUND]):  # by a rank that may have ended since
                return store.get(_FOUND).decode()
            keys = [_key(rank) for rank in range(self._size)]
            before = store.multi_get(keys)
            time.sleep(_LISTEN_SECONDS)
            after = store.multi_get(keys)
        except (RuntimeError, ValueError):
            return f"whatever ran at {self._address[0]}, where the ranks met: it does not answer"
        silent = [
            f"rank {rank} on {was.decode().split()[0]}"
            for rank, (was, now) in enumerate(zip(before, after, strict=True))
            if was == now and rank != self._rank
        ]
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        if found := ", ".join(silent[:8]) + more:
            store.set(_FOUND, found)
            if self._rank == 0:  # it may be the one that holds the store, which others ask now
                time.sleep(2 * _LISTEN_SECONDS)
        return found

    def _connect(self) -> dist.Store:
        host, port = self._address
        timeout = timedelta(seconds=_STORE_SECONDS)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return dist.PrefixStore(attempt(), store)

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(_BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
            except (RuntimeError, ValueError):
                return  # the store is gone, and with it the run

    def _beat(self, count: int) -> None:
        self._store.set(_key(self._rank), f"{socket.gethostname()} {count}")


def lost_rank_error(heartbeat: Heartbeat, failure: BaseException) -> LostRankError | None:
    """What to tell of a failure, if a rank is missing."""
    missing = heartbeat.missing()
    if not missing:
        return None
    text = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    return LostRankError(
        f"missing: {missing}\n"
        f"  found: {text[:200]}\n"
        "  rule: all ranks take part in every step, but replicas with sync.coordinator\n"
        "  cure: start the run again, on other nodes if need be: it goes on from its newest "
        "checkpoint with any number of ranks"
    )


def _key(rank: int) -> str:
    return f"beat/{rank}"
