"""The processes of a run: who am I, which device is mine, how do we talk.

The environment tells, as set by torchrun, deepspeed, accelerate or srun; without it the run has one
rank.

The ranks form a mesh of two axes, as in PyTorch's HSDP: consecutive ranks are a *shard group*, over
which ZeRO spreads one replica of the model; the ranks with the same place in every shard group hold
the same shard and are its *replicas*.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.heartbeat import Heartbeat, lost_rank_error
from pretrain.engine.meeting import meet
from pretrain.engine.placement import Placement, placement
from pretrain.errors import UserError


@dataclass(frozen=True)
class World:
    """Some ranks that talk, and the place of this one among them: a whole run, or one axis of its
    mesh. `group` is their process group, None that of all ranks; `device` is where it talks from.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None
    _shard: "World | None" = field(default=None, repr=False)
    _replicas: "World | None" = field(default=None, repr=False)

    @property
    def shard(self) -> "World":
        """The ranks that hold one replica together."""
        return self._shard or self

    @property
    def replicas(self) -> "World":
        """The ranks that hold the same shard, one in each replica."""
        return self._replicas or World(0, 1, self.device)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def exchange(self, send: list[torch.Tensor], receive: list[torch.Tensor]) -> None:
        """The 1-D tensor `send[r]` to each rank r; fill `receive` with what the ranks send.

        They may lie in host memory while the ranks talk between devices.
        """
        if self.size == 1:
            receive[0].copy_(send[0])
            return
        outgoing = torch.cat([tensor.to(self.device) for tensor in send])
        incoming = outgoing.new_empty(sum(tensor.numel() for tensor in receive))
        lengths = [[tensor.numel() for tensor in tensors] for tensors in (receive, send)]
        dist.all_to_all_single(incoming, outgoing, *lengths, group=self.group)
        for tensor, part in zip(receive, incoming.split(lengths[0]), strict=True):
            tensor.copy_(part)

    def transpose(self, tensor: torch.Tensor) -> torch.Tensor:
        """Row r of `tensor` (size, n) to rank r; what they send, in a tensor of the same shape."""
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor.contiguous(), group=self.group)
        return received

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make `tensor` that of the first rank, in place; it may lie elsewhere than ranks talk."""
        if self.size > 1:
            here = tensor.detach().to(self.device)
            dist.broadcast(here, group=self.group, group_src=0)
            tensor.detach().copy_(here)
        return tensor

    def collect(self, row: torch.Tensor) -> torch.Tensor:
        """The 1-D `row` of each rank, as a tensor (size, n)."""
        if self.size == 1:
            return row[None]
        rows = row.new_empty(self.size, row.numel())
        dist.all_gather_single(rows.view(-1), row.contiguous(), group=self.group)
        return rows

    def gather(self, value: Any) -> list[Any]:
        """A small value of each rank, by rank; not for the hot path."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)


def split_world(world: World, shard_ranks: int | None, on_host: bool = False) -> World:
    """`world` with its mesh: shard groups of `shard_ranks` consecutive ranks (None: one group).

    With `on_host` replicas talk from host memory, over gloo, whatever the devices. Collective.

    Raises UserError where the ranks cannot be dealt evenly.
    """
    shards = shard_ranks or world.size
    if world.size % shards:
        raise UserError(
            f"mesh.shard_ranks = {shards}: the run has {world.size} ranks\n"
            "  rule: shard groups are of equal size\n"
            f"  cure: a divisor of {world.size}, or start a multiple of {shards} ranks"
        )
    if shards == world.size:
        return world
    groups = [list(range(first, first + shards)) for first in range(0, world.size, shards)]
    lines = [list(range(place, world.size, shards)) for place in range(shards)]
    shard, _ = dist.new_subgroups_by_enumeration(groups)
    replicas, _ = dist.new_subgroups_by_enumeration(lines, backend="gloo" if on_host else None)
    device = torch.device("cpu") if on_host else world.device
    return replace(
        world,
        _shard=World(world.rank % shards, shards, world.device, shard),
        _replicas=World(world.rank // shards, len(groups), device, replicas),
    )


def rows_of_rank(batch_samples: int, world: World) -> tuple[int, int]:
    """[first, end) of the rows of a global batch that this rank works on: contiguous and even.

    The set of samples in a step does not depend on the number of ranks; only this split does.
    """
    first = batch_samples * world.rank // world.size
    return first, batch_samples * (world.rank + 1) // world.size


@contextmanager
def join_world(timeout_seconds: int) -> Iterator[World]:
    """Join the process group, yield this rank's World, leave in order. Where a collective fails for
    want of a rank, LostRankError names it.

    Leaving matters: a process that exits with the group alive ends with code 250.
    """
    place = placement()
    rank, size = place.rank, place.size
    # DeepSpeed and torch read them too, whoever has told us.
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.master[0], MASTER_PORT=str(place.master[1]),
    )  # fmt: skip
    if torch.cuda.is_available():
        device, backend = _own_gpu(place), "nccl"
        torch.cuda.set_device(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    else:
        device, backend, gpu = torch.device("cpu"), "gloo", None
        os.environ["DS_ACCELERATOR"] = "cpu"
        _share_cores(place.local_size)
    store = dist.HashStore() if size == 1 else meet(place, gpu)
    timeout = timedelta(seconds=timeout_seconds)
    # Groups made later, by DeepSpeed too, would wait torch's 30 minutes whatever was asked for.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    heartbeat = Heartbeat(rank, size) if size > 1 else None
    try:
        world = World(rank, size, device)
        yield world
        world.barrier()  # a rank that left early would tear connections down under the others
    except RuntimeError as failure:  # as collectives fail
        if heartbeat and (lost := lost_rank_error(heartbeat, failure)):
            raise lost from failure
        raise
    finally:
        if heartbeat:
            heartbeat.stop()
        dist.destroy_process_group()


def _own_gpu(place: Placement) -> torch.device:
    """The GPU of this rank: that of its number, or the only one that its launcher lets it see."""
    visible = torch.cuda.device_count()
    if visible > 1 and place.local_rank >= visible:
        raise UserError(
            f"{place.local_size} ranks on this host, {visible} GPUs\n"
            "  rule: a rank has a GPU of its own\n"
            f"  cure: --ranks-per-node {visible} (devices_per_node of the profile)"
        )
    return torch.device("cuda", 0 if visible == 1 else place.local_rank)


def _share_cores(ranks_here: int) -> None:
    """Give each rank of this machine its share of the cores, unless the launcher has decided."""
    if "OMP_NUM_THREADS" not in os.environ and ranks_here > 1:
        # torch heeds the cores that Slurm has given this rank alone.
        share = max(1, (os.cpu_count() or 1) // ranks_here)
        torch.set_num_threads(min(torch.get_num_threads(), share))
