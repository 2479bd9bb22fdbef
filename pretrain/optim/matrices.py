"""Whole matrices for optimizers that need them: each goes to one rank, its owner, and back."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pretrain.optim.groups import Matrices
from pretrain.optim.shards import Shards

# What an owner does with a parameter's matrix: (name, matrix, number among those fused) -> update.
OnMatrix = Callable[[str, Tensor, int], Tensor]


class WholeMatrices:
    """The parameters of some roles, dealt evenly among the ranks.

    They travel in rounds, one parameter a rank, so a rank holds one whole parameter at a time
    besides its shards. Set-up is collective.
    """

    def __init__(self, shards: Shards, roles: Iterable[str], split_fused: bool) -> None:
        self._shards, self._split = shards, split_fused
        self._places = {p.name: p for p in shards.places if p.role in set(roles)}
        mine = [(p.name, tuple(p.shape), p.start, p.length) for p in self._places.values()]
        everyone = shards.ranks.gather(mine)
        self._shapes: dict[str, torch.Size] = {}
        # By parameter: the (start, length) of each rank.
        self._parts: dict[str, dict[int, tuple[int, int]]] = {}
        for rank, pieces in enumerate(everyone):
            for name, shape, start, length in pieces:
                self._shapes[name] = torch.Size(shape)
                self._parts.setdefault(name, {})[rank] = (start, length)
        self._rounds = self._deal()

    def _deal(self) -> list[list[str | None]]:
        """The parameter of each rank in each round: the largest first, to whom has least to do."""
        size = self._shards.ranks.size
        work, dealt = [0] * size, [[] for _ in range(size)]  # type: ignore[var-annotated]
        order = sorted(self._shapes, key=lambda n: (-_work(self._shapes[n]), n))
        for name in order:
            rank = work.index(min(work))
            work[rank] += _work(self._shapes[name])
            dealt[rank].append(name)
        rounds = max(map(len, dealt), default=0)
        return [[names[i] if i < len(names) else None for names in dealt] for i in range(rounds)]

    def replace(self, flats: dict[Tensor, Tensor], on_matrix: OnMatrix) -> None:
        """Replace each matrix in `flats` (by master, laid out like it) with what `on_matrix` makes
        of it; collective."""
        ranks = self._shards.ranks
        for names in self._rounds:
            mine = names[ranks.rank]
            whole = torch.empty(self._shapes[mine].numel() if mine else 0, device=ranks.device)
            own = [self._stretch(name, flats) for name in names]
            parts = [self._part(mine, rank, whole) for rank in range(ranks.size)]
            ranks.exchange(own, parts)
            if mine:
                shape = self._shapes[mine]
                whole.copy_(self._on_parameter(mine, whole.view(shape), on_matrix).flatten())
            ranks.exchange(parts, own)

    def _on_parameter(self, name: str, whole: Tensor, on_matrix: OnMatrix) -> Tensor:
        plain = Matrices()
        matrices = self._shards.matrices.get(name, plain) if self._split else plain
        split = matrices.split(whole)
        return matrices.join([on_matrix(name, m, i) for i, m in enumerate(split)], whole.shape)

    def _stretch(self, name: str | None, flats: dict[Tensor, Tensor]) -> Tensor:
        """This rank's fragment of a parameter, empty where it has none."""
        place = self._places.get(name) if name else None
        if place is None:
            return torch.empty(0, device=self._shards.ranks.device)
        flat = flats[self._shards.masters[place.buffer]]
        return flat.narrow(0, place.offset, place.length)

    def _part(self, name: str | None, rank: int, whole: Tensor) -> Tensor:
        """The stretch of this rank's whole parameter whose fragment a rank has."""
        start, length = self._parts[name].get(rank, (0, 0)) if name else (0, 0)
        return whole.narrow(0, start, length)


def _work(shape: torch.Size) -> int:
    """Multiplications of an orthogonalisation, up to a factor."""
    rows, columns = sorted((shape[0], shape[1:].numel()))
    return rows * rows * columns
