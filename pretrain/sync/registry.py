"""The sync of a run, as its config says."""

from typing import Any

from pretrain.config import Config
from pretrain.config_sync import AllReduce, OuterSection, PowerSgd, Quantized, SyncSection
from pretrain.engine.world import World
from pretrain.engine.zero import ZeroEngine
from pretrain.optim.shards import Shards
from pretrain.sync.base import ReplicaSync
from pretrain.sync.fixed import FixedMembers
from pretrain.sync.gradients import GradientSync
from pretrain.sync.mean import AllReduceMean, GradientMean
from pretrain.sync.members import Members
from pretrain.sync.powersgd import PowerSgdMean
from pretrain.sync.quantized import QuantizedMean
from pretrain.sync.rounds import OuterSync


def members_of(config: Config, world: World) -> FixedMembers | Members | None:
    """Who meets in the rounds of a run, where its replicas do not step together; collective."""
    section = config.sync
    if not isinstance(section, OuterSection):
        return None
    if section.coordinator is None:
        return FixedMembers(world)
    facts = {
        "name": config.name,
        "seed": config.seed,
        "ranks": world.size,
        "model": config.model.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json"),
        "engine.zero_stage": config.engine.zero_stage,
        "sync": section.model_dump(mode="json", exclude={"coordinator"}),
    }
    return Members(section, world, facts, config.timeout.value)


def build_sync(
    config: Config,
    engine: ZeroEngine,
    members: FixedMembers | Members | None,
    parts: dict[str, Any],
) -> ReplicaSync:
    """What keeps the replicas of `engine` together; `parts` are what else a replica that joins
    takes over from another."""
    section, length = config.sync, config.data.sequence_length
    if isinstance(section, OuterSection):
        assert members is not None
        return OuterSync(section, engine, members, parts)
    replicas = engine.world.replicas
    if replicas.size == 1:
        return ReplicaSync(engine.world)
    start = section.start.samples(length) if isinstance(section, PowerSgd | Quantized) else 0
    mean = mean_of(section, engine.shards, replicas, config.seed)
    plain = AllReduceMean(AllReduce(), engine.shards, replicas)
    return GradientSync(engine, mean, plain, start, config.mesh.check_every)


def mean_of(section: SyncSection, shards: Shards, replicas: World, seed: int) -> GradientMean:
    """How gradients are averaged over replicas at each step."""
    if isinstance(section, PowerSgd):
        return PowerSgdMean(section, shards, replicas, seed)
    if isinstance(section, Quantized):
        return QuantizedMean(section, shards, replicas)
    assert isinstance(section, AllReduce)
    return AllReduceMean(section, shards, replicas)
