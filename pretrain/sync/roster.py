"""Who is in, and the rounds of a run: what the coordinator decides, without its networking.

Nothing that matters is kept here: every replica says at each heartbeat who it is and which round
was its last (its *mark*), so a coordinator that is started anew knows within a second whom it knew
before. The replicas with the greatest mark hold the state of the run. The others, new ones and such
as were cut off while a round went by, wait for the next round, in which they are given it.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

Epoch = tuple[int, str]  # number of a round, which coordinator counted it
Mark = tuple[int, str, int]  # epoch of a member's last round, how many replicas came through it
NEVER: Mark = (0, "", 0)

TICK_SECONDS = 0.1
_FAILURES_IN_A_ROW = 5
_CLOSED_SECONDS = 2.0  # by then a process that has not ended has made new connections


def to_epoch(value: list[Any]) -> Epoch:
    """An epoch as JSON has it. Raises ValueError or TypeError where it is none."""
    number, life = value
    return int(number), str(life)


def to_mark(value: list[Any]) -> Mark:
    """A mark as JSON has it. Raises ValueError or TypeError where it is none."""
    return (*to_epoch(value[:2]), int(value[2]))


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts as a run's config names them, with dots between the sections."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)


@dataclass
class _Member:
    """A replica, as last heard of; times are those of the clock, in seconds."""

    key: str
    host: str
    address: str
    expect: int
    lost_after: float
    mark: Mark
    heard: float
    closed: float | None = None  # since when it has no connection
    connections: set[int] = field(default_factory=set)
    step: int | None = None  # at which it asks to meet
    refusal: str | None = None

    def __str__(self) -> str:
        return f"{self.host} ({self.key[:6]})"


@dataclass
class _Round:
    """Replicas that exchange; over once it has an outcome."""

    epoch: Epoch
    answer: dict[str, Any]
    unheard: set[str]  # members that have yet to vote
    votes: dict[str, bool] = field(default_factory=dict)
    outcome: bool | None = None
    complete: bool = True  # nobody was lost since it closed
    board: dict[str, str] = field(default_factory=dict)


class Roster:
    """Who is in, and the rounds: all decisions, without any networking or locks.

    Requests that may have to wait are made once and their answer asked for until there is one.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._life = os.urandom(4).hex()
        self._number = 0
        self._members: dict[str, _Member] = {}  # the longest here first
        self._facts: dict[str, Any] = {}
        self._round: _Round | None = None
        self._group: tuple[Epoch, list[str]] | None = None  # who still has a process group
        self._failed: tuple[list[str], int] = ([], 0)  # members of rounds in a row, and how many
        self._sent_away: dict[str, str] = {}  # why, by member
        self._opened, self._opened_number = 0.0, 0  # when the first one came
        self._ticked = clock()

    # --- members ----------------------------------------------------------------------------------

    def hello(self, who: dict[str, Any], address: str) -> str | None:
        """A replica says that it lives; why it is refused, or None."""
        key, now = who["id"], self._clock()
        if not self._members:
            self._facts, self._opened, self._opened_number = who["facts"], now, self._number
        if refusal := self._sent_away.get(key) or self._differences(who):
            return refusal
        if key not in self._members:
            mark = to_mark(who["mark"])
            self._number = max(self._number, mark[0])
            member = _Member(key, who["host"], address, who["expect"], who["lost_after"], mark, now)
            self._members[key] = member
            self._say(f"{member} {'is back' if mark > NEVER else 'joined'}; {self._count()}")
        return None

    def heard(self, key: str, connection: int) -> bool:
        """A sign of life; whether the member is known."""
        if member := self._members.get(key):
            member.heard, member.closed = self._clock(), None
            member.connections.add(connection)
        return member is not None

    def knows(self, key: str) -> bool:
        """Whether a member is in."""
        return key in self._members

    def hung_up(self, connection: int) -> None:
        """A connection has ended."""
        for member in self._members.values():
            if connection in member.connections:
                member.connections.remove(connection)
                if not member.connections:
                    member.closed = self._clock()

    def bye(self, key: str) -> None:
        """A member leaves; nobody waits for it any more."""
        if key in self._members:
            self._remove(key, "left")

    def tick(self) -> None:
        """Give up who was not heard of for too long, and let the others go on."""
        now = self._clock()
        asleep = max(0.0, now - self._ticked - 10 * TICK_SECONDS)
        self._ticked = now
        for member in list(self._members.values()):
            member.heard += asleep  # who could not listen has heard nothing
            silent = now - member.heard
            if member.closed is not None and now - member.closed > _CLOSED_SECONDS:
                self._remove(member.key, f"lost, it has ended ({silent:.0f} s ago)")
            elif silent > member.lost_after:
                self._remove(member.key, f"lost, silent for {silent:.0f} s")
        self._close_round()

    def _remove(self, key: str, how: str) -> None:
        member = self._members.pop(key)
        self._say(f"{member} {how}; {self._count()}")
        if self._round and self._round.outcome is None and key in self._round.unheard:
            self._round.unheard.remove(key)
            self._round.complete = False
            self._decide(self._round)

    def _differences(self, who: dict[str, Any]) -> str | None:
        here, there = dict(_flat(who["facts"])), dict(_flat(self._facts))
        keys = [k for k in sorted({*here, *there}) if here.get(k) != there.get(k)]
        if not keys:
            return None
        facts = "; ".join(f"{k} is {here.get(k)} here and {there.get(k)} there" for k in keys)
        return (
            f"the run of {self._names(self._members)} differs: {facts}\n"
            "  rule: all replicas of a run have the same config\n"
            "  cure: start this launch with the config of the others, or give it a coordinator of "
            "its own"
        )

    def _count(self) -> str:
        count = len(self._members)
        return f"{count} replica{'s' * (count != 1)}"

    # --- meeting ----------------------------------------------------------------------------------

    def meet(self, key: str, step: int, mark: Mark) -> None:
        """A member asks for the round at `step`."""
        member = self._members[key]
        member.step, member.mark, member.refusal = step, mark, None
        self._close_round()

    def meeting(self, key: str) -> dict[str, Any] | None:
        """The answer to `meet`, once there is one."""
        member, current = self._members[key], self._round
        if member.refusal:
            member.step = None
            return {"refused": member.refusal}
        if current and current.outcome is None and key in current.unheard:
            # Only now: were the round over before its answer left, the member would still ask.
            member.step = None
            return current.answer
        if NEVER < member.mark < self._top():
            member.step = None
            return {"behind": True}
        return None

    def awaited(self) -> str:
        """Whom or what those wait for who wait."""
        if self._round and self._round.outcome is None:
            return "the end of a round: " + self._names(self._round.unheard)
        expect = max((member.expect for member in self._members.values()), default=0)
        if self._top() == NEVER and len(self._members) < expect:
            return f"{expect} replicas, {len(self._members)} here"
        return self._names(self._missing()) or "replicas that may come back"

    def _names(self, keys: Collection[str]) -> str:
        return ", ".join(str(m) for k, m in self._members.items() if k in keys)

    def _missing(self) -> list[str]:
        """Members without whom no round closes and who have yet to ask for it: those that hold the
        run's state, and in a round that is done again all that were in it."""
        again = self._round.answer["members"] if self._round and not self._round.outcome else []
        top = self._top()
        members = self._members.items()
        return [k for k, m in members if m.step is None and (m.mark == top or k in again)]

    def _top(self) -> Mark:
        return max((member.mark for member in self._members.values()), default=NEVER)

    def _close_round(self) -> None:
        """Begin a round if all are there whom it needs."""
        if not self._members or (self._round and self._round.outcome is None):
            return
        members, top = list(self._members.values()), self._top()
        if self._missing() or self._more_may_come(top):
            return
        if top == NEVER:
            # A start: who is furthest, for it has read a checkpoint, hands its state to the others.
            if len(members) < max(member.expect for member in members):
                return
            contributors = [max(members, key=lambda member: member.step or 0)]
        else:
            contributors = [member for member in members if member.mark == top]
            if len({member.step for member in contributors}) > 1:
                self._refuse(contributors)
                return
        newcomers = [
            member
            for member in members
            if member.mark == NEVER and member.step is not None and member not in contributors
        ]
        self._begin_round(contributors, newcomers)

    def _more_may_come(self, top: Mark) -> bool:
        """Whether some with the greatest mark may be about to come back: all had lost this
        coordinator, or it was started anew, so that it cannot know who still lives."""
        number, life, mates = top
        if life == self._life and number > self._opened_number:
            return False
        holders = [member for member in self._members.values() if member.mark == top]
        patience = max(member.lost_after for member in holders)
        return len(holders) < mates and self._clock() < self._opened + patience

    def _begin_round(self, contributors: list[_Member], newcomers: list[_Member]) -> None:
        self._number += 1
        epoch, everyone = (self._number, self._life), [*contributors, *newcomers]
        keys = [member.key for member in everyone]
        if newcomers or self._group is None or self._group[1] != keys:
            self._group = (epoch, keys)
            self._say(
                f"round {self._number} at step {contributors[0].step}: {len(keys)} together"
                + (f"; {contributors[0]} hands its state to " if newcomers else "")
                + self._names([member.key for member in newcomers])
            )
        answer = {
            "epoch": epoch,
            "group": self._group[0],
            "members": keys,
            "names": [str(member) for member in everyone],
            "addresses": [member.address for member in everyone],
            "contributors": len(contributors),
        }
        self._round = _Round(epoch, answer, set(keys))

    def _refuse(self, members: list[_Member]) -> None:
        steps = ", ".join(f"{member} at step {member.step}" for member in members)
        for member in members:
            member.refusal = (
                f"replicas of one run meet at different steps: {steps}\n"
                "  rule: all of them meet after the same steps\n"
                "  cure: start all launches from checkpoints of the same run, with the same config"
            )

    # --- the outcome ------------------------------------------------------------------------------

    def vote(self, key: str, epoch: Epoch, fine: bool) -> None:
        """A member tells whether it came through the exchange of a round."""
        current = self._round
        if current and current.epoch == epoch and current.outcome is None:
            current.votes[key] = fine
            current.unheard.discard(key)
            if not fine:
                self._say(f"round {epoch[0]} failed for {self._names([key])}")
            self._decide(current)

    def outcome(self, key: str, epoch: Epoch) -> dict[str, Any] | None:
        """The answer to `vote`, once it is known: the member's new mark, or None where the round
        does not count for it."""
        current = self._round
        if current is None or current.epoch != epoch:
            return {"mark": None}
        if current.outcome is None:
            return None
        if not current.outcome or key not in current.votes:
            return {"mark": None}
        self._members[key].mark = (*epoch, len(current.votes))
        return {"mark": self._members[key].mark}

    def _decide(self, current: _Round) -> None:
        """The first that failed ends a round for all; else it counts once all have voted."""
        if not all(current.votes.values()) or not (current.unheard or current.votes):
            current.outcome, self._group = False, None
            current.unheard.clear()
            self._count_failure(current.answer["members"])
        elif not current.unheard:
            current.outcome, self._failed = True, ([], 0)
            for key in current.votes.keys() & self._members.keys():
                self._members[key].mark = (*current.epoch, len(current.votes))
        if current.outcome is not None:
            self._close_round()

    def _count_failure(self, keys: list[str]) -> None:
        """Who cannot reach each other would try for ever: the last to come has to go."""
        failed, times = self._failed
        self._failed = (keys, times + 1 if failed == keys else 1)
        if self._failed[1] < _FAILURES_IN_A_ROW or keys[-1] not in self._members:
            return
        self._sent_away[keys[-1]] = (
            f"{_FAILURES_IN_A_ROW} rounds in a row of {self._names(keys)} have failed, and this "
            "replica came last\n"
            "  rule: replicas reach each other, not only the coordinator, and none is silent for "
            "longer than sync.lost_after\n"
            "  cure: open the network between their hosts, name the interface in "
            "GLOO_SOCKET_IFNAME, or raise sync.lost_after"
        )
        self._remove(keys[-1], f"sent away after {_FAILURES_IN_A_ROW} failed rounds")

    # --- how those of a round find each other -----------------------------------------------------

    def put(self, epoch: Epoch, key: str, value: str) -> None:
        """Something for the others of a round to read."""
        if self._round and self._round.epoch == epoch:
            self._round.board[key] = value

    def take(self, epoch: Epoch, key: str) -> dict[str, Any] | None:
        """What another one of the round has put, once it has."""
        current = self._round
        if current is None or current.epoch != epoch or current.outcome is not None:
            return {"over": "the round has ended"}
        if key in current.board:
            return {"value": current.board[key]}
        return None if current.complete else {"over": "a replica was lost"}
