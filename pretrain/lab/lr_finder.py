"""Find the learning rate: the range test (Smith 2017, arXiv 1506.01186) on the real run.

`anthesis lr-find CONFIG`, or under any launcher `-m pretrain.lab.lr_finder CONFIG`: trains for some
steps with the run's model, data, batch and optimizer while the rate grows from tiny to absurd, then
says between which rates the loss fell. Nothing of the run is changed.
"""

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from pretrain.batches import BatchSchedule
from pretrain.checkpoint import newest_checkpoint
from pretrain.config import Config
from pretrain.config_file import load
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Loader
from pretrain.engine.world import World, join_world, rows_of_rank
from pretrain.engine.zero import ZeroEngine
from pretrain.errors import UserError, exit_code
from pretrain.lab.lr_plot import plot_findings
from pretrain.lab.range_test import Findings, Sweep, Trace, add_arguments, summary
from pretrain.lab.snapshot import left_as_it_was
from pretrain.loop import seed_step
from pretrain.recipe import Clock, Recipe
from pretrain.train import build_engine, checkpoints_of, open_data


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.lab.lr_finder", description=__doc__)
    add_arguments(parser)
    # The deepspeed launcher passes it; LOCAL_RANK of the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """The command with parsed options; returns the exit code."""
    # torch renames collectives that DeepSpeed calls; nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    def work() -> None:
        sweep = Sweep(
            options.lowest, options.highest, options.steps, options.smoothing, options.batch
        )
        config = load(options.config, options.overrides)
        plot = options.plot or Path(f"lr-find-{config.name}.png")
        _check_plot(plot)
        checkpoint = _find_checkpoint(options.checkpoint)
        with join_world(config.timeout.value) as world:
            _find_for_run(config, world, sweep, checkpoint, plot)

    return exit_code(work, "interrupted: nothing of the run was changed")


def find(
    engine: ZeroEngine, recipe: Recipe, corpus: Corpus, clock: Clock, seed: int, sweep: Sweep
) -> Findings:
    """Sweep the rate from the state that `engine` is in at `clock`; collective.

    All other settings are those of the recipe at `clock`, samples follow in the order of training,
    and `seed` is the run's. Engine and random numbers are as before afterwards, bit by bit, also
    after Ctrl-C, which is raised as KeyboardInterrupt at the end of a step.
    """
    world, trace, batch = engine.world, Trace(sweep), sweep.batch or recipe.at(clock).batch_samples
    # The batch stays while the clock goes on; the loader reads ahead, so it has to know.
    steady = replace(recipe, batch=BatchSchedule(((0, batch),)))
    # With a batch of one's own, settings that follow the batch follow it.
    plan = steady.at(clock) if sweep.batch else recipe.at(clock)
    loader = Loader(corpus, steady, lambda batch: rows_of_rank(batch, world))
    with (
        _interrupts(world) as interrupted,
        left_as_it_was(engine),
        tqdm(
            sweep.rates(), "lr-find", unit="step", disable=None if world.is_first else True
        ) as rates,
    ):
        for rate in rates:
            if interrupted():
                break
            seed_step(seed, clock, world.rank)
            stats = engine.forward_backward(loader.batch(clock, plan), batch)
            if trace.add(rate, stats.loss, stats.grad_norm):
                break
            engine.step(replace(plan, learning_rate=rate), stats)
            clock = steady.after(clock, plan)
            rates.set_postfix_str(f"rate {rate:.1e}, average loss {trace.smoothed[-1]:.3f}")
    return Findings(trace)


@contextmanager
def _interrupts(world: World) -> Iterator[Callable[[], bool]]:
    """Yields a collective question: was Ctrl-C pressed on any rank? KeyboardInterrupt at the end.

    In the middle of a step it would leave the other ranks waiting, and the engine in no state to be
    restored. A second Ctrl-C does not wait.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def on_any_rank() -> bool:
        return world.sum(torch.tensor(float(pressed), device=world.device)).item() > 0

    listening = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, press) if listening else None
    try:
        yield on_any_rank
    finally:
        if listening:
            signal.signal(signal.SIGINT, before)
    if on_any_rank():
        raise KeyboardInterrupt


def _find_for_run(
    config: Config, world: World, sweep: Sweep, checkpoint: Path | None, plot: Path
) -> None:
    """Build what the run would train with, sweep, and tell on the first rank."""
    recipe = config.build_recipe()
    corpus, _ = open_data(config, world)
    engine = build_engine(config, world)
    clock = Clock()
    if checkpoint is not None:
        clock = checkpoints_of(config, corpus, world).load(checkpoint, engine, {})
    batch = sweep.batch or recipe.at(clock).batch_samples
    if config.data.order == "megatron":
        _check_samples(recipe, clock, sweep.steps * batch)
    begin = f"step {clock.step}" if checkpoint else "the initial weights"
    title = f"{config.name}: learning-rate range test from {begin}, batch {batch}"
    if world.is_first:
        print(f"{title}, {sweep.lowest:g} to {sweep.highest:g} in {sweep.steps} steps", flush=True)
    findings = find(engine, recipe, corpus, clock, config.seed, sweep)
    if world.is_first:
        print(summary(findings))
        if findings.trace.losses:
            plot_findings(findings, title, plot)
            print(f"-> {plot}", flush=True)


def _find_checkpoint(path: Path | None) -> Path | None:
    """The checkpoint that `path` is, or the newest of the run that it is."""
    if path is None or (path / "state.json").exists():
        return path
    return newest_checkpoint(path)


def _check_plot(plot: Path) -> None:
    if plot.suffix.lower() != ".png" or not plot.parent.is_dir():
        raise UserError(
            f"--plot {plot}: a picture cannot be drawn there\n"
            "  rule: a file that ends in .png, in a folder that exists\n"
            "  cure: choose another --plot, or make the folder"
        )


def _check_samples(recipe: Recipe, clock: Clock, needed: int) -> None:
    """Megatron's order ends with the run; the keyed one has no end."""
    left = recipe.train_samples - clock.samples
    if needed > left:
        raise UserError(
            f"the sweep needs {needed} samples, and {left} are left after step {clock.step}\n"
            '  rule: data.order = "megatron" has no samples beyond recipe.train\n'
            "  cure: fewer --steps, a smaller --batch, or an earlier checkpoint"
        )


if __name__ == "__main__":
    sys.exit(main())
