"""Which source a sample comes from: a pure function of its number, the weights and the seed.

Over a period of 2^20 samples every source appears exactly as often as its quantised weight says;
a period is cut into 1024 blocks of 1024 samples, each of which is a stratified sample of the
period, so the shares hold at every moment of the run and not only on average.
"""

from collections.abc import Sequence
from fractions import Fraction

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


def place(first: int, count: int, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, number within that source's endless stream) of samples [first, first + count).

    `counts` are those of `quantise`; both results are int64 [count]. The numbers of one source run
    over 0, 1, 2, ... without gap or repetition, in a shuffled order inside each period.
    """
    if first < 0 or count < 0:
        raise ValueError(f"samples [{first}, {first} + {count}): numbers start at 0")
    ends = np.cumsum(counts)
    starts = ends - counts
    sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
    at = first
    while at < first + count:
        block, stop = at // BLOCK, min((at // BLOCK + 1) * BLOCK, first + count)
        period = block // _BLOCKS
        phase = Permutation(_BLOCKS, derive_key(seed, "phase", period))(block % _BLOCKS)
        order = Permutation(BLOCK, derive_key(seed, "order", block))
        # Ranks of one block are a comb over the period, spaced evenly; the phases of the blocks
        # interleave the combs so that each rank of the period is used once.
        rank = order(np.arange(at, stop) - block * BLOCK) * _BLOCKS + phase
        source = np.searchsorted(ends, rank, side="right")
        rows = slice(at - first, stop - first)
        sources[rows] = source
        numbers[rows] = period * counts[source] + rank - starts[source]
        at = stop
    return sources, numbers
