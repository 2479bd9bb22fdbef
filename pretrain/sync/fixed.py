"""The replicas of one launch: all of them, always."""

from pretrain.engine.world import World
from pretrain.sync.members import Meeting


class FixedMembers:
    """Tells what `Members` does, for the replicas of `world`. None of them can be done without, so
    that a failure in a round ends the run."""

    failures: tuple[type[Exception], ...] = ()

    def __init__(self, world: World) -> None:
        self._replicas = world.replicas

    def meet(self, step: int, newcomer: bool = False) -> Meeting:
        """All replicas; at the start of a run the first hands its weights to the others."""
        replicas, starts = self._replicas, newcomer and step == 0
        return Meeting(
            replicas=replicas,
            contributors=1 if starts else replicas.size,
            newcomer=starts and replicas.rank > 0,
            changed=False,
            epoch=(step, ""),
            members=(),
        )

    def vote(self, meeting: Meeting, fine: bool) -> bool:
        """Whether the round counts."""
        return fine

    def leave(self) -> None:
        """Nothing to leave."""
