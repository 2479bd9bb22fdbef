"""The training loop."""

import time
from dataclasses import dataclass

import torch

from pretrain.checkpoint import Checkpoints, Stateful
from pretrain.config import Validation
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Loader
from pretrain.data.permutation import derive_key
from pretrain.engine.world import rows_of_rank
from pretrain.engine.zero import ZeroEngine
from pretrain.guard import Guard
from pretrain.observe.observers import Observers
from pretrain.recipe import Clock, Recipe
from pretrain.stopping import asked_by


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with, wired together by train.py."""

    seed: int
    recipe: Recipe
    engine: ZeroEngine
    loader: Loader
    guard: Guard
    observers: Observers
    checkpoints: Checkpoints
    validate: "Validator"

    @property
    def saves(self) -> bool:
        """Whether this rank has a part in saving: all ranks of a launch have, or of several
        launches those of the first replica."""
        return self.engine.sync.leads or self.engine.world.replicas.size > 1

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds besides model, optimizer and clock."""
        return {"guard": self.guard, "observers": self.observers}


def train(run: Run, clock: Clock) -> Clock:
    """Train from `clock` to the end of the recipe, or until a signal asks to make way; the state is
    saved where it ends."""
    recipe, engine, saved_at = run.recipe, run.engine, clock
    if clock.step == 0 and engine.sync.leads:
        run.observers.begin(clock, run.validate(engine))
    while not recipe.done(clock):
        began = time.perf_counter()
        plan = recipe.at(clock)
        seed_step(run.seed, clock, engine.sync.ranks.rank)
        rows = run.loader.batch(clock, plan)
        stats = engine.forward_backward(rows, plan.batch_samples, clock, asked_by() is not None)
        verdict = run.guard.judge(clock, stats)
        before, clock, parameters = clock, recipe.after(clock, plan), None
        if verdict.apply:
            parameters = engine.step(plan, stats, run.observers.parameters_due(before, clock))
            if engine.applied() != plan.settings:
                raise RuntimeError(f"step {clock.step}: applied {engine.applied()}, not {plan}")
        else:
            engine.discard()
        clock = engine.sync.stepped(clock, last=recipe.done(clock))
        seconds = time.perf_counter() - began
        leads, loss = engine.sync.leads, None
        if leads and run.validate.due(before, clock, recipe):
            loss = run.validate(engine)
        run.observers.record(clock, plan, stats, verdict, seconds, loss, engine.sync)
        run.observers.record_parameters(clock, parameters)
        if run.saves and run.checkpoints.due(before, clock):
            run.checkpoints.save(clock, engine, run.parts)
            saved_at = clock
        if engine.sync.agree(stats.stop, clock):
            break
    if run.saves and saved_at != clock:
        run.checkpoints.save(clock, engine, run.parts)
    return clock


def seed_step(seed: int, clock: Clock, rank: int) -> None:
    """Random numbers (dropout) are a function of seed, step and rank: nothing to save."""
    torch.manual_seed(derive_key(seed, "step", clock.step, rank) % 2**63)


class Validator:
    """Mean loss on the first `config.samples` held-out samples; they are the same each time."""

    def __init__(self, corpus: Corpus | None, config: Validation) -> None:
        self._corpus, self._config = corpus, config

    def due(self, before: Clock, after: Clock, recipe: Recipe) -> bool:
        """Whether to validate after the step from `before` to `after`."""
        every = self._config.every
        return every is not None and (every.crossed(before, after) or recipe.done(after))

    def __call__(self, engine: ZeroEngine) -> float | None:
        """The loss in nats; None where nothing is held out."""
        if self._corpus is None:
            return None
        first, end = rows_of_rank(self._config.samples, engine.sync.together)
        rows = torch.from_numpy(self._corpus.batch(first, end - first))
        return engine.evaluate(rows, self._config.samples)
