"""PowerSGD (Vogels et al., arXiv 1905.13727) on ZeRO's shards.

A shard holds stretches of matrices, not matrices. The whole rows of a stretch are a matrix too, and
are compressed as one; the ends of cut rows, like vectors and small matrices, go as they are.

Time is passes over memory. Tall and thin products are quick only if the thin factor lies along the
rows of the matrix, so Q is kept transposed, (rank, columns); blocks of a shape go as one batch.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.config_sync import PowerSgd
from pretrain.engine.world import World
from pretrain.optim.shards import Place, Shards
from pretrain.sync.mean import piece_elements

Span = tuple[int, int, int]  # number of a flat buffer, first element, length


@dataclass(frozen=True)
class Block:
    """Whole rows of a matrix, side by side in a flat buffer from `offset`."""

    name: str
    first_row: int
    rows: int
    columns: int
    rank: int
    buffer: int
    offset: int

    @property
    def key(self) -> str:
        """Its name among the factors."""
        return f"{self.name}/{self.first_row}-{self.rows}"


@dataclass(frozen=True)
class Batch:
    """Blocks of one shape that follow each other in a flat buffer, `stride` elements apart."""

    blocks: list[Block]
    stride: int

    @property
    def p_shape(self) -> tuple[int, int, int]:
        """Of their left factors."""
        return len(self.blocks), self.blocks[0].rows, self.blocks[0].rank

    @property
    def q_shape(self) -> tuple[int, int, int]:
        """Of their right factors, transposed."""
        return len(self.blocks), self.blocks[0].rank, self.blocks[0].columns

    def view(self, flats: list[Tensor]) -> Tensor:
        """Its matrices, (blocks, rows, columns), in tensors laid out like the masters."""
        first = self.blocks[0]
        flat = flats[first.buffer]
        return flat.as_strided(
            (len(self.blocks), first.rows, first.columns),
            (self.stride, first.columns, 1),
            flat.storage_offset() + first.offset,
        )


class PowerSgdMean:
    """The mean of rank-r approximations. What they miss is added to the next gradients.

    `factors` has the Q of each block, (rank, columns); without a warm start "calls" alone, int64 in
    host memory: how often Q was drawn, bad gradients included.
    """

    def __init__(self, section: PowerSgd, shards: Shards, replicas: World, seed: int) -> None:
        self._section, self._replicas, self._seed = section, replicas, seed
        self._batches, self._rest = _divide(shards.places, section)
        self._p_shapes = [batch.p_shape for batch in self._batches]
        self._q_shapes = [batch.q_shape for batch in self._batches]
        elements = _elements(self._p_shapes) + sum(length for *_, length in self._rest)
        self._q = torch.empty(_elements(self._q_shapes), device=replicas.device)
        self.sent_bytes = sum(
            2 * (replicas.size - 1) * 4 * message // replicas.size
            for message in (elements, self._q.numel())
        )
        self.errors: list[Tensor] = []
        if section.error_feedback:
            self.errors = [torch.zeros(len(m), device=replicas.device) for m in shards.masters]
        self._calls = torch.zeros((), dtype=torch.int64)
        self.factors = {"calls": self._calls}
        if section.warm_start:
            self._draw()
            factors = zip(self._batches, _views(self._q, self._q_shapes), strict=True)
            self.factors = {
                block.key: q for batch, qs in factors
                for block, q in zip(batch.blocks, qs, strict=True)
            }  # fmt: skip

    def average(self, gradients: list[Tensor]) -> None:
        """Their mean, in place, with two all-reduces."""
        matrices = [batch.view(gradients) for batch in self._batches]
        errors = [batch.view(self.errors) if self.errors else None for batch in self._batches]
        for matrix, error in zip(matrices, errors, strict=True):
            if error is not None:
                matrix.add_(error)
        if not self._section.warm_start:
            self._draw()
        rest = [gradients[buffer].narrow(0, first, length) for buffer, first, length in self._rest]
        ps, rest_means, finite = self._bases(matrices, rest)
        message = torch.empty_like(self._q)
        qs = _views(message, self._q_shapes)
        for matrix, p, q in zip(matrices, ps, qs, strict=True):
            torch.bmm(p.mT, matrix, out=q)
        self._replicas.sum(message).div_(self._replicas.size)
        finite &= message.isfinite().all()
        for matrix, error, p, q in zip(matrices, errors, ps, qs, strict=True):
            _decompress(matrix, error, p, q, finite)
        for flat, mean in zip(rest, rest_means, strict=True):
            flat.copy_(mean)
        if self._section.warm_start:
            for old, q in zip(_views(self._q, self._q_shapes), qs, strict=True):
                # From a zero, which a gradient of zeros leaves, no step would find anything.
                torch.where(finite & q.any(2, keepdim=True), q, old, out=old)

    def _bases(
        self, matrices: list[Tensor], rest: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Orthonormal columns (blocks, rows, rank) that span the mean of the matrices times Q, the
        mean of the `rest`, and whether all that was finite."""
        elements = _elements(self._p_shapes)
        message = torch.cat([self._q.new_empty(elements), *rest])
        ps = _views(message[:elements], self._p_shapes)
        for matrix, p, q in zip(matrices, ps, _views(self._q, self._q_shapes), strict=True):
            torch.bmm(matrix, q.mT, out=p)
        self._replicas.sum(message).div_(self._replicas.size)
        finite = message.isfinite().all()
        message[:elements].masked_fill_(~finite, 0.0)  # what LAPACK makes of NaN is its own affair
        bases = [torch.linalg.qr(p).Q for p in ps]
        return bases, list(message[elements:].split([len(flat) for flat in rest])), finite

    def _draw(self) -> None:
        """Gaussian Q, the same on all replicas however parameters are laid out."""
        for batch, qs in zip(self._batches, _views(self._q, self._q_shapes), strict=True):
            for block, q in zip(batch.blocks, qs, strict=True):
                text = f"{self._seed} {int(self._calls)} {block.first_row} {block.name}"
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest))
                q.copy_(torch.randn(q.shape, generator=generator))
        self._calls += 1


def _decompress(
    matrices: Tensor, errors: Tensor | None, p: Tensor, q: Tensor, finite: Tensor
) -> None:
    """Put P Q in place of matrices, and what it misses in place of their errors; where it is not
    finite, NaN, and the errors stay. Without a branch, which would wait for the device."""
    taken, result = q.masked_fill(~finite, 0.0), q.masked_fill(~finite, torch.nan)
    count, rows, columns = matrices.shape
    step = max(1, piece_elements(matrices.device) // (count * columns))
    for first in range(0, rows, step):
        span = (1, first, min(step, rows - first))
        part, p_part = matrices.narrow(*span), p.narrow(*span)
        if errors is not None:
            rest = errors.narrow(*span)
            torch.where(finite, part, rest, out=rest).baddbmm_(p_part, taken, alpha=-1)
        torch.bmm(p_part, result, out=part)


def _divide(places: list[Place], section: PowerSgd) -> tuple[list[Batch], list[Span]]:
    """What is compressed, and what goes as it is."""
    alike: dict[tuple[int, int, int], list[Block]] = defaultdict(list)
    rest: list[Span] = []
    for place in places:
        block = _block(place, section)
        end = place.offset + place.length
        if block is None:
            rest.append((place.buffer, place.offset, place.length))
            continue
        alike[block.buffer, block.rows, block.columns].append(block)
        after = block.offset + block.rows * block.columns
        for first, last in ((place.offset, block.offset), (after, end)):
            if first < last:
                rest.append((place.buffer, first, last - first))
    return [batch for blocks in alike.values() for batch in _batches(blocks)], rest


def _block(place: Place, section: PowerSgd) -> Block | None:
    """The whole rows of a fragment of a matrix, if that is worth it."""
    if len(place.shape) != 2:
        return None
    columns = place.shape[1]
    first = -(-place.start // columns)
    rows = (place.start + place.length) // columns - first
    rank = min(section.rank, rows, columns)
    if rows < 1 or (rows + columns) * rank * section.min_compression >= rows * columns:
        return None
    offset = place.offset + first * columns - place.start
    return Block(place.name, first, rows, columns, rank, place.buffer, offset)


def _batches(blocks: list[Block]) -> list[Batch]:
    """Blocks of one shape and buffer, in runs of the same distance."""
    blocks = sorted(blocks, key=lambda block: block.offset)
    distances = [after.offset - before.offset for before, after in pairwise(blocks)]
    batches, start = [], 0
    while start < len(blocks):
        stop, stride = start + 1, blocks[start].rows * blocks[start].columns
        if stop < len(blocks):
            stride = distances[start]
        while stop < len(blocks) and distances[stop - 1] == stride:
            stop += 1
        batches.append(Batch(blocks[start:stop], stride))
        start = stop
    return batches


def _elements(shapes: list[tuple[int, int, int]]) -> int:
    return sum(count * rows * columns for count, rows, columns in shapes)


def _views(flat: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Tensors of some shapes that lie end to end in `flat`."""
    parts = flat.split([_elements([shape]) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
