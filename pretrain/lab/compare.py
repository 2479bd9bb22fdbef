"""Compare optimizers on a run, with the same budget for each: `anthesis compare CONFIG`.

After "Descending through a crowded valley" (Schmidt et al., arXiv 2007.01547): each optimizer gets
the same number of runs, first a few learning rates with the first seed, then the other seeds at the
best of them. Under any launcher: `-m pretrain.lab.compare CONFIG`.

All runs take place one after another in this process, which saves the start of one for each (six
seconds) and lets it work under a launcher. Nothing of a run outlives it: the losses are bit by bit
those of `anthesis train`, and memory does not grow. There are no checkpoints: a run that was
interrupted begins anew, runs that have ended are not repeated.
"""

import argparse
import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from tqdm import tqdm

from pretrain.checkpoint import Checkpoints
from pretrain.config import Config
from pretrain.config_optim import OwnOptimizer
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Loader
from pretrain.engine.world import World, join_world, rows_of_rank
from pretrain.engine.zero import ZeroEngine
from pretrain.errors import DivergenceError, UserError, exit_code
from pretrain.guard import Guard
from pretrain.lab.compare_arguments import add_arguments
from pretrain.lab.compare_report import table, write_report
from pretrain.lab.compare_results import Outcome, Standing, compete, read_outcome, write_result
from pretrain.lab.compare_setup import Comparison, Entry, comparison_of
from pretrain.loop import Run, Validator, train
from pretrain.observe.observers import Observers
from pretrain.optim.own import check_own
from pretrain.quantities import human_count
from pretrain.recipe import Clock, Recipe, StepPlan
from pretrain.train import build_engine, open_data

INTERRUPTED = "interrupted: the same command goes on with the run that was under way"


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.lab.compare", description=__doc__)
    add_arguments(parser)
    # The deepspeed launcher passes it; LOCAL_RANK of the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    return exit_code(lambda: run(comparison_of(options)), INTERRUPTED)


def run(comparison: Comparison) -> None:
    """Make all runs that are not there yet, then tell what they came to."""
    # torch renames collectives that DeepSpeed calls; nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with join_world(comparison.config.timeout.value) as world:
        standings = compare(comparison, world)
        if world.is_first:
            print(table(comparison, standings))
            for path in write_report(comparison, standings):
                print(f"-> {path}", flush=True)


def compare(comparison: Comparison, world: World) -> list[Standing]:
    """How each optimizer did, in the order of the entries; collective."""
    if world.is_first:
        _announce(comparison)
    with _Runner.ready(comparison, world) as runner:
        return [
            compete(comparison, entry, runner.outcome_of(entry), runner.expect)
            for entry in comparison.entries
        ]


def _announce(comparison: Comparison) -> None:
    recipe = comparison.config.build_recipe()
    tokens = recipe.total_samples * recipe.sequence_length
    print(
        f"{comparison.config.name}: {len(comparison.entries)} optimizers, "
        f"{comparison.planned_runs} runs of {recipe.total_steps} steps, {human_count(tokens)} "
        f"tokens each -> {comparison.output}",
        flush=True,
    )


class _Runner:
    """Makes single runs, or finds that they have ended already; collective."""

    def __init__(self, comparison: Comparison, world: World, progress: Any) -> None:
        self._comparison, self._world, self._progress = comparison, world, progress
        config, self._recipe = comparison.config, comparison.config.build_recipe()
        self._tokens = self._recipe.total_samples * self._recipe.sequence_length
        # Which samples are held out first depends on the seed, so all runs are given those of the
        # config's seed: the spread over seeds is of training, not of the measure.
        self._held_out = Corpus(config.data, config.seed, config.model.vocab_size, "validation")
        self._identity = self._held_out.fingerprint()["hash"]

    @classmethod
    @contextmanager
    def ready(cls, comparison: Comparison, world: World) -> Iterator["_Runner"]:
        """Yields a runner with its line of progress; refuses beforehand what cannot work:
        an optimizer of the user's own that is not element-wise, a folder with other runs."""
        with tqdm(
            desc="compare", unit="tok", unit_scale=True, dynamic_ncols=True, smoothing=0.05,
            disable=None if world.is_first else True,
        ) as progress:  # fmt: skip
            runner = cls(comparison, world, progress)
            for entry in comparison.entries:
                if isinstance(entry.section, OwnOptimizer):
                    check_own(entry.section)
                for rate in comparison.grid(entry):
                    runner._ended(comparison.trial(entry, rate, comparison.seeds[0]))
            progress.total = 0
            runner.expect(comparison.planned_runs)
            yield runner

    def expect(self, runs: int) -> None:
        """Count on `runs` more runs."""
        self._progress.total += runs * self._tokens
        self._progress.refresh()

    def outcome_of(self, entry: Entry) -> Callable[[float, int], Outcome]:
        """What gives the outcome of an entry's run at a rate with a seed."""

        def outcome_at(rate: float, seed: int) -> Outcome:
            config = self._comparison.trial(entry, rate, seed)
            text = f"{entry.label}, rate {rate:g}, seed {seed}"
            outcome, known = self._ended(config), True
            if outcome is None:
                self._progress.set_postfix_str(text)
                began = self._progress.n
                self._train(config)
                # A run that diverged leaves some of its tokens unread.
                self._progress.total -= self._tokens - (self._progress.n - began)
                outcome, known = self._ended(config), False
                if outcome is None:
                    raise RuntimeError(f"{config.run_directory}: ended, but left no result")
            else:
                self.expect(-1)
            if self._world.is_first:
                found = f"diverged: {outcome.diverged}"
                if not outcome.diverged:
                    found = f"held-out loss {outcome.final:.4f}, {outcome.step_seconds:.3g} s/step"
                self._progress.write(f"  {text}: {found}{' (known)' if known else ''}")
            return outcome

        return outcome_at

    def _ended(self, config: Config) -> Outcome | None:
        """The outcome of a run that has ended, as the first rank finds it."""
        found: Outcome | UserError | None = None
        if self._world.is_first:
            try:
                found = read_outcome(config, self._identity)
            except UserError as error:
                found = UserError(str(error))  # of a class that survives the way to other ranks
        found = self._world.gather(found)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def _train(self, config: Config) -> None:
        """Make a run from its beginning; what the worker would print goes to log.txt."""
        folder, world = config.run_directory, self._world
        with contextlib.ExitStack() as stack:
            if world.is_first:
                _open_folder(config)
                log = stack.enter_context(open(folder / "log.txt", "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(log))
            run, diverged = self._build(config), None
            run.observers.open(Clock())
            try:
                train(run, Clock())
            except DivergenceError as error:
                diverged = str(error).splitlines()[0]
            finally:
                run.observers.close()
        if world.is_first:
            write_result(folder, run.recipe.total_steps, self._identity, diverged)
        run.engine.close()
        del run
        gc.collect()

    def _build(self, config: Config) -> Run:
        """As `pretrain.train` wires a run, but without checkpoints and with our held-out samples.

        The utilisation of the machine is not measured, and recorded as 0.
        """
        recipe, world = config.build_recipe(), self._world
        corpus, _ = open_data(config, world)
        return Run(
            seed=config.seed,
            recipe=recipe,
            engine=build_engine(config, world),
            loader=Loader(corpus, recipe, lambda batch: rows_of_rank(batch, world)),
            guard=Guard(config.guard),
            observers=_Observers(config, recipe, world, self._progress),
            checkpoints=_NoCheckpoints(),
            validate=Validator(self._held_out, config.validation),
        )


class _Observers(Observers):
    """Also moves the line of progress."""

    def __init__(self, config: Config, recipe: Recipe, world: World, progress: Any) -> None:
        first, always = world.is_first, lambda: True
        super().__init__(config.observe, recipe, config.run_directory, first, always, 0.0, 1.0)
        self._sequence_length, self._progress = recipe.sequence_length, progress

    def record(self, clock: Clock, plan: StepPlan, *rest: Any) -> None:
        """Record the step that ended at `clock`."""
        super().record(clock, plan, *rest)
        self._progress.update(plan.batch_samples * self._sequence_length)


class _NoCheckpoints(Checkpoints):
    """Saves nothing: models of a comparison are small, and there are many of them."""

    def __init__(self) -> None:
        """There is nothing to know."""

    def due(self, before: Clock, after: Clock) -> bool:
        """Never."""
        return False

    def save(self, clock: Clock, engine: ZeroEngine, parts: dict[str, Any]) -> Path:
        """Does nothing."""
        return Path()


def _open_folder(config: Config) -> None:
    folder = config.run_directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(tomli_w.dumps(config.resolved()), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}\n"
            "  cure: free space, fix the permissions, or choose another --output"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
