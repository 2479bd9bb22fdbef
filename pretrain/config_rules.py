"""Rules of a run config that span several keys: contradictions and impossible sums."""

from collections.abc import Callable, Iterator
from typing import Any

from pretrain.config import (
    BloomModel,
    Checkpoint,
    Data,
    HfModel,
    RecipeSection,
    Validation,
)
from pretrain.errors import Problem

CHECKS: list[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]] = []


def _check(*needs: str) -> Callable[[Callable[..., Iterator[Problem]]], Any]:
    def register(function: Callable[..., Iterator[Problem]]) -> Any:
        CHECKS.append((needs, function))
        return function

    return register


@_check("model")
def _model_rules(model: BloomModel | HfModel) -> Iterator[Problem]:
    if isinstance(model, HfModel):
        if "model_type" not in model.config:
            yield Problem("model.config.model_type", None, "required with family = 'hf'",
                          'name the architecture, for example "llama"')  # fmt: skip
        if model.config.get("vocab_size", model.vocab_size) != model.vocab_size:
            yield Problem("model.config.vocab_size", model.config["vocab_size"],
                          f"must not contradict model.vocab_size = {model.vocab_size}",
                          "remove it: it is taken from model.vocab_size")  # fmt: skip
    elif model.hidden_size % model.heads:
        near = [h for h in range(1, model.hidden_size + 1) if model.hidden_size % h == 0]
        best = min(near, key=lambda heads: abs(heads - model.heads))
        yield Problem("model.heads", model.heads,
                      f"must divide model.hidden_size = {model.hidden_size}",
                      f"the nearest that does is {best}")  # fmt: skip


@_check("data")
def _source_rules(data: Data) -> Iterator[Problem]:
    names = [source.name for source in data.sources]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield Problem("data.sources", name, "names of sources are unique", "rename one")
    if sum(source.weight for source in data.sources) == 0:
        yield Problem("data.sources", [source.weight for source in data.sources],
                      "weights must not sum to 0", "give a source a weight above 0")  # fmt: skip


@_check("recipe", "data")
def _horizon_rules(recipe: RecipeSection, data: Data) -> Iterator[Problem]:
    rate, batch, length = recipe.learning_rate, recipe.batch, data.sequence_length
    horizons = {
        "recipe.train": recipe.train,
        "recipe.learning_rate.warmup": rate.warmup,
        "recipe.learning_rate.decay": rate.decay,
        "recipe.batch.ramp": batch.ramp,
    }
    in_steps = [key for key, horizon in horizons.items() if horizon and horizon.unit == "steps"]
    for key in in_steps:
        yield Problem(key, str(horizons[key]), "tokens or samples: the clock is tokens, and steps "
                      "have no fixed size in a batch ramp", "state it in tokens")  # fmt: skip
    if in_steps:
        return
    if rate.warmup.samples(length) >= rate.decay.samples(length):
        yield Problem("recipe.learning_rate.decay", str(rate.decay),
                      f"must come after warmup = {rate.warmup}",
                      "lengthen decay or shorten warmup")  # fmt: skip
    if rate.floor > rate.peak:
        yield Problem("recipe.learning_rate.floor", rate.floor,
                      f"must not exceed peak = {rate.peak}",
                      "BLOOM: a tenth of the peak")  # fmt: skip
    if recipe.train.samples(length) < (batch.start or batch.final):
        yield Problem("recipe.train", str(recipe.train),
                      f"at least one batch: {batch.start or batch.final} samples of {length}",
                      "lengthen the run or shrink the batch")  # fmt: skip
    if batch.ramp and batch.ramp.samples(length) > recipe.train.samples(length):
        yield Problem("recipe.batch.ramp", str(batch.ramp), f"must end within train = "
                      f"{recipe.train}", "shorten the ramp or lengthen the run")  # fmt: skip


@_check("recipe")
def _ramp_rules(recipe: RecipeSection) -> Iterator[Problem]:
    batch = recipe.batch
    start = batch.start or batch.final
    if start > batch.final:
        yield Problem("recipe.batch.start", start, f"must not exceed final = {batch.final}",
                      "a batch only grows")  # fmt: skip
    elif start < batch.final:
        for key in ("increment", "ramp"):
            if getattr(batch, key) is None:
                yield Problem(f"recipe.batch.{key}", None, "required where start < final",
                              "for example increment = 16, ramp = '20B tokens'")  # fmt: skip
        if batch.increment and (batch.final - start) % batch.increment:
            yield Problem("recipe.batch.increment", batch.increment,
                          f"must divide final - start = {batch.final - start}",
                          "choose a divisor, or shift start")  # fmt: skip
        if batch.ramp and batch.ramp.value == 0:
            yield Problem("recipe.batch.ramp", str(batch.ramp), "longer than nothing",
                          "remove start for a constant batch")  # fmt: skip


@_check("checkpoint", "validation")
def _interval_rules(checkpoint: Checkpoint, validation: Validation) -> Iterator[Problem]:
    intervals = {"checkpoint.every": checkpoint.every, "checkpoint.keep_every":
                 checkpoint.keep_every, "validation.every": validation.every}  # fmt: skip
    for key, interval in intervals.items():
        if interval is not None and interval.value == 0:
            yield Problem(key, str(interval), "greater than 0", "for example '500 steps'")
