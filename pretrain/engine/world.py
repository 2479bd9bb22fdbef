"""The processes of a run: who am I, which device is mine, how do we talk.

The environment tells (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), as set by torchrun,
deepspeed and accelerate alike; without it the run has one rank.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This rank's place in the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
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
        dist.all_to_all_single(incoming, outgoing, *lengths)
        for tensor, part in zip(receive, incoming.split(lengths[0]), strict=True):
            tensor.copy_(part)

    def gather(self, value: Any) -> list[Any]:
        """A small value of each rank, by rank; not for the hot path."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(timeout_seconds: int) -> Iterator[World]:
    """Join the process group, yield this rank's World, leave in order.

    Leaving matters: a process that exits with the group alive ends with code 250.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ["DS_ACCELERATOR"] = "cpu"
        _share_cores()
    store = dist.HashStore() if size == 1 else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds)
    )
    try:
        world = World(rank, size, device)
        yield world
        world.barrier()  # a rank that left early would tear connections down under the others
    finally:
        dist.destroy_process_group()


def _share_cores() -> None:
    """Give each rank of this machine its share of the cores, unless the launcher has decided."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    if "OMP_NUM_THREADS" not in os.environ and ranks_here > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here))
