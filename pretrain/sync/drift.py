"""Are replicas that ought to be alike? BLOOM lost weeks to LayerNorms that drifted apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.engine.world import World
from pretrain.errors import UserError
from pretrain.optim.shards import Shards


class DriftError(UserError):
    """Replicas that ought to be alike differ."""


def checksums(shard: World, shards: Shards, flats: Sequence[Tensor]) -> Tensor:
    """One of each parameter, int64: the sum of the bits of all its elements, as integers, so that
    any change is seen. `flats` are laid out like the masters. Collective over the shard group."""
    sums = torch.zeros(len(shards.numbers), dtype=torch.int64, device=shard.device)
    for place in shards.places:
        bits = flats[place.buffer].detach().narrow(0, place.offset, place.length).view(torch.int32)
        sums[shards.numbers[place.name]] += bits.sum(dtype=torch.int64).to(shard.device)
    return shard.sum(sums)


def compare_replicas(replicas: World, sums: Tensor, shards: Shards, step: int) -> None:
    """Compare the checksums of the replicas, collective over them. DriftError names the parameters
    that differ, on all ranks."""
    everyone = replicas.collect(sums.to(replicas.device))
    differ = (everyone != everyone[0]).any(0)
    if not differ.any():
        return
    names = [name for name, number in shards.numbers.items() if differ[number]]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise DriftError(
        f"step {step}: the {replicas.size} replicas differ in {shown}\n"
        "  rule: replicas begin alike and take the same steps, so their weights are the same bits\n"
        "  cure: go on from the newest checkpoint (replicas were compared before it was written); "
        "if it comes back, a device or the memory of a node is at fault: leave that node out"
    )
