"""Batches for the loop: each rank's rows of the global batch, read one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pretrain.data.corpus import Corpus
from pretrain.recipe import Clock, Recipe, StepPlan


class Loader:
    """Rows for this rank. `rows_of_rank(batch)` is this rank's [first, end) of a global batch; it
    may change when other ranks come or go.

    The next step's rows are read by a thread while the current one is computed: the recipe says
    which they are. Nothing else is remembered, so there is nothing to save.
    """

    def __init__(
        self, corpus: Corpus, recipe: Recipe, rows_of_rank: Callable[[int], tuple[int, int]]
    ) -> None:
        self._corpus, self._recipe, self._rows_of_rank = corpus, recipe, rows_of_rank
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, int, Future[torch.Tensor]] | None = None

    def batch(self, clock: Clock, plan: StepPlan) -> torch.Tensor:
        """Rows (n, sequence_length + 1), int64, of the step that begins at `clock`."""
        first, count = self._span(clock, plan.batch_samples)
        if self._ahead is not None and self._ahead[:2] == (first, count):
            rows = self._ahead[2].result()
        else:
            rows = self._read(first, count)
        after = self._recipe.after(clock, plan)
        if not self._recipe.done(after):
            span = self._span(after, self._recipe.at(after).batch_samples)
            self._ahead = (*span, self._thread.submit(self._read, *span))
        return rows

    def _span(self, clock: Clock, batch_samples: int) -> tuple[int, int]:
        """First sample and number of samples of this rank in the batch that begins at `clock`."""
        first, end = self._rows_of_rank(batch_samples)
        return clock.samples + first, end - first

    def _read(self, first_sample: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self._corpus.batch(first_sample, count))
