"""What the engine asks of that which keeps replicas together; by itself: there is one replica."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.engine.world import World, rows_of_rank
from pretrain.recipe import Clock


class ReplicaSync:
    """Nothing to keep together, and the base of the methods that do.

    `ranks` share the global batch; `together` are those of them that take the same step, so that
    loss and gradient norm are sums over them. Either may change at each step, for replicas come
    and go. `leads` tells whether this rank's replica validates, records and saves. `sent_bytes` and
    `seconds` are what this rank sent to other replicas in the last step, and how long it took.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.ranks = self.together = world
        self.leads = True
        self.sent_bytes, self._seconds = 0, 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @property
    def replicas(self) -> int:
        """Replicas that train now."""
        return self.ranks.size // self._world.shard.size

    @property
    def launches(self) -> int:
        """Launches like this one that train now."""
        return self.ranks.size // self._world.size

    @property
    def in_step(self) -> bool:
        """Whether all replicas of this launch take the same steps, so that they are alike."""
        return self.together is self._world

    def samples_together(self, batch_samples: int) -> int:
        """Samples of a batch that `together` work on."""
        replicas, size = self.ranks.size // self.together.size, self.together.size
        first, end = rows_of_rank(
            batch_samples, World(self.ranks.rank // size, replicas, self.together.device)
        )
        return end - first

    def gradients(self, gradients: list[Tensor], clock: Clock) -> None:
        """Bring the accumulated flat gradients together, in place, before the step at `clock`."""

    def begin(self, clock: Clock) -> Clock:
        """Meet the other replicas before the first step; where to go on. Collective."""
        return clock

    def stepped(self, clock: Clock, last: bool = False) -> Clock:
        """The step that ended at `clock` is done, the `last` one of the run or not; where to go on.
        Collective."""
        return clock

    def agree(self, stop: bool, clock: Clock) -> bool:
        """Whether all ranks of this launch make way after the step that ended at `clock`, as those
        that step together want to if `stop`. Collective."""
        return stop

    def check(self, clock: Clock) -> None:
        """Compare the replicas, where they ought to be alike; collective."""

    @property
    def outer_weights(self) -> list[Tensor]:
        """What the replicas agreed on last, laid out like the masters, where they step by
        themselves; else empty."""
        return []

    # --- what a checkpoint holds of it: flat tensors laid out like the masters --------------------

    def shared_state(self) -> dict[str, list[Tensor]]:
        """State that is the same on all replicas."""
        return {}

    def own_state(self) -> dict[str, list[Tensor]]:
        """State of this replica. Others may take it up: the mean over replicas is what counts."""
        return {}

    def factors(self) -> dict[str, Tensor]:
        """State that is the same on all replicas and fits only the present shards."""
        return {}

    def close(self) -> None:
        """Leave the other replicas; the run is over."""

    @property
    def seconds(self) -> float:
        """How long the last step's sync took; to be asked for once its loss is known."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._seconds

    @contextmanager
    def _timed(self, on_device: bool) -> Iterator[None]:
        """Take the time inside; work that a device has yet to do is not waited for."""
        if on_device and self._world.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            self._events = first, last
        began = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - began
        if self._events:
            self._events[1].record()
