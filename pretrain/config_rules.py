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

# The sections that a check needs, and the check.
Check = tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]
CHECKS: list[Check] = []


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


@_check("data", "seed")
def _order_rules(data: Data, seed: int) -> Iterator[Problem]:
    if data.order == "keyed":
        return
    mixture = data.mixture
    if data.index_directory is None:
        yield Problem("data.index_directory", None, "required with order = 'megatron'",
                      "name a folder that all nodes share; the index files go there")  # fmt: skip
    if mixture.stages or mixture.alpha or mixture.cap:
        yield Problem("data.mixture", str(mixture), "order = 'megatron' knows weights only",
                      "write the weights out, or use order = 'keyed'")  # fmt: skip
    if seed >= 2**32:
        yield Problem("seed", seed, "order = 'megatron' takes seeds below 2^32",
                      "use the seed of the run in Megatron")  # fmt: skip
    if len(data.sources) > 255:
        yield Problem("data.sources", f"{len(data.sources)} sources", "order = 'megatron' stores "
                      "a source in a byte: at most 255", "merge some")  # fmt: skip


@_check("data", "model")
def _attention_rules(data: Data, model: BloomModel | HfModel) -> Iterator[Problem]:
    if data.end_of_text is not None and data.end_of_text >= model.vocab_size:
        yield Problem("data.end_of_text", data.end_of_text,
                      f"must be below model.vocab_size = {model.vocab_size}",
                      "look it up in PREFIX.json of a source")  # fmt: skip
    if data.attention == "document":
        if data.end_of_text is None:
            yield Problem("data.end_of_text", None, "required with attention = 'document'",
                          "2 with the tokenizers of `anthesis tokenizer train`")  # fmt: skip
        if isinstance(model, HfModel):
            yield Problem("data.attention", "document", "only model.family = 'bloom' can",
                          "use attention = 'window'")  # fmt: skip


@_check("data", "recipe")
def _mixture_rules(data: Data, recipe: RecipeSection) -> Iterator[Problem]:
    mixture, length = data.mixture, data.sequence_length
    if mixture.cap and (mixture.cap.unit == "steps" or mixture.cap.value == 0):
        yield Problem("data.mixture.cap", str(mixture.cap), "a number of tokens above 0",
                      "for example '50B tokens'")  # fmt: skip
    known, last = {source.name for source in data.sources}, 0
    for number, stage in enumerate(mixture.stages):
        key = f"data.mixture.stages.{number}"
        unknown = sorted(stage.weights.keys() - known)
        if unknown:
            yield Problem(f"{key}.weights", unknown, "names are those of data.sources",
                          f"known here: {', '.join(sorted(known))}")  # fmt: skip
        if sum(stage.weights.values()) == 0:
            yield Problem(f"{key}.weights", dict(stage.weights), "weights must not sum to 0",
                          "give a source a weight above 0")  # fmt: skip
        if stage.begins.unit == "steps":
            yield Problem(f"{key}.begins", str(stage.begins), "tokens or samples: the clock is "
                          "tokens", "state it in tokens")  # fmt: skip
            continue
        first = stage.begins.samples(length)
        end = None if recipe.train.unit == "steps" else recipe.train.samples(length)
        if first <= last or (end is not None and first >= end):
            yield Problem(f"{key}.begins", str(stage.begins), "stages begin one after another, "
                          f"after the start and before train = {recipe.train}",
                          "order them by begins")  # fmt: skip
        last = max(first, last)


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
