"""How DeepSpeed is set up: its config derived from ours, its engine confined to the shard group."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.config import Engine as EngineConfig
from pretrain.deepspeed_settings import deepspeed_settings
from pretrain.engine.world import World


def sharded_construction(config: EngineConfig, world: World) -> AbstractContextManager[Any]:
    """Under ZeRO 3, modules built in this context are sharded as they are built, so that no rank
    ever holds the whole model. The weights are those of the shard group's first rank."""
    if config.zero_stage < 3 or world.shard.size == 1:
        return nullcontext()
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed()
    return deepspeed.zero.Init(
        config_dict_or_path=deepspeed_settings(config), data_parallel_group=world.shard.group
    )


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig, world: World
) -> Any:
    """DeepSpeed's engine for `model` over the shard group of `world`, with nothing compiled at run
    time and quiet logs."""
    deepspeed = _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
    from deepspeed.utils import groups

    class Engine(DeepSpeedEngine):
        """Takes the ZeRO wrapper for stage 1 with bf16 too.

        There DeepSpeed would choose BF16_Optimizer, which all-reduces whole gradients and keeps
        them elsewhere than the other stages; the ZeRO wrapper does the same arithmetic.
        """

        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
            return ZERO_OPTIMIZATION

        def __del__(self) -> None:
            """DeepSpeed's own would touch modules that are gone at interpreter exit."""

    deepspeed.init_distributed()  # adopts the process group that join_world made
    groups.mpu = None  # of an earlier engine of this process
    mpu = None if world.shard is world else _ShardGroup(world.shard)
    settings = deepspeed_settings(config)
    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
        mpu=mpu,
    )


class _ShardGroup:
    """A shard group as DeepSpeed asks for it: a model-parallel unit whose data-parallel ranks are
    those of the group, each being a model-parallel group of its own."""

    def __init__(self, shard: World) -> None:
        self._shard = shard
        alone = [[rank] for rank in range(dist.get_world_size())]
        self._alone, _ = dist.new_subgroups_by_enumeration(alone)

    def get_data_parallel_rank(self) -> int:
        return self._shard.rank

    def get_data_parallel_world_size(self) -> int:
        return self._shard.size

    def get_data_parallel_group(self) -> Any:
        return self._shard.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._shard.group)

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> Any:
        return self._alone


def _import_deepspeed() -> Any:
    """Import DeepSpeed with its shared-memory collective switched off.

    It would be compiled at the first use; killed while compiling, it leaves a lock file on which
    every later run of the machine waits for ever.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    return deepspeed
