"""What a step did to each parameter: norms, ratios and the distribution of its weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.optim.shards import Shards

HISTOGRAM_BINS = 64
HISTOGRAM_RMS = 4.0  # bins reach to this many times the weights' root mean square, the last beyond


@dataclass(frozen=True)
class ParameterStatistics:
    """One entry for each parameter of the model, the same on all ranks."""

    names: list[str]
    weight_norm: list[float]  # L2, after the step
    weight_rms: list[float]
    gradient_norm: list[float]  # of the gradient as applied, clipping included
    update_ratio: list[float]  # L2 norm of the change over that of the weights
    trust_ratio: list[float] | None  # of layer-wise optimizers
    histogram: list[list[int]]  # weights in HISTOGRAM_BINS bins over +-HISTOGRAM_RMS x RMS


class Measurement:
    """Measures one step: made before it, with the gradients in place; collective."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        flats = {m: (m.grad,) for m in shards.masters if m.grad is not None}
        self._gradients = shards.square_norms(flats)[0].sqrt()
        self._before = [master.detach().clone() for master in shards.masters]

    @torch.no_grad()
    def finish(self, ratios: Tensor | None) -> ParameterStatistics:
        """To be called after the step; collective."""
        shards = self._shards
        flats = {
            master: (master, before.sub_(master))
            for master, before in zip(shards.masters, self._before, strict=True)
        }
        weights, changes = shards.square_norms(flats).sqrt()
        sizes = shards.ranks.sum(self._sizes())
        rms = weights / sizes.sqrt()
        trust = None
        if ratios is not None:
            # Each rank knows the ratios of what it holds.
            held = self._held()
            trust = shards.ranks.sum(torch.where(held > 0, ratios, 0.0)) / shards.ranks.sum(held)
        return ParameterStatistics(
            list(shards.numbers),
            weights.tolist(),
            rms.tolist(),
            self._gradients.tolist(),
            (changes / weights.clamp(min=1e-30)).tolist(),
            None if trust is None else trust.tolist(),
            self._histogram(rms).tolist(),
        )

    def _sizes(self) -> Tensor:
        sizes = torch.zeros(len(self._shards.numbers), dtype=torch.float64)
        for place in self._shards.places:
            sizes[self._shards.numbers[place.name]] += place.length
        return sizes.to(self._shards.ranks.device)

    def _held(self) -> Tensor:
        return (self._sizes() > 0).double()

    def _histogram(self, rms: Tensor) -> Tensor:
        shards, widths = self._shards, (rms * HISTOGRAM_RMS).tolist()
        counts = torch.zeros(len(widths), HISTOGRAM_BINS, dtype=torch.float64)
        for place in shards.places:
            number = shards.numbers[place.name]
            width = widths[number] or 1.0
            master = shards.masters[place.buffer].detach()
            weights = master.narrow(0, place.offset, place.length).clamp(-width, width)
            counts[number] += torch.histc(weights, HISTOGRAM_BINS, -width, width).cpu()
        return shards.ranks.sum(counts.to(shards.ranks.device)).round().long()
