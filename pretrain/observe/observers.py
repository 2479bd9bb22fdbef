"""Observers: what a person and a file see of each step. They read; they never change the run."""

import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.config import Observe
from pretrain.engine.zero import StepStats
from pretrain.guard import Verdict
from pretrain.observe.metrics import MetricsFile
from pretrain.optim.statistics import HISTOGRAM_BINS, HISTOGRAM_RMS, ParameterStatistics
from pretrain.quantities import human_count, human_seconds
from pretrain.recipe import Clock, Recipe, StepPlan
from pretrain.sync.base import ReplicaSync

_MOST_UNWRITTEN = 2000  # rows; more than steps between meetings


class Observers:
    """Console, metrics.jsonl and TensorBoard; on other ranks than the `first` they are silent.

    Of several launches that `leads` keeps the records, and may be another one later: so the others
    remember what they would have written.

    `flops_per_token` and `peak_flops` (of all devices of this launch) give the utilisation.
    """

    def __init__(
        self,
        config: Observe,
        recipe: Recipe,
        directory: Path,
        first: bool,
        leads: Callable[[], bool],
        flops_per_token: float,
        peak_flops: float,
    ) -> None:
        self._config, self._recipe, self._directory = config, recipe, directory
        self._first, self._leads = first, leads
        self._unwritten: deque[dict[str, Any]] = deque(maxlen=_MOST_UNWRITTEN)
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._training_seconds = 0.0
        self._recent_tokens_per_second = 0.0
        self._file: MetricsFile | None = None
        self._board: Any = None

    def open(self, clock: Clock) -> None:
        """Open the records to go on after `clock`, so that curves are unbroken over a resume."""
        if self._first and self._leads():
            self._open(clock.step, clock.tokens)

    def _open(self, step: int, tokens: int) -> None:
        self._file = MetricsFile(self._directory / "metrics.jsonl", step)
        if self._config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Points past the clock, of steps that are repeated now, are hidden by purge_step.
            self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=tokens + 1)

    def begin(self, clock: Clock, validation_loss: float | None) -> None:
        """Record the loss before the first step."""
        if self._first and validation_loss is not None:
            self._write({"step": 0, "samples": 0, "tokens": 0, "validation_loss": validation_loss})
            print(f"before training: {_validation_text(validation_loss)}", flush=True)

    def record(
        self,
        clock: Clock,
        plan: StepPlan,
        stats: StepStats,
        verdict: Verdict,
        seconds: float,
        validation_loss: float | None,
        sync: ReplicaSync,
    ) -> None:
        """Record the step that ended at `clock` after `seconds`."""
        self._training_seconds += seconds
        rate = plan.batch_samples * self._recipe.sequence_length / seconds
        recent = self._recent_tokens_per_second
        self._recent_tokens_per_second = 0.9 * recent + 0.1 * rate if recent else rate
        if not self._first:
            return
        row = {
            "step": clock.step,
            "samples": clock.samples,
            "tokens": clock.tokens,
            "loss": stats.loss,
            "lr": plan.learning_rate,
            "batch_samples": plan.batch_samples,
            "grad_norm": stats.grad_norm,
            "tokens_per_second": rate,
            "model_flops_utilisation": rate
            * self._flops_per_token
            / (self._peak_flops * sync.launches),
            "step_seconds": seconds,
            "training_seconds": self._training_seconds,
        }
        if sync.replicas > 1:
            row |= {
                "replicas": sync.replicas,
                "sync_bytes": sync.sent_bytes,
                "sync_seconds": sync.seconds,
            }
        if not verdict.apply:
            row["skipped"] = verdict.reason
        if validation_loss is not None:
            row["validation_loss"] = validation_loss
        if self._leads():
            self._write(row)
        else:
            self.close()
            self._unwritten.append(row)
        every = self._config.console_every_steps
        if clock.step % every == 0 or row.keys() & {"skipped", "validation_loss"}:
            print(self.line(row), flush=True)

    def parameters_due(self, before: Clock, after: Clock) -> bool:
        """Whether the step from `before` to `after` is to be measured parameter by parameter."""
        every = self._config.parameters_every
        return every is not None and every.crossed(before, after)

    def record_parameters(self, clock: Clock, found: ParameterStatistics | None) -> None:
        """Record what the step that ended at `clock` did to each parameter, if it was measured."""
        if found is None or self._board is None:
            return
        for number, name in enumerate(found.names):
            kinds = {
                "weight_norm": found.weight_norm,
                "gradient_norm": found.gradient_norm,
                "update_ratio": found.update_ratio,
                "trust_ratio": found.trust_ratio,
            }
            for kind, values in kinds.items():
                if values is not None:
                    self._board.add_scalar(f"{kind}/{name}", values[number], clock.tokens)
            counts, rms = found.histogram[number], found.weight_rms[number]
            width = HISTOGRAM_RMS * rms or 1.0
            step = 2 * width / HISTOGRAM_BINS
            self._board.add_histogram_raw(
                f"weights/{name}", min=-width, max=width, num=sum(counts),
                sum=0.0, sum_squares=sum(counts) * rms**2, global_step=clock.tokens,
                bucket_limits=[step * (b + 1) - width for b in range(HISTOGRAM_BINS)],
                bucket_counts=counts,
            )  # fmt: skip

    def line(self, row: dict[str, Any]) -> str:
        """One console line of at most 100 columns."""
        total = self._recipe.total_steps
        left = self._recipe.total_samples * self._recipe.sequence_length - row["tokens"]
        text = (
            f"{row['step']:>{len(str(total))}}/{total}"
            f"  {human_count(row['tokens'])} tok"
            f"  loss {row['loss']:.4f}"
            f"  lr {row['lr']:.2e}"
            f"  bs {row['batch_samples']}"
            f"  norm {row['grad_norm']:.3g}"
            f"  {human_count(row['tokens_per_second'])}/s"
            f"  mfu {row['model_flops_utilisation']:.0%}"
            f"  eta {human_seconds(max(0, left) / self._recent_tokens_per_second)}"
        )
        if "skipped" in row:
            text = f"step {row['step']} SKIPPED: {row['skipped']}"
        if "validation_loss" in row:
            text += f"\n  {_validation_text(row['validation_loss'])}"
        return text

    def close(self) -> None:
        """Flush and close the records."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()
        self._file = self._board = None

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"training_seconds": self._training_seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        self._training_seconds = state["training_seconds"]

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:  # whoever kept the records is gone
            self._open(row["step"] - 1, row["tokens"] - 1)
            known = self._file.last_step
            rows = [late for late in self._unwritten if known < late["step"] < row["step"]]
            self._unwritten.clear()
            for late in rows:
                self._write(late)
        self._file.write(row)
        if self._board:
            for key, value in row.items():
                if key not in ("step", "samples", "tokens") and not isinstance(value, str):
                    self._board.add_scalar(key, value, row["tokens"])


def _validation_text(loss: float) -> str:
    perplexity = math.exp(min(loss, math.log(sys.float_info.max)))
    return f"validation loss {loss:.4f}, perplexity {human_count(perplexity)}"
