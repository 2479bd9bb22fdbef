"""Batches for the loop: each rank's rows of the global batch, read one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pretrain.data.corpus import Corpus
from pretrain.recipe import Clock, Recipe, StepPlan


class Loader:
    """Rows for this rank. `rows_of_rank(batch)` is this rank's [first, end) of a global batch.

    The next step's rows are read by a thread while the current one is computed: the recipe says
    which they are. Nothing else is remembered, so there is nothing to save.
    """

    def __init__(
        self, corpus: Corpus, recipe: Recipe, rows_of_rank: Callable[[int], tuple[int, int]]
    ) -> None:
        self._corpus, self._recipe, self._rows_of_rank = corpus, recipe, rows_of_rank
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[Clock, Future[torch.Tensor]] | None = None

    def batch(self, clock: Clock, plan: StepPlan) -> torch.Tensor:
        """Rows (n, sequence_length + 1), int64, of the step that begins at `clock`."""
        if self._ahead is not None and self._ahead[0] == clock:
            rows = self._ahead[1].result()
        else:
            rows = self._read(clock.samples, plan.batch_samples)
        after = self._recipe.after(clock, plan)
        if not self._recipe.done(after):
            batch_samples = self._recipe.at(after).batch_samples
            self._ahead = (after, self._thread.submit(self._read, after.samples, batch_samples))
        return rows

    def _read(self, first_sample: int, batch_samples: int) -> torch.Tensor:
        first, end = self._rows_of_rank(batch_samples)
        return torch.from_numpy(self._corpus.batch(first_sample + first, end - first))
