"""The guard: the one part that may veto a step. Its verdict is the same on every rank."""

import math
from dataclasses import dataclass
from typing import Any

from pretrain.config import Guard as GuardConfig
from pretrain.engine.zero import StepStats
from pretrain.errors import DivergenceError
from pretrain.recipe import Clock


@dataclass(frozen=True)
class Verdict:
    """Whether the update is applied, and why not."""

    apply: bool
    reason: str = ""


class Guard:
    """Skips steps whose loss or gradient norm is not finite, and ends the run after too many."""

    def __init__(self, config: GuardConfig) -> None:
        self._limit = config.max_skipped_in_a_row
        self._skipped_in_a_row = 0

    def judge(self, clock: Clock, stats: StepStats) -> Verdict:
        """Judge the step that begins at `clock`; `stats` are the same on all ranks."""
        if math.isfinite(stats.loss) and math.isfinite(stats.grad_norm):
            self._skipped_in_a_row = 0
            return Verdict(apply=True)
        self._skipped_in_a_row += 1
        found = f"loss {stats.loss}, gradient norm {stats.grad_norm}"
        if self._skipped_in_a_row > self._limit:
            raise DivergenceError(
                f"step {clock.step + 1}: {found}; {self._limit} steps were skipped before it\n"
                f"  rule: at most guard.max_skipped_in_a_row = {self._limit} steps in a row may "
                "be other than finite\n"
                "  cure: go on from an earlier checkpoint with a lower "
                "recipe.learning_rate.peak, or look at the data of these steps"
            )
        return Verdict(apply=False, reason=found)

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"skipped_in_a_row": self._skipped_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        self._skipped_in_a_row = state["skipped_in_a_row"]
