"""Which source a sample comes from: a pure function of its number, the weights and the seed.

Over a period of 2^20 samples every source appears exactly as often as its quantised weight says;
a period is cut into 1024 blocks of 1024 samples, each of which is a stratified sample of the
period, so the shares hold at every moment of the run and not only on average.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from pretrain.data.permutation import Permutation, derive_key

PERIOD = 2**20  # samples over which the counts of the sources are exact
BLOCK = 1024  # samples in which they are within 1 of exact
_BLOCKS = PERIOD // BLOCK


def quantise(weights: Sequence[float]) -> np.ndarray:
    """Samples of each source in a period, int64 [sources], summing to PERIOD.

    Largest remainders, in exact arithmetic; a weight above 0 gets at least one sample and a weight
    of 0 none. Raises ValueError if no weight is positive, one is negative, or there are too many.
    """
    exact_weights = [Fraction(weight) for weight in weights]
    positive = [k for k, weight in enumerate(exact_weights) if weight > 0]
    if not 1 <= len(positive) <= PERIOD or min(exact_weights) < 0:
        raise ValueError(f"weights must be at least 0, 1 to {PERIOD} of them above 0")
    total = sum(exact_weights)
    shares = [weight * PERIOD / total for weight in exact_weights]
    counts = [max(int(share), int(share > 0)) for share in shares]
    while (missing := PERIOD - sum(counts)) != 0:
        # Ties go to the source that stands first. Raising the tiny ones may have spent too much;
        # then it is taken back where the count exceeds the share least harmfully.
        if missing > 0:
            counts[max(positive, key=lambda k: shares[k] - counts[k])] += 1
        else:
            candidates = [k for k in positive if counts[k] > 1]
            counts[min(candidates, key=lambda k: shares[k] - counts[k])] -= 1
    return np.array(counts, np.int64)


class Mixture:
    """The sources of all samples of a run in which the weights may change at given samples.

    `stages` are (first sample, counts of `quantise`) in order, the first beginning at sample 0.
    The samples of one source are numbered 0, 1, 2, ... in the order in which they come, across
    stages, so a source is read to the end of an epoch before anything in it is read again.
    """

    def __init__(self, stages: Sequence[tuple[int, np.ndarray]], seed: int) -> None:
        firsts = [first for first, _ in stages]
        if firsts[0] != 0 or any(b <= a for a, b in pairwise(firsts)):
            raise ValueError(f"stages begin at samples {firsts}; they must rise from 0")
        self._stages: list[_Stage] = []
        taken = np.zeros_like(stages[0][1])
        for k, (first, counts) in enumerate(stages):
            stage = _Stage(first, taken, counts, seed)
            self._stages.append(stage)
            if k + 1 < len(stages):
                taken = taken + stage.taken(firsts[k + 1] - first)
        self._ends = [*firsts[1:], 2**63]

    def place(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source) of samples [first, first + count), int64 [count]."""
        if first < 0 or count < 0:
            raise ValueError(f"samples [{first}, {first} + {count}): numbers start at 0")
        sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        at = first
        for stage, end in zip(self._stages, self._ends, strict=True):
            while at < min(first + count, end):
                block, begin = divmod(at - stage.first, BLOCK)
                stop = min((block + 1) * BLOCK, first + count - stage.first, end - stage.first)
                rows = slice(at - first, stage.first + stop - first)
                part = slice(begin, stop - block * BLOCK)
                block_sources, block_numbers = stage.block(block)
                sources[rows], numbers[rows] = block_sources[part], block_numbers[part]
                at = stage.first + stop
        return sources, numbers

    def taken(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source gives, int64 [sources]."""
        stage = max((s for s in self._stages if s.first <= samples), key=lambda s: s.first)
        return stage.before + stage.taken(samples - stage.first)


class _Stage:
    """Samples from `first` on under one set of counts; `before`: what was taken until then."""

    def __init__(self, first: int, before: np.ndarray, counts: np.ndarray, seed: int) -> None:
        self.first, self.before, self._counts, self._seed = first, before, counts, seed
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._period: tuple[int, np.ndarray, np.ndarray] = (-1, before, before)
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, before, before)

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source) of the samples of a block; the last one is kept."""
        found, sources, numbers = self._block
        if found != block:
            sources, within = self._sources(block)
            numbers = self.before[sources] + self._taken_before(block)[sources] + within
            self._block = block, sources, numbers
        return sources, numbers

    def taken(self, samples: int) -> np.ndarray:
        block, rest = divmod(samples, BLOCK)
        part = np.bincount(self._sources(block)[0][:rest], minlength=len(self._counts))
        return self._taken_before(block) + part

    def _sources(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of the same source stand before it in the block) for one block."""
        phases, _ = self._of_period(block // _BLOCKS)
        order = Permutation(BLOCK, derive_key(self._seed, "order", block))(np.arange(BLOCK))
        # Ranks of one block are a comb over the period, spaced evenly; the phases of the blocks
        # interleave the combs so that each rank of the period is used once.
        ranks = order * _BLOCKS + phases[block % _BLOCKS]
        sources = np.searchsorted(self._ends, ranks, side="right")
        by_source = np.argsort(sources, kind="stable")
        group_starts = np.searchsorted(sources[by_source], sources[by_source])
        within = np.empty_like(sources)
        within[by_source] = np.arange(BLOCK) - group_starts
        return sources, within

    def _taken_before(self, block: int) -> np.ndarray:
        period, index = divmod(block, _BLOCKS)
        return period * self._counts + self._of_period(period)[1][index]

    def _of_period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """(phase of each block, samples of each source before each block [1024, sources])."""
        found, phases, before = self._period
        if found != period:
            key = derive_key(self._seed, "phase", period)
            phases = Permutation(_BLOCKS, key)(np.arange(_BLOCKS))
            # How many of phase, phase + 1024, ... lie below each border between sources.
            below_ends = -((phases[:, None] - self._ends) // _BLOCKS)
            below_starts = -((phases[:, None] - self._starts) // _BLOCKS)
            in_block = below_ends - below_starts
            before = np.cumsum(in_block, axis=0) - in_block
            self._period = period, phases, before
        return phases, before
