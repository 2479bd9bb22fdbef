"""The sync of a run, as its config says."""

from typing import Any

from pretrain.config import Config
from pretrain.config_sync import AllReduce, OuterSection, PowerSgd, Quantized
from pretrain.engine.world import World
from pretrain.engine.zero import ZeroEngine
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
    section, replicas = config.sync, engine.world.replicas
    if isinstance(section, OuterSection):
        assert members is not None
        return OuterSync(section, engine, members, parts)
    if replicas.size == 1:
        return ReplicaSync(engine.world)
    plain, start = AllReduceMean(AllReduce(), engine.shards, replicas), 0
    mean: GradientMean
    if isinstance(section, AllReduce):
        mean = AllReduceMean(section, engine.shards, replicas)
    else:
        assert isinstance(section, PowerSgd | Quantized)
        start = section.start.samples(config.data.sequence_length)
        if isinstance(section, PowerSgd):
            mean = PowerSgdMean(section, engine.shards, replicas, config.seed)
        else:
            mean = QuantizedMean(section, engine.shards, replicas)
    return GradientSync(engine, mean, plain, start, config.mesh.check_every)
