"""The outer weights of DiLoCo (arXiv 2311.08105; streamed: 2501.18512) and of local SGD: what the
replicas agree on, moved by the mean of the differences that their own steps made."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Stretch = tuple[int, int, int]  # number of a flat buffer, first element, length

_STAGE_ELEMENTS = 2**24  # of page-locked memory


class OuterWeights:
    """Outer weights and the momentum of the outer step, in host memory, laid out like the masters.

    They are cut into `parts` of equal size, whatever the parameters' borders: the outer step is
    element by element.
    """

    def __init__(
        self, masters: Sequence[Tensor], rate: float, momentum: float, parts: int = 1
    ) -> None:
        self._rate, self._factor = rate, momentum
        self.weights = [
            _to_host(master, torch.empty(master.shape, dtype=master.dtype)) for master in masters
        ]
        self.momentum = [torch.zeros_like(flat) for flat in self.weights] if momentum else []
        self.parts = _cut([flat.numel() for flat in self.weights], parts)

    def difference(self, part: int, trained: Sequence[Tensor]) -> Tensor:
        """The outer gradient of a part: outer weights less `trained` ones, 1-D, in host memory."""
        values = self.taken(part, trained)
        for (buffer, *span), piece in self._pieces(part, values):
            torch.sub(self.weights[buffer].narrow(0, *span), piece, out=piece)
        return values

    def taken(self, part: int, flats: Sequence[Tensor]) -> Tensor:
        """A part of some flats, 1-D, in host memory."""
        length = sum(length for *_, length in self.parts[part])
        values = torch.empty(length, dtype=flats[0].dtype if flats else None)
        for (buffer, *span), piece in self._pieces(part, values):
            _to_host(flats[buffer].narrow(0, *span), piece)
        return values

    def _pieces(self, part: int, values: Tensor) -> Iterator[tuple[Stretch, Tensor]]:
        """The stretches of a part, each with what `values`, as `taken`, has of it."""
        pieces = values.split([length for *_, length in self.parts[part]])
        return zip(self.parts[part], pieces, strict=True)

    def place(self, part: int, values: Tensor, flats: Sequence[Tensor]) -> None:
        """Write to a part of some flats what `taken` would take from them."""
        pieces = values.split([length for *_, length in self.parts[part]])
        for (buffer, *span), piece in zip(self.parts[part], pieces, strict=True):
            flats[buffer].narrow(0, *span).copy_(piece)

    def advance(self, part: int, gradient: Tensor) -> None:
        """An outer step of a part with the mean outer gradient: SGD with Nesterov's momentum as
        torch.optim.SGD has it, so the first moves by rate (1 + momentum) times the gradient."""
        lengths = [length for *_, length in self.parts[part]]
        for (buffer, first, length), piece in zip(
            self.parts[part], gradient.split(lengths), strict=True
        ):
            weights = self.weights[buffer].narrow(0, first, length)
            weights.sub_(piece, alpha=self._rate)
            if self.momentum:
                momentum = self.momentum[buffer].narrow(0, first, length)
                momentum.mul_(self._factor).add_(piece)
                weights.sub_(momentum, alpha=self._rate * self._factor)

    def blend(self, part: int, trained: Sequence[Tensor], mix: float) -> None:
        """Take a part of the outer weights up into `trained`, which keep a weight of `mix`."""
        for buffer, first, length in self.parts[part]:
            target = trained[buffer].detach().narrow(0, first, length)
            outer = self.weights[buffer].narrow(0, first, length)
            if mix:
                target.mul_(mix).add_(outer.to(target.device), alpha=1 - mix)
            else:
                target.copy_(outer)

    def shift(self, part: int, exported: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
        """Move flats as far as it is from `exported` to the outer weights, in a part."""
        for buffer, first, length in self.parts[part]:
            span = (0, first, length)
            outer = self.weights[buffer].narrow(*span)
            target, source = moved[buffer].detach().narrow(*span), exported[buffer].narrow(*span)
            target.add_(outer.to(target.device) - source)


def _to_host(source: Tensor, target: Tensor) -> Tensor:
    """Copy to `target`, in host memory; from a device through page-locked memory, which is many
    times as fast as straight to pages that can move."""
    if not source.is_cuda:
        return target.copy_(source.detach())
    stage = torch.empty(min(_STAGE_ELEMENTS, len(source)), dtype=source.dtype, pin_memory=True)
    for whole, part in zip(
        target.split(_STAGE_ELEMENTS), source.detach().split(_STAGE_ELEMENTS), strict=True
    ):
        whole.copy_(stage[: len(part)].copy_(part))
    return target


def _cut(lengths: Sequence[int], parts: int) -> list[list[Stretch]]:
    """Equal parts of buffers of some lengths, laid end to end."""
    total = sum(lengths)
    cut: list[list[Stretch]] = []
    for part in range(parts):
        begin, end, offset = total * part // parts, total * (part + 1) // parts, 0
        stretches = []
        for buffer, length in enumerate(lengths):
            first, last = max(begin - offset, 0), min(end - offset, length)
            if first < last:
                stretches.append((buffer, first, last - first))
            offset += length
        cut.append(stretches)
    return cut
