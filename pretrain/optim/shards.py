"""Where the parameters of a model lie among the ranks: what an optimizer has to know of ZeRO.

Masters are a few flat fp32 buffers a rank. Element-wise optimizers step these as they are; others
find in `places` which parameter each stretch belongs to, and talk to the ranks that hold the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.optim.groups import Matrices


class Ranks(Protocol):
    """The ranks that hold a replica together."""

    rank: int
    size: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        ...

    def exchange(self, send: list[Tensor], receive: list[Tensor]) -> None:
        """The 1-D tensor `send[r]` to each rank r; fill `receive` with what the ranks send."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A small value of each rank, by rank; not for the hot path."""
        ...


@dataclass(frozen=True)
class Place:
    """A fragment: elements [start, start + length) of a flattened parameter, which lie from
    `offset` in the flat buffer number `buffer` of this rank."""

    name: str
    shape: torch.Size
    role: str
    start: int
    length: int
    buffer: int
    offset: int


class Shards:
    """The masters of this rank and what they are.

    `names` are those of all parameters, the same on all ranks; `roles` tells the role of each flat
    buffer (one holds a single role); `matrices` how fused parameters split.
    """

    def __init__(
        self,
        masters: list[Tensor],
        roles: list[str],
        places: list[Place],
        names: Sequence[str],
        ranks: Ranks,
        matrices: dict[str, Matrices],
    ) -> None:
        self.masters, self.roles, self.places, self.ranks = masters, roles, places, ranks
        self.numbers = {name: number for number, name in enumerate(names)}
        self.matrices = matrices

    def groups(self) -> list[dict[str, object]]:
        """One parameter group for each role."""
        groups: dict[str, list[Tensor]] = {}
        for master, role in zip(self.masters, self.roles, strict=True):
            groups.setdefault(role, []).append(master)
        return [{"role": role, "params": masters} for role, masters in groups.items()]

    @cached_property
    def buffers(self) -> dict[Tensor, list[Place]]:
        """The places in each master, in their order."""
        found: dict[Tensor, list[Place]] = {master: [] for master in self.masters}
        for place in self.places:
            found[self.masters[place.buffer]].append(place)
        return found

    def views(self, master: Tensor, flat: Tensor) -> list[Tensor]:
        """The stretches of `flat`, laid out like `master`, that belong to its places."""
        return [flat.narrow(0, place.offset, place.length) for place in self.buffers[master]]

    def square_norms(self, flats: dict[Tensor, Sequence[Tensor]]) -> Tensor:
        """Squared L2 norms of whole parameters, exact whatever the shards.

        `flats` has for some masters the same number k > 0 of flat tensors laid out like them.
        Returns float64 of shape (k, parameters), 0 where a parameter is in none, by one all-reduce.
        """
        found = {
            master: torch.stack(
                [torch.stack(torch._foreach_norm(self.views(master, flat))) for flat in tensors], 1
            ).double().square()
            for master, tensors in flats.items()
            if self.buffers[master]
        }  # fmt: skip
        return self.total(found, len(next(iter(flats.values()))))

    def total(self, found: dict[Tensor, Tensor], kinds: int) -> Tensor:
        """Sums over fragments and ranks, by one all-reduce: `found` has for some masters a number
        of each kind for each of its fragments, (fragments, kinds). Returns float64 of shape (kinds,
        parameters)."""
        sums = torch.zeros(kinds, len(self.numbers), dtype=torch.float64, device=self.ranks.device)
        for master, numbers in found.items():
            # A parameter lies in a buffer once, so this is a plain, deterministic write.
            sums[:, self.indices[master]] += numbers.to(sums).T
        return self.ranks.sum(sums)

    @cached_property
    def indices(self) -> dict[Tensor, Tensor]:
        """The numbers of the parameters whose places are in each master."""
        return {
            master: torch.tensor(
                [self.numbers[place.name] for place in places], device=self.ranks.device
            )
            for master, places in self.buffers.items()
        }
