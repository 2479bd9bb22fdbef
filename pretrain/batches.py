"""Batch schedules: how many samples a step takes, as a table of thresholds in samples.

The batch of a step follows from the samples consumed before it. A table has one row a batch size,
so step, samples and tokens convert into each other by a bisection, whatever the length of the run.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BatchSchedule:
    """`edges` are (samples, batch): a step that begins at or after `samples` takes `batch`.

    The first edge is at 0; they ascend.
    """

    edges: tuple[tuple[int, int], ...]

    def __call__(self, samples: int) -> int:
        """Samples of the step that begins after `samples` samples."""
        return self.edges[bisect_right(self.edges, samples, key=lambda edge: edge[0]) - 1][1]

    @property
    def final(self) -> int:
        """The batch that it ends with."""
        return self.edges[-1][1]

    @cached_property
    def stages(self) -> list[tuple[int, int, int]]:
        """(first step, samples consumed before it, batch) of each batch that occurs, in order."""
        rows, step, samples = [], 0, 0
        for (_, batch), (edge, _) in zip(self.edges, self.edges[1:], strict=False):
            # A large batch may step over an edge altogether: that row does not occur.
            if edge > samples:
                rows.append((step, samples, batch))
                steps = -(-(edge - samples) // batch)
                step, samples = step + steps, samples + steps * batch
        return [*rows, (step, samples, self.final)]

    def samples_at(self, step: int) -> int:
        """Samples consumed before step `step` (counted from 0)."""
        row = bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1
        first_step, first_samples, batch = self.stages[row]
        return first_samples + (step - first_step) * batch

    def step_at(self, samples: int) -> int:
        """Number of whole steps that fit into `samples` samples; inverse of `samples_at`."""
        row = bisect_right(self.stages, samples, key=lambda stage: stage[1]) - 1
        first_step, first_samples, batch = self.stages[row]
        return first_step + (samples - first_samples) // batch


def linear_ramp(start: int, final: int, increment: int = 1, ramp_samples: int = 0) -> BatchSchedule:
    """A batch that grows from `start` to `final` by `increment` over `ramp_samples` (BLOOM).

    After n samples it is start + increment * floor(n * increments / ramp_samples), in exact
    integers; Megatron divides by a float, which agrees except where the exact quotient is a whole
    number that the float misses.
    """
    increments = (final - start) // increment if ramp_samples else 0
    if increments == 0:
        return BatchSchedule(((0, final),))
    return BatchSchedule(
        tuple(
            (-(-count * ramp_samples // increments), start + increment * count)
            for count in range(increments + 1)
        )
    )


def linear_ramp_in_steps(start: int, final: int, increment: int, steps: int) -> BatchSchedule:
    """The shortest ramp that reaches `final` at or after step `steps`; a longer ramp never takes
    fewer steps, so it is found by bisection."""

    def length(ramp_samples: int) -> int:
        return linear_ramp(start, final, increment, ramp_samples).stages[-1][0]

    return linear_ramp(
        start, final, increment, bisect_left(range(steps * final), steps, key=length)
    )


def in_place_of_drops(
    start: int, largest: int, factor: float, drops: Sequence[int]
) -> BatchSchedule:
    """A batch that grows by 1 / `factor` where a rate would drop by `factor`, up to `largest`
    (Smith 2018, arXiv 1711.00489); `drops` are the samples at which it would.

    What rounding and `largest` leave of the drops remains to the rate: see `Recipe`.
    """
    edges = [(0, start)]
    for count, drop in enumerate(drops, start=1):
        # The true product of powers is rounded, not a batch that was rounded before.
        edges.append((drop, min(largest, round(start / factor**count))))
    return BatchSchedule(tuple(edges))


def held(batches: Sequence[int], samples_each: int | None, steps_each: int | None) -> BatchSchedule:
    """Each of `batches` for so many samples or so many steps, the last one to the end."""
    edges, begin = [], 0
    for batch in batches:
        edges.append((begin, batch))
        begin += samples_each if samples_each is not None else batch * (steps_each or 1)
    return BatchSchedule(tuple(edges))
