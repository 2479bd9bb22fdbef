"""Gradients of 8 or 4 bits: the block-wise symmetric quantisation of ZeRO++ (arXiv 2306.10209) and
QLoRA's kin, with error feedback (arXiv 1901.09847) for both roundings of an exchange.

Passes of torch over pieces that stay in the cache are quicker than a loop that numba compiles.
"""

import torch
from torch import Tensor

from pretrain.config_sync import Quantized
from pretrain.engine.world import World
from pretrain.optim.shards import Shards
from pretrain.sync.mean import Exchange
from pretrain.wire import SCALE_BLOCK

_HALF = SCALE_BLOCK // 2
_LEAST = 1e-36  # blocks of smaller numbers count as zeros: their reciprocals would be infinite


class Levels:
    """Whole numbers of -127..127 (8 bits) or -7..7 (4 bits, two in a byte) and for each block the
    fp32 size of a step. Rounds to nearest, ties to even. A block with a number that is not finite
    has a step that is not, and so have all of its numbers."""

    def __init__(self, bits: int) -> None:
        self._bits, self._top = bits, 2 ** (bits - 1) - 1
        self._code_bytes = SCALE_BLOCK * bits // 8
        self.block_bytes = self._code_bytes + 4

    def fields(self, messages: Tensor) -> list[Tensor]:
        """Codes, int8 of width `bits` * SCALE_BLOCK / 8, and behind them all the steps, fp32."""
        end = messages.shape[1] // self.block_bytes * self._code_bytes
        codes = messages[:, :end].view(torch.int8).unflatten(1, (-1, self._code_bytes))
        return [codes, messages[:, end:].view(torch.float32).unsqueeze(2)]

    def encode(self, values: Tensor, fields: list[Tensor], keep_rest: bool) -> None:
        """Quantise; with `keep_rest` leave the rounding errors."""
        codes, steps = fields
        # Several times quicker than a norm, and without a copy of absolute values.
        largest = torch.maximum(values.amax(1, keepdim=True), values.amin(1, keepdim=True).neg_())
        steps.copy_(largest / self._top)
        rounded = (values * torch.where(largest > _LEAST, self._top / largest, 0.0)).round_()
        if self._bits == 8:
            codes.copy_(rounded)
        else:
            low, high = rounded.to(torch.int8).split(_HALF, 1)
            torch.bitwise_or(low.bitwise_and_(15), high.bitwise_left_shift_(4), out=codes)
        if keep_rest:
            values.addcmul_(rounded, steps, value=-1)

    def decode(self, fields: list[Tensor], values: Tensor) -> None:
        """Codes times steps."""
        codes, steps = fields
        for part, half in self._halves(codes, values):
            torch.mul(part, steps, out=half)

    def add(self, fields: list[Tensor], values: Tensor) -> None:
        """In fp32."""
        codes, steps = fields
        for part, half in self._halves(codes, values):
            half.addcmul_(part.float(), steps)

    def _halves(self, codes: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Codes, one in a byte, and the part of the values that they stand for."""
        if self._bits == 8:
            return [(codes, values)]
        low, high = values.split(_HALF, 1)
        # Shifts of signed numbers bring the sign along.
        return [(codes.bitwise_left_shift(4).bitwise_right_shift_(4), low),
                (codes.bitwise_right_shift(4), high)]  # fmt: skip


class QuantizedMean:
    """The mean of quantised gradients. What both roundings lose is added to the next gradients."""

    def __init__(self, section: Quantized, shards: Shards, replicas: World) -> None:
        lengths = [master.numel() for master in shards.masters]
        self._exchange = Exchange(lengths, replicas, Levels(section.bits))
        self.sent_bytes = self._exchange.sent_bytes
        self.factors: dict[str, Tensor] = {}
        self.errors: list[Tensor] = []
        if section.error_feedback:
            self.errors = [torch.zeros(length, device=replicas.device) for length in lengths]

    def average(self, gradients: list[Tensor]) -> None:
        """Their mean, in place, with two collectives."""
        self._exchange.average(gradients, self.errors)


def quantized_mean(flat: Tensor, replicas: World, bits: int) -> Tensor:
    """The mean over replicas of 1-D fp32 tensors of one length, without error feedback."""
    mean = flat.clone()
    Exchange([len(flat)], replicas, Levels(bits)).average([mean], [])
    return mean
