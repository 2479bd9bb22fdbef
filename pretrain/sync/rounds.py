"""Replicas that step by themselves and meet every so many steps: DiLoCo and local SGD.

In a round they average the outer gradients of a part of the model and take the outer step, each the
same. Who takes part is told by `Members`: all replicas of a launch, or whoever the coordinator has
heard of. A round that fails for one of them is done again by those that remain. Who joins is given
all that the others have at the beginning of a round, and ends it like them.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.config_sync import OuterSection
from pretrain.engine.world import World
from pretrain.recipe import Clock
from pretrain.sync.base import ReplicaSync
from pretrain.sync.drift import checksums, compare_replicas
from pretrain.sync.fixed import FixedMembers
from pretrain.sync.members import LeftBehind, Meeting, Members
from pretrain.sync.outer import OuterWeights
from pretrain.sync.quantized import quantized_mean
from pretrain.wire import number_bytes

if TYPE_CHECKING:
    from pretrain.engine.zero import ZeroEngine

_AGREE_STEPS = 10
_PIECE_ELEMENTS = 2**22  # of a message: one that stalls is noticed soon, even on a slow link


@dataclass
class _Round:
    """A round under way: `gradient` is this replica's, `mean` will be that of all. Without a part
    only state is handed over. It ends after the step `landing`."""

    meeting: Meeting
    part: int | None
    gradient: Tensor
    mean: Future[Tensor]
    landing: int
    sent_bytes: int = 0


class OuterSync(ReplicaSync):
    """DiLoCo or local SGD over the replicas that `members` tell of.

    `parts` are what else a replica that joins takes over from another, by name.
    """

    def __init__(
        self,
        section: OuterSection,
        engine: "ZeroEngine",
        members: FixedMembers | Members,
        parts: dict[str, Any],
    ) -> None:
        super().__init__(engine.world)
        self.together = engine.world.shard
        self._section, self._engine, self._members, self._parts = section, engine, members, parts
        self._outer = OuterWeights(engine.exported(), *section.outer, section.parts)
        self._round: _Round | None = None
        self._stop = False
        self._pending: list[Tensor] = []  # of a round that was under way in a checkpoint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outer gradients")

    def begin(self, clock: Clock) -> Clock:
        """Meet for the first time: who is furthest hands all it has to the others."""
        clock, delay = self._join(clock), self._section.delay_steps
        # With a coordinator nobody else may have been in that round: it is dropped.
        goes_on = self._pending and isinstance(self._members, FixedMembers)
        for part in range(self._section.parts) if goes_on else ():
            for began in range(max(1, clock.step - delay + 1), clock.step + 1):
                if self._due(part, began):
                    self._go_on(part, began + delay)
        self._pending = []
        return clock

    def stepped(self, clock: Clock, last: bool = False) -> Clock:
        """End the round that is due to end after this step, begin the one that is due to begin;
        after the `last` step all parts have a round, so that no step is lost."""
        self.sent_bytes = 0
        with self._timed(on_device=False):
            try:
                if self._round and (last or self._round.landing <= clock.step):
                    self._land(clock)
                for part in range(self._section.parts):
                    if last or self._due(part, clock.step):
                        gradient = self._outer.difference(part, self._engine.exported())
                        landing = clock.step + (0 if last else self._section.delay_steps)
                        self._round, _ = self._open(clock, part, gradient, landing)
                        if landing == clock.step:
                            self._land(clock)
            except LeftBehind:
                clock = self._join(clock)
        return clock

    def agree(self, stop: bool, clock: Clock) -> bool:
        """Replicas of a launch that step by themselves tell each other every few steps."""
        if self.in_step:
            return stop
        self._stop |= stop
        if clock.step % min(self._section.every_steps, _AGREE_STEPS):
            return False
        world = self._engine.world
        return world.sum(torch.tensor(float(self._stop), device=world.device)).item() > 0

    def _due(self, part: int, step: int) -> bool:
        """Whether the round of a part begins after `step`: once in H steps, evenly spread."""
        every = self._section.every_steps
        return step % every == every * (part + 1) // self._section.parts % every

    def _join(self, clock: Clock) -> Clock:
        """Become one of those who train, by the round that is next; where they are."""
        nothing, self._round = torch.empty(0), None
        while self._round is None:
            entered, now = self._open(clock, None, nothing, clock.step, newcomer=True)
            under_way = entered.landing > now.step
            if under_way or self._members.vote(entered.meeting, self._fine(entered)):
                self._round = entered
        if self._round.landing <= now.step:
            self._take_step()
        return now

    def _land(self, clock: Clock) -> None:
        """End the round under way, again and again without those that are lost in it."""
        current = self._round
        assert current is not None
        while not self._members.vote(current.meeting, self._fine(current)):
            current, _ = self._open(
                clock, current.part, current.gradient, clock.step, current.meeting.newcomer
            )
        self._round = current
        self._take_step()

    def _open(
        self, clock: Clock, part: int | None, gradient: Tensor, landing: int, newcomer: bool = False
    ) -> tuple[_Round, Clock]:
        """Begin a round, and where a newcomer is when it does; any failure shows at its end."""
        meeting = self._members.meet(clock.step, newcomer)
        current = _Round(meeting, part, gradient, Future(), landing)
        self._take_place(meeting)
        fine = True
        if meeting.contributors < meeting.replicas.size:
            clock, fine = self._share_state(current, clock)
        # Ranks of a shard group must not wait for each other where only some of them may fail.
        sums = checksums(self._world.shard, self._engine.shards, self._outer.weights)
        try:
            if not fine:
                raise RuntimeError("the state of the run was not handed over")
            compare_replicas(meeting.replicas, sums, self._engine.shards, clock.step)
        except self._members.failures as failure:
            current.mean.set_exception(failure)
        else:
            current.mean = self._thread.submit(self._mean, current)
        return current, clock

    def _take_place(self, meeting: Meeting) -> None:
        """Share the batch with those who are there."""
        shard, replicas = self._world.shard, meeting.replicas
        rank = replicas.rank * shard.size + shard.rank
        self.ranks = World(rank, replicas.size * shard.size, shard.device)
        self.leads = replicas.rank == 0

    def _mean(self, current: _Round) -> Tensor:
        """The mean of the outer gradients of those that have trained."""
        replicas, mean = current.meeting.replicas, current.gradient.clone()
        if replicas.size == 1 or current.part is None:
            return mean
        bits, others = self._section.bits, 2 * (replicas.size - 1) / replicas.size
        for piece in mean.split(_PIECE_ELEMENTS):
            if bits == 32:
                replicas.sum(piece).div_(current.meeting.contributors)
            else:
                scale = replicas.size / current.meeting.contributors  # newcomers send zeros
                piece.copy_(quantized_mean(piece, replicas, bits)).mul_(scale)
        current.sent_bytes = round(others * number_bytes(bits) * mean.numel())
        return mean

    def _fine(self, current: _Round) -> bool:
        """Whether the mean of a round has arrived; waits for it."""
        try:
            current.mean.result()
        except self._members.failures:
            return False
        return True

    def _take_step(self) -> None:
        """The outer step of the round that has ended."""
        current, self._round = self._round, None
        assert current is not None
        engine, outer, part = self._engine, self._outer, current.part
        self.sent_bytes += current.sent_bytes
        if part is not None:
            exported = engine.exported()
            outer.advance(part, current.mean.result())
            if exported is engine.masters:
                outer.blend(part, engine.masters, self._section.mix)
            else:  # an average cannot be set: what it is made of is moved as far
                bases = [engine.optimizer.state[master]["z"] for master in engine.masters]
                outer.shift(part, exported, engine.masters)
                outer.shift(part, exported, bases)
            engine.refresh_weights()

    # --- who joins --------------------------------------------------------------------------------

    def _share_state(self, current: _Round, clock: Clock) -> tuple[Clock, bool]:
        """Give newcomers all that the first replica has; the clock of those who train, and whether
        all ranks of this replica came through."""
        engine, newcomer = self._engine, current.meeting.newcomer
        note = {
            "clock": asdict(clock),
            "part": current.part,
            "landing": current.landing,
            "stepped": bool(engine.optimizer.state),
            "scalars": engine.optimizer_scalars(),
            "parts": {name: part.state() for name, part in self._parts.items()},
        }
        told: dict[str, Any] = {}
        if not self._all_fine(lambda: told.update(_share_note(current.meeting.replicas, note))):
            return clock, False
        if newcomer and told["stepped"]:
            engine.materialize_state()
        if not self._all_fine(lambda: self._share_tensors(current.meeting)):
            return clock, False
        if newcomer:
            engine.loaded(told["scalars"])
            for name, part in self._parts.items():
                part.load_state(told["parts"][name])
            current.part, current.landing = told["part"], told["landing"]
            if current.part is not None:
                length = sum(length for *_, length in self._outer.parts[current.part])
                current.gradient = torch.zeros(length)
        return Clock(**told["clock"]), True

    def _all_fine(self, exchange: Callable[[], None]) -> bool:
        """Whether an exchange between replicas went well for all ranks of the shard group."""
        fine = True
        try:
            exchange()
        except self._members.failures:
            fine = False
        return all(self._world.shard.gather(fine))

    def _share_tensors(self, meeting: Meeting) -> None:
        tensors = [*self._engine.state_tensors(), *self._outer.weights, *self._outer.momentum]
        for tensor in tensors:
            for piece in tensor.detach().view(-1).split(_PIECE_ELEMENTS):
                # Those who have it take part, so that nobody waits for longer than for a piece.
                takes = meeting.newcomer or meeting.replicas.rank == 0
                meeting.replicas.share(piece if takes else piece.clone())

    # --- state ------------------------------------------------------------------------------------

    @property
    def outer_weights(self) -> list[Tensor]:
        """What the replicas agreed on last."""
        return self._outer.weights

    def shared_state(self) -> dict[str, list[Tensor]]:
        """The outer step's momentum, and the mean outer gradient of a round under way."""
        state = {"outer.momentum": self._outer.momentum} if self._outer.momentum else {}
        if self._section.delay_steps:
            self._pending = [torch.zeros_like(flat) for flat in self._outer.weights]
            if self._round and self._round.part is not None and self._fine(self._round):
                self._outer.place(self._round.part, self._round.mean.result(), self._pending)
            state["outer.pending"] = self._pending
        return state

    def _go_on(self, part: int, landing: int) -> None:
        """Go on with a round whose mean gradient lies in a checkpoint."""
        mean: Future[Tensor] = Future()
        mean.set_result(self._outer.taken(part, self._pending))
        meeting = self._members.meet(landing)
        self._round = _Round(meeting, part, mean.result(), mean, landing)

    def close(self) -> None:
        """Leave the others; they go on."""
        self._members.leave()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _share_note(replicas: World, note: dict[str, Any]) -> dict[str, Any]:
    """The note of the first replica."""
    data = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    size = replicas.share(torch.tensor([data.numel()]))
    if replicas.rank:
        data = torch.empty(int(size), dtype=torch.uint8)
    return json.loads(bytes(replicas.share(data).tolist()))
