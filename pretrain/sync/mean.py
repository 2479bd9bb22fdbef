"""The mean of gradients over replicas: what all methods have in common, the exact one, and the
exchange by which rounded numbers are averaged with one rounding each way.

A ring that adds up rounded numbers would round at every hop. Here replica r gets everybody's r-th
part, adds up in fp32 and sends the rounded mean to all: as many bytes, and the same bits for all.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from pretrain.config_sync import AllReduce
from pretrain.engine.world import World
from pretrain.optim.shards import Shards
from pretrain.wire import SCALE_BLOCK


def piece_elements(device: torch.device) -> int:
    """Numbers to take several steps on before the next: on a CPU they and what is computed of them
    stay in a core's cache, elsewhere temporaries only have to be small."""
    return 2**18 if device.type == "cpu" else 2**24


class GradientMean(Protocol):
    """Averages the gradients of the ranks that hold the same shard, one in each replica.

    `errors` is what this replica's next gradients are owed: fp32, laid out like the masters, empty
    for methods without any. `factors` is what else a method remembers, alike on all replicas. Both
    are there from the start, and are restored by writing to them. `sent_bytes` is what this rank
    sends to other replicas in a call.

    After a gradient that is not finite, on any replica, the result is not finite on all of them,
    and errors and factors are as before the call.
    """

    errors: list[Tensor]
    factors: dict[str, Tensor]
    sent_bytes: int

    def average(self, gradients: list[Tensor]) -> None:
        """Put in place of the gradients, fp32 and laid out like the masters, their mean or what
        comes close to it: the same bits on all replicas."""
        ...


class Codec(Protocol):
    """How blocks of SCALE_BLOCK numbers are written as bytes.

    `fields` are views of a message, (messages, blocks, width) each, and the last of them tells
    whether a block is finite; the other methods take those of some blocks of one message, and
    `values` fp32 of shape (blocks, SCALE_BLOCK).
    """

    block_bytes: int

    def fields(self, messages: Tensor) -> list[Tensor]:
        """The parts of `messages`, uint8 of shape (messages, blocks * block_bytes)."""
        ...

    def encode(self, values: Tensor, fields: list[Tensor], keep_rest: bool) -> None:
        """Write `values`; with `keep_rest` leave in their place what was lost by it."""
        ...

    def decode(self, fields: list[Tensor], values: Tensor) -> None:
        """Fill `values`."""
        ...

    def add(self, fields: list[Tensor], values: Tensor) -> None:
        """Add to `values`."""
        ...


class Bfloat16:
    """Numbers rounded to bf16."""

    block_bytes = 2 * SCALE_BLOCK

    def fields(self, messages: Tensor) -> list[Tensor]:
        """The numbers."""
        return [messages.view(torch.bfloat16).unflatten(1, (-1, SCALE_BLOCK))]

    def encode(self, values: Tensor, fields: list[Tensor], keep_rest: bool) -> None:
        """Round to nearest."""
        fields[0].copy_(values)
        if keep_rest:
            values.sub_(fields[0].float())

    def decode(self, fields: list[Tensor], values: Tensor) -> None:
        """Exact."""
        values.copy_(fields[0])

    def add(self, fields: list[Tensor], values: Tensor) -> None:
        """In fp32."""
        values.add_(fields[0].float())  # to add mixed types is slow


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of flat tensor number `flat`, which fill the blocks from
    `block` of message number `row`: either whole blocks, or less than one."""

    flat: int
    start: int
    length: int
    row: int
    block: int

    def cut(self, flats: list[Tensor]) -> Tensor:
        """Its elements."""
        return flats[self.flat].narrow(0, self.start, self.length)

    def part(self, fields: list[Tensor], row: int) -> list[Tensor]:
        """Its blocks in a message."""
        blocks = -(-self.length // SCALE_BLOCK)
        return [field[row].narrow(0, self.block, blocks) for field in fields]


class Exchange:
    """The mean over replicas of flat tensors of `lengths`, each cut in as many equal parts."""

    def __init__(self, lengths: list[int], replicas: World, codec: Codec) -> None:
        self._replicas, self._codec = replicas, codec
        most = piece_elements(replicas.device)
        self._pieces, blocks = _deal(lengths, replicas.size, most)
        self._message_bytes = blocks * codec.block_bytes
        self.sent_bytes = 2 * (replicas.size - 1) * self._message_bytes

    def average(self, flats: list[Tensor], errors: list[Tensor]) -> None:
        """Replace `flats` by their mean; `errors` laid out alike, if any, are added first and then
        replaced by what was lost: the mean of flats + errors stays what it was."""
        if not self._message_bytes:
            return
        codec, replicas = self._codec, self._replicas
        # Zeros: blocks that small tensors leave unused would else pass for numbers not finite.
        messages = torch.zeros(
            replicas.size, self._message_bytes, dtype=torch.uint8, device=flats[0].device
        )
        fields = codec.fields(messages)
        for piece in self._pieces:
            values = piece.cut(flats)
            if errors:
                values.add_(piece.cut(errors))
            self._encode(values, piece.part(fields, piece.row), bool(errors))
        self._mean(codec.fields(replicas.transpose(messages)), fields, flats if errors else [])
        # The mean goes to all as messages of their own: gloo gathers thrice as slowly.
        for row in set(range(replicas.size)) - {replicas.rank}:
            messages[row] = messages[replicas.rank]
        fields = codec.fields(replicas.transpose(messages))
        # All replicas look at the same numbers, so they agree; and no one waits for a device.
        finite = fields[-1].isfinite().all() if errors else None
        for piece in self._pieces:
            values = piece.cut(flats)
            if errors:
                error = piece.cut(errors)
                torch.where(finite, values, error, out=error)
            self._decode(piece.part(fields, piece.row), values)

    def _mean(self, received: list[Tensor], sent: list[Tensor], rests: list[Tensor]) -> None:
        """Write the mean of what this rank received in place of the message it sent to itself.
        What is lost by it is added to `rests`, where it counts once and the others' errors an n-th:
        n times."""
        size, own = self._replicas.size, self._replicas.rank
        for piece in self._pieces:
            if piece.row == own:
                part = piece.part(sent, own)
                total = torch.zeros(len(part[0]), SCALE_BLOCK, device=part[0].device)
                for row in range(size):
                    self._codec.add(piece.part(received, row), total)
                self._codec.encode(total.div_(size), part, bool(rests))
                if rests:
                    piece.cut(rests).add_(total.view(-1)[: piece.length], alpha=size)

    def _encode(self, values: Tensor, fields: list[Tensor], keep_rest: bool) -> None:
        if len(values) % SCALE_BLOCK == 0:
            self._codec.encode(values.view(-1, SCALE_BLOCK), fields, keep_rest)
        else:
            block = pad(values, (0, SCALE_BLOCK - len(values)))
            self._codec.encode(block[None], fields, keep_rest)
            values.copy_(block[: len(values)])

    def _decode(self, fields: list[Tensor], values: Tensor) -> None:
        if len(values) % SCALE_BLOCK == 0:
            self._codec.decode(fields, values.view(-1, SCALE_BLOCK))
        else:
            block = values.new_empty(SCALE_BLOCK)
            self._codec.decode(fields, block[None])
            values.copy_(block[: len(values)])


def _deal(lengths: list[int], rows: int, most: int) -> tuple[list[Piece], int]:
    """Where the elements of flat tensors lie in `rows` messages, in pieces of at most so many
    elements, whole blocks, and the blocks of a message."""
    pieces, block = [], 0
    for flat, length in enumerate(lengths):
        blocks = -(-length // (rows * SCALE_BLOCK))
        for row in range(rows):
            begin, end = (min(length, r * blocks * SCALE_BLOCK) for r in (row, row + 1))
            middle = end - (end - begin) % SCALE_BLOCK
            cuts = [*range(begin, middle, most), middle, end]
            pieces += [
                Piece(flat, first, last - first, row, block + (first - begin) // SCALE_BLOCK)
                for first, last in pairwise(cuts)
                if first < last
            ]
        block += blocks
    return pieces, block


class AllReduceMean:
    """The plain mean, exact or with numbers rounded to bf16 on the wire."""

    def __init__(self, section: AllReduce, shards: Shards, replicas: World) -> None:
        self.errors: list[Tensor] = []
        self.factors: dict[str, Tensor] = {}
        self._replicas, self._bucket = replicas, max(1, section.bucket // 4)
        lengths = [master.numel() for master in shards.masters]
        self._exchange: Exchange | None = None
        self.sent_bytes = 2 * (replicas.size - 1) * 4 * sum(lengths) // replicas.size
        if section.precision == "bf16":
            self._exchange = Exchange(lengths, replicas, Bfloat16())
            self.sent_bytes = self._exchange.sent_bytes

    def average(self, gradients: list[Tensor]) -> None:
        """Their mean, in place."""
        if self._replicas.size == 1:
            return
        if self._exchange:
            self._exchange.average(gradients, [])
            return
        buckets = [bucket for flat in gradients for bucket in flat.split(self._bucket)]
        works = [
            dist.all_reduce(bucket, group=self._replicas.group, async_op=True) for bucket in buckets
        ]
        for work, bucket in zip(works, buckets, strict=True):
            work.wait()
            bucket.div_(self._replicas.size)
