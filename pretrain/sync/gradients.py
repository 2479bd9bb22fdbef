"""Replicas that step together: their gradients are brought together before each step."""

from typing import TYPE_CHECKING

from torch import Tensor

from pretrain.quantities import Horizon
from pretrain.recipe import Clock
from pretrain.sync.base import ReplicaSync
from pretrain.sync.drift import checksums, compare_replicas
from pretrain.sync.mean import GradientMean

if TYPE_CHECKING:
    from pretrain.engine.zero import ZeroEngine


class GradientSync(ReplicaSync):
    """Averages gradients over the replicas of `engine`: by `mean`, and before `start_samples` of
    the run by `plain`. Compares the replicas every `check_every`."""

    def __init__(
        self,
        engine: "ZeroEngine",
        mean: GradientMean,
        plain: GradientMean,
        start_samples: int,
        check_every: Horizon | None,
    ) -> None:
        super().__init__(engine.world)
        self._engine, self._mean, self._plain = engine, mean, plain
        self._start_samples, self._check_every = start_samples, check_every
        self._checked = Clock()

    def begin(self, clock: Clock) -> Clock:
        """Give all replicas of a new run the weights of the first; of an old one, compare them."""
        if clock.step == 0:
            for master in self._engine.masters:
                self._world.replicas.share(master)
            self._engine.refresh_weights()
        self.check(clock)
        return clock

    def gradients(self, gradients: list[Tensor], clock: Clock) -> None:
        """Replace the accumulated flat gradients by their mean over replicas."""
        mean = self._plain if clock.samples < self._start_samples else self._mean
        with self._timed(on_device=True):
            mean.average(gradients)
        self.sent_bytes = mean.sent_bytes

    def stepped(self, clock: Clock, last: bool = False) -> Clock:
        """Compare the replicas where it is due."""
        if self._check_every and self._check_every.crossed(self._checked, clock):
            self.check(clock)
        return clock

    def check(self, clock: Clock) -> None:
        """Compare the replicas; DriftError where they differ. Collective."""
        self._checked = clock
        engine, world = self._engine, self._world
        sums = checksums(world.shard, engine.shards, engine.masters)
        compare_replicas(world.replicas, sums, engine.shards, clock.step)

    def own_state(self) -> dict[str, list[Tensor]]:
        """What compression has not sent yet."""
        return {"sync.error": self._mean.errors} if self._mean.errors else {}

    def factors(self) -> dict[str, Tensor]:
        """Warm-start factors; a run on other shards begins them anew."""
        return self._mean.factors
