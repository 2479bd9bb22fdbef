"""Adafactor: Adam's second moment as a row and a column for each matrix, exact on shards.

Sums over rows and columns are taken of what each rank holds and added up in one all-reduce for all
parameters; the norms of weights and updates take a second, small one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.config_optim import Adafactor as AdafactorConfig
from pretrain.optim import rules
from pretrain.optim.base import ShardedOptimizer
from pretrain.optim.kernels import apply_to_all
from pretrain.optim.shards import Place, Shards

_HOST_BLOCK_ELEMENTS = 2**18  # a block stays in the cache
_DEVICE_BLOCK_ELEMENTS = 2**24  # bounds the temporaries


class Adafactor(ShardedOptimizer):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5) as torch.optim.Adafactor
    has it: the relative step is min(lr, 1 / sqrt t), the first epsilon bounds what is divided by.

    Parameters of more than two dimensions are stacks of matrices, as in torch. Every rank keeps the
    rows and columns of all parameters, which are few, so any other number of ranks finds them.
    """

    config: AdafactorConfig

    def __init__(self, shards: Shards, config: AdafactorConfig) -> None:
        super().__init__(shards, config)
        self._layout = _Layout(shards)
        self._moments: Tensor | None = None

    def update(self, groups: list[dict[str, Any]]) -> None:
        """Moments of all parameters, directions and their norms, then the step of each."""
        steps = groups[0]["steps"]
        share = steps**self.config.beta2_decay
        moments = self._advance(share)
        for master in self.shards.masters:
            self._direct_vectors(master, share)
            self._direct_matrices(master, moments)
        flats = {master: (master.detach(), master.grad) for master in self.shards.masters}
        squares = self.shards.square_norms(flats)
        weights, updates = (squares / self._layout.sizes).sqrt()
        excess = (updates / self.config.clip_threshold).clamp(min=1.0)
        sizes = weights.clamp(min=self.config.epsilons[1]) / excess
        for group in groups:
            rate = group["lr"]
            keep, relative = 1 - rate * group["weight_decay"], min(rate, steps**-0.5)
            for master in group["params"]:
                self._move(master, keep, (sizes * relative).to(master))

    def _advance(self, share: float) -> Tensor:
        """The rows and columns of all parameters, with this step's gradients in them."""
        layout, first = self._layout, self.shards.masters[0]
        if self._moments is None or any(name not in self.state for name in layout.spans):
            # They appear at the first step, and again if a snapshot has taken them away.
            self._moments = first.new_zeros(len(layout.divisors))
            for name, (row, column, end) in layout.spans.items():
                rows, columns = self._moments[row:column], self._moments[column:end]
                self.state[name] = {"row_var": rows, "col_var": columns}
        sums = torch.zeros_like(self._moments)
        for master in self.shards.masters:
            for _, blocks in layout.matrices[master]:
                for block in blocks:
                    squares = block.of(master.grad).square()
                    block.rows_of(sums).add_(squares.sum(1))
                    block.columns_of(sums).add_(squares.sum(0))
        total = self.shards.ranks.sum(sums.to(self.shards.ranks.device)).to(first.device)
        return self._moments.lerp_(total / layout.divisors, share)

    def _direct_vectors(self, master: Tensor, share: float) -> None:
        """g / sqrt v in place of the gradient of vectors, with a moment for each element."""
        if not self._layout.has_vectors[master]:
            return
        (variance,) = self.states_of(master, ("variance",))
        variance.lerp_(master.grad.square(), share)
        scale = variance.clamp(min=self.config.epsilons[0] ** 2).rsqrt_()
        for _, blocks in self._layout.matrices[master]:
            for block in blocks:  # a matrix among vectors has a moment for nothing
                block.of(scale).fill_(1.0)
        master.grad.mul_(scale)

    def _direct_matrices(self, master: Tensor, moments: Tensor) -> None:
        """g / sqrt(row x column / mean of the rows) in place of the gradient of matrices."""
        epsilon = self.config.epsilons[0]
        for rows, blocks in self._layout.matrices[master]:
            mean = moments[rows].mean().clamp(min=epsilon)
            for block in blocks:
                variance = torch.outer(block.rows_of(moments) / mean, block.columns_of(moments))
                block.of(master.grad).mul_(variance.clamp_(min=epsilon**2).rsqrt_())

    def _move(self, master: Tensor, keep: float, steps: Tensor) -> None:
        """p <- keep p - step u, with the step of each parameter; padding is left alone."""
        own = steps[self.shards.indices[master].to(steps.device)].unbind()
        views = (self.shards.views(master, flat) for flat in (master.detach(), master.grad))
        stretches = zip(*views, strict=True)
        jobs = [(stretch, (keep, step)) for stretch, step in zip(stretches, own, strict=True)]
        apply_to_all(rules.decay_and_subtract, jobs, (0,))


@dataclass(frozen=True)
class _Block:
    """A rectangle of a matrix that lies in one piece from `offset` of a flat buffer: whole rows, or
    a part of one. `row` and `column` are where its sums begin among the moments."""

    offset: int
    row: int
    rows: int
    column: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle in the buffer."""
        return flat.narrow(0, self.offset, self.rows * self.columns).view(self.rows, self.columns)

    def rows_of(self, moments: Tensor) -> Tensor:
        """Its rows among the moments."""
        return moments.narrow(0, self.row, self.rows)

    def columns_of(self, moments: Tensor) -> Tensor:
        """Its columns among the moments."""
        return moments.narrow(0, self.column, self.columns)


class _Layout:
    """Where the moments of each parameter lie in one flat tensor: rows, then columns.

    `spans` are by name (first row, first column, end), `divisors` what each sum is to be divided
    by for a mean, `sizes` the elements of each parameter by its number. `matrices` has for each
    master the matrices in it: all rows of each among the moments, and its blocks.
    """

    def __init__(self, shards: Shards) -> None:
        mine = [(place.name, tuple(place.shape), place.role) for place in shards.places]
        everyone = shards.ranks.gather(mine)
        found = {name: (shape, role) for pieces in everyone for name, shape, role in pieces}
        first, sizes = shards.masters[0], [1] * len(shards.numbers)
        self.spans: dict[str, tuple[int, int, int]] = {}
        divisors = []
        for name in sorted(found, key=shards.numbers.__getitem__):
            shape = torch.Size(found[name][0])
            sizes[shards.numbers[name]] = shape.numel()
            if len(shape) > 1:
                start = self.spans[name] = _span(shape, sum(map(len, divisors)))
                divisors += [first.new_full((start[1] - start[0],), shape[-1])]
                divisors += [first.new_full((start[2] - start[1],), shape[-2])]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=shards.ranks.device)
        self.divisors = torch.cat(divisors) if divisors else first.new_zeros(0)
        with_vectors = {role for shape, role in found.values() if len(shape) < 2}
        self.has_vectors = {
            master: role in with_vectors
            for master, role in zip(shards.masters, shards.roles, strict=True)
        }
        self.matrices = {
            master: [
                (rows, list(blocks))
                for place in places
                if len(place.shape) > 1
                for rows, blocks in _matrices(place, *self.spans[place.name][:2], master)
            ]
            for master, places in shards.buffers.items()
        }


def _span(shape: torch.Size, start: int) -> tuple[int, int, int]:
    """First row, first column and end of the moments of a parameter of `shape`."""
    column = start + shape[:-1].numel()
    return start, column, column + shape[:-2].numel() * shape[-1]


def _matrices(
    place: Place, first_row: int, first_column: int, master: Tensor
) -> Iterator[tuple[slice, Iterator[_Block]]]:
    """The matrices of a parameter that a fragment has elements of; see `_Layout`."""
    rows, columns = place.shape[-2:]
    size, end = rows * columns, place.start + place.length
    for matrix in range(place.start // size, -(-end // size)):
        low, high = max(place.start, matrix * size), min(end, (matrix + 1) * size)
        begin = first_row + matrix * rows
        blocks = _blocks(
            low, high, columns, place.offset - place.start, first_row,
            first_column + matrix * columns, master.device.type,
        )  # fmt: skip
        yield slice(begin, begin + rows), blocks


def _blocks(
    low: int, high: int, columns: int, shift: int, first_row: int, column: int, device: str
) -> Iterator[_Block]:
    """Elements [low, high) of a flattened parameter as rectangles: the rest of a row, whole rows
    in blocks that are not too large, the beginning of a row. An element lies in the buffer `shift`
    further on."""
    most = _HOST_BLOCK_ELEMENTS if device == "cpu" else _DEVICE_BLOCK_ELEMENTS
    while low < high:
        row, inside = divmod(low, columns)
        if inside or high - low < columns:
            rows, width = 1, min(columns - inside, high - low)
        else:
            rows, width = min((high - low) // columns, max(1, most // columns)), columns
        yield _Block(low + shift, first_row + row, rows, column + inside, width)
        low += rows * width
