"""The coordinator: a small server at which replicas that are launches of their own meet.

A line of JSON is a request, a line of JSON its answer. Who has to wait gets a line each second, so
that a wait is told from a dead coordinator.
"""

import json
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pretrain.errors import UserError
from pretrain.sync.roster import TICK_SECONDS, Roster, to_epoch, to_mark

_WAIT_LINE_SECONDS = 1.0
_IDLE_SECONDS = 60.0  # after which a connection is closed, for its host may be gone
_LONGEST_LINE = 2**20


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # its follower begins while connections of the old one are ending
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], roster: Roster) -> None:
        self.roster, self.changed = roster, threading.Condition()
        super().__init__(address, _Talk)


class _Talk(socketserver.StreamRequestHandler):
    """One connection."""

    server: _Server
    disable_nagle_algorithm = True
    timeout = _IDLE_SECONDS

    def handle(self) -> None:
        # Whoever is none of ours and talks nonsense is hung up on, as is who hangs up on us.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            while line := self.rfile.readline(_LONGEST_LINE):
                self._reply(json.loads(line))
        with self.server.changed:
            self.server.roster.hung_up(id(self))

    def _reply(self, request: dict[str, Any]) -> None:
        told = time.monotonic()
        with self.server.changed:
            answer = self._begin(request)
            self.server.changed.notify_all()
        while answer is None:
            with self.server.changed:
                answer = self._poll(request)
                if answer is None:
                    self.server.changed.wait(_WAIT_LINE_SECONDS)
                    answer = self._poll(request)
                awaited = "" if answer else self.server.roster.awaited()
            if answer is None and time.monotonic() - told >= _WAIT_LINE_SECONDS:
                self._write({"wait": awaited})
                told = time.monotonic()
        self._write(answer)

    def _begin(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Do what is asked; the answer, if it is there at once."""
        roster, what = self.server.roster, request["do"]
        if what == "hello":
            refusal = roster.hello(request, self.client_address[0])
            roster.heard(request["id"], id(self))
            return {"refused": refusal} if refusal else {"welcome": True}
        if what == "bye":
            roster.bye(request["id"])
            return {"bye": True}
        if what == "put":
            roster.put(to_epoch(request["epoch"]), request["key"], request["value"])
            return {"put": True}
        if what != "take" and not roster.heard(request["id"], id(self)):
            return {"unknown": True}
        if what == "meet":
            roster.meet(request["id"], request["step"], to_mark(request["mark"]))
        elif what == "vote":
            roster.vote(request["id"], to_epoch(request["epoch"]), request["fine"])
        return None

    def _poll(self, request: dict[str, Any]) -> dict[str, Any] | None:
        roster, what = self.server.roster, request["do"]
        if what == "take":
            return roster.take(to_epoch(request["epoch"]), request["key"])
        if not roster.knows(request["id"]):  # it was given up meanwhile
            return {"unknown": True}
        if what == "meet":
            return roster.meeting(request["id"])
        return roster.outcome(request["id"], to_epoch(request["epoch"]))

    def _write(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _print(line: str) -> None:
    print(line, flush=True)


def serve(host: str, port: int, say: Callable[[str], None] = _print) -> None:
    """Be the coordinator until interrupted; port 0 is a free one. `say` is told where it is, who
    comes and goes, and each round that others take part in than in the one before.

    Raises UserError where it cannot listen.
    """
    roster = Roster(say)
    try:
        server = _Server((host, port), roster)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host}:{port}: cannot listen here: {error}\n"
            "  rule: one coordinator listens on an address of this machine\n"
            "  cure: stop the process that has the port, or choose another one"
        ) from error

    def watch() -> None:
        while True:
            time.sleep(TICK_SECONDS)
            with server.changed:
                roster.tick()
                server.changed.notify_all()

    with server:
        say("coordinator at {}:{}".format(*server.server_address))
        threading.Thread(target=watch, daemon=True).start()
        server.serve_forever()
