"""Who takes part in a round, where replicas are launches of their own and a coordinator knows."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.config_sync import OuterSection
from pretrain.engine.world import World
from pretrain.errors import UserError
from pretrain.sync.links import Board, Heart, Line, Link, own_address
from pretrain.sync.roster import NEVER, Epoch, Mark, to_epoch, to_mark

_CPU = torch.device("cpu")
_PATIENCE_TO_TELL_SECONDS = 10.0


def _print(line: str) -> None:
    print(line, flush=True)


class LeftBehind(Exception):
    """The others went on without this replica: its state is no longer that of the run."""


@dataclass(frozen=True)
class Meeting:
    """The replicas of a round. The first `contributors` hold the state of the run, the others are
    given it by the first of all. Only until the vote does a failure among `replicas` do no harm."""

    replicas: World
    contributors: int
    newcomer: bool  # whether this one is to be given it
    changed: bool  # whether `replicas` is not that of the meeting before
    epoch: Epoch
    members: tuple[str, ...]  # "host (id)", by position


class Members:
    """A replica that is a launch of its own, among those that meet at the coordinator.

    All ranks of the launch make one and call its methods together; the first talks for them.
    `facts` must be the same for all replicas. Without the coordinator calls wait `timeout_seconds`,
    exchanges wait `exchange_seconds` (default: `lost_after`) for a silent peer. `say` is told what
    a long wait is for.

    Raises UserError where the coordinator cannot be reached or `facts` differ.
    """

    failures: tuple[type[Exception], ...] = (RuntimeError,)  # of an exchange, after which to vote

    def __init__(
        self,
        section: OuterSection,
        world: World,
        facts: dict[str, Any],
        timeout_seconds: float,
        exchange_seconds: float | None = None,
        say: Callable[[str], None] = _print,
    ) -> None:
        assert section.coordinator is not None
        self._address, self._shard, self._say = section.coordinator, world.shard, say
        self._timeout, lost_after = timeout_seconds, float(section.lost_after.value)
        self._exchange_seconds = exchange_seconds or lost_after
        self._key = self._shard.gather(os.urandom(8).hex())[0]
        self._who = {
            "id": self._key,
            "host": socket.gethostname(),
            "facts": facts,
            "expect": section.replicas,
            "lost_after": lost_after,
        }
        self._mark: Mark = NEVER
        self._line: Line | None = None
        self._group: list[Any] | None = None  # the name of that of the last meeting
        self._heart: Heart | None = None
        self._link = Link(self._address, self._hello)
        self._agree(self._hello())
        if self._shard.is_first:
            self._heart = Heart(self._address, self._hello, min(1.0, lost_after / 5))

    def meet(self, step: int, newcomer: bool = False) -> Meeting:
        """Wait for the others that are at `step`; who they are. A `newcomer` has no state that is
        worth anything, or does not want to keep it. Collective.

        A first meeting is one of newcomers, but for the one whose step is the greatest.
        Raises LeftBehind where the others went on without this replica, which then comes back as a
        newcomer, and UserError where replicas keep failing to reach each other.
        """
        if newcomer:
            self._mark = NEVER
        while True:
            answer = self._agree({"do": "meet", "id": self._key, "step": step, "mark": self._mark})
            if "behind" in answer:
                self._hang_up()
                raise LeftBehind(f"step {step}: the other replicas went on without this one")
            meeting, connected = self._connect(answer)
            if self._all(connected):
                return meeting
            self.vote(meeting, False)

    def vote(self, meeting: Meeting, fine: bool) -> bool:
        """Whether the round counts: the exchange went `fine` for all that are still there. Else all
        of them meet again. Collective."""
        fine = self._all(fine)
        answer = self._agree({"do": "vote", "id": self._key, "epoch": meeting.epoch, "fine": fine})
        if answer["mark"]:
            self._mark = to_mark(answer["mark"])
            return True
        self._hang_up()
        return False

    def leave(self) -> None:
        """Go, so that the others do not wait for this replica; does nothing the second time."""
        self._hang_up()
        if self._heart:
            self._heart.stop()
            self._heart = None
            self._link.close()
            self._link.tell({"do": "bye", "id": self._key})
            self._link.close()

    # --- the coordinator --------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        return {"do": "hello", **self._who, "mark": self._mark}

    def _agree(self, request: dict[str, Any]) -> dict[str, Any]:
        """The coordinator's answer to the first rank, on all ranks.

        These hear from the first every few seconds, or their collective would time out.
        """
        talk = self._link.ask(request, self._timeout) if self._shard.is_first else None
        began, told = time.monotonic(), ""
        while True:
            word = self._shard.gather(next(talk) if talk else None)[0]
            if isinstance(word, dict):
                break
            long = time.monotonic() - began > _PATIENCE_TO_TELL_SECONDS
            if talk and long and word != told:
                self._say(f"waiting for {word}")
                told = word
        if "refused" in word:
            raise UserError(word["refused"])
        return word

    def _all(self, fine: bool) -> bool:
        """Whether all ranks of this replica are fine."""
        flag = torch.tensor([float(not fine)], device=self._shard.device)
        return not self._shard.sum(flag).item()

    # --- the other replicas -----------------------------------------------------------------------

    def _connect(self, answer: dict[str, Any]) -> tuple[Meeting, bool]:
        """The meeting that the coordinator has called, and whether its replicas are connected."""
        keys, contributors = answer["members"], answer["contributors"]
        rank, size, epoch = keys.index(self._key), len(keys), to_epoch(answer["epoch"])
        changed, connected = answer["group"] != self._group, True
        if changed:
            self._hang_up()
            self._group = answer["group"]
            if size > 1:
                try:
                    self._line = self._dial(answer, rank, size, epoch)
                except (RuntimeError, OSError) as error:
                    connected = False
                    self._say(f"no connection to the other replicas: {error}")
        group = self._line.group if self._line else None
        meeting = Meeting(
            World(rank, size, _CPU, group),
            contributors,
            newcomer=rank >= contributors,
            changed=changed,
            epoch=epoch,
            members=tuple(answer["names"]),
        )
        return meeting, connected

    def _dial(self, answer: dict[str, Any], rank: int, size: int, epoch: Epoch) -> Line:
        place = self._shard.rank
        peers = [a for position, a in enumerate(answer["addresses"]) if position != rank]
        address = own_address(peers, self._address)
        board = Board(self._address, epoch, f"{place}/", self._exchange_seconds)
        try:
            name = f"replicas {epoch[1]}.{epoch[0]} {place}"
            return Line(name, board, rank, size, address, self._exchange_seconds)
        finally:
            board.close()

    def _hang_up(self) -> None:
        if self._line:
            self._line.close()
        self._line = self._group = None
