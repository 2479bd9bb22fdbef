"""Are replicas that ought to be alike? BLOOM lost weeks to LayerNorms that drifted apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.engine.world import World
from pretrain.errors import UserError
from pretrain.optim.shards import Shards


class DriftError(UserError):
    """Replicas that ought to be alike differ."""


def compare_replicas(
    shard: World, replicas: World, shards: Shards, flats: Sequence[Tensor], step: int
) -> None:
    """Compare the checksum of each parameter over the replicas; collective.

    `flats` are laid out like the masters. DriftError names the parameters that differ, on all
    ranks: a checksum is the sum of the bits of all elements, as integers, so any change is seen.
    """
    if replicas.size == 1:
        return
    sums = torch.zeros(len(shards.numbers), dtype=torch.int64, device=shard.device)
    for place in shards.places:
        bits = flats[place.buffer].detach().narrow(0, place.offset, place.length).view(torch.int32)
        sums[shards.numbers[place.name]] += bits.sum(dtype=torch.int64).to(shard.device)
    everyone = replicas.collect(shard.sum(sums).to(replicas.device))
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
