"""Rules of a run config that span several keys: contradictions and impossible sums."""

from collections.abc import Callable, Iterator
from typing import Any

from pretrain.config import BloomModel, Checkpoint, Data, Engine, HfModel, Observe, Validation
from pretrain.config_optim import OptimizerSection
from pretrain.config_rates import InverseSqrt, MultiStep, OneCycle, Step
from pretrain.config_recipe import (
    GrowingBatch,
    RampBatch,
    RecipeSection,
    TableBatch,
    horizons,
    recipe_axis,
)
from pretrain.config_sync import DiLoCo, Mesh, OuterSection, SyncSection
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
    if mixture.cap and (mixture.cap.unit in ("steps", "epochs") or mixture.cap.value == 0):
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
        if stage.begins.unit in ("steps", "epochs"):
            yield Problem(f"{key}.begins", str(stage.begins), "tokens or samples: the clock is "
                          "tokens", "state it in tokens")  # fmt: skip
            continue
        first = stage.begins.samples(length)
        in_samples = recipe.train.unit in ("tokens", "samples")
        end = recipe.train.samples(length) if in_samples else None
        if first <= last or (end is not None and first >= end):
            yield Problem(f"{key}.begins", str(stage.begins), "stages begin one after another, "
                          f"after the start and before train = {recipe.train}",
                          "order them by begins")  # fmt: skip
        last = max(first, last)


@_check("recipe")
def _ramp_rules(recipe: RecipeSection) -> Iterator[Problem]:
    batch = recipe.batch
    if not isinstance(batch, RampBatch):
        return
    start = batch.start or batch.final
    if start > batch.final:
        yield Problem("recipe.batch.start", start, f"must not exceed final = {batch.final}",
                      "a ramp only grows; schedule = 'table' may shrink")  # fmt: skip
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


@_check("recipe", "optimizer")
def _scaling_rules(recipe: RecipeSection, optimizer: OptimizerSection) -> Iterator[Problem]:
    scaling, rate = recipe.scaling, recipe.learning_rate
    if scaling and scaling.rule in ("linear-then-sqrt", "noise-scale"):
        if scaling.critical_batch is None:
            yield Problem("recipe.scaling.critical_batch", None, f"required by {scaling.rule}",
                          "the batch at which larger ones stop paying, in samples")  # fmt: skip
    elif scaling and scaling.critical_batch is not None:
        yield Problem("recipe.scaling.critical_batch", scaling.critical_batch,
                      f"rule = '{scaling.rule}' has none", "remove it")  # fmt: skip
    if isinstance(rate, OneCycle) and rate.cycle_momentum and recipe.momentum:
        yield Problem("recipe.momentum", str(recipe.momentum), "one-cycle cycles the momentum",
                      "set recipe.learning_rate.cycle_momentum = false")  # fmt: skip
    if recipe.momentum and recipe.momentum.to >= 1:
        yield Problem("recipe.momentum.to", recipe.momentum.to, "below 1", "usual: 0.9 to 0.95")
    if recipe.clip_norm and not (optimizer.clip_norm and recipe.clip_norm.to):
        yield Problem("recipe.clip_norm", str(recipe.clip_norm),
                      "changes a norm above 0 to another",
                      "0 means never: choose a large norm instead")  # fmt: skip


@_check("optimizer", "engine")
def _compatibility_rules(optimizer: OptimizerSection, engine: Engine) -> Iterator[Problem]:
    facts, name = optimizer.facts, getattr(optimizer, "name", "")
    for key, found, allowed in (
        ("zero_stage", engine.zero_stage, facts.zero_stages),
        ("precision", engine.precision, facts.precisions),
        ("offload", engine.offload, ("none", "cpu") if facts.offload else ("none",)),
    ):
        if found not in allowed:
            yield Problem(f"engine.{key}", found, f"optimizer.name = {name!r} works with "
                          f"{' or '.join(map(str, allowed))}", f"use {allowed[0]}")  # fmt: skip


@_check("sync", "mesh", "optimizer", "start")
def _sync_rules(
    sync: SyncSection, mesh: Mesh, optimizer: OptimizerSection, start: str
) -> Iterator[Problem]:
    begins = getattr(sync, "start", None)
    if begins is not None and begins.unit in ("steps", "epochs"):
        yield Problem("sync.start", str(begins), "tokens or samples: the clock is tokens",
                      "for example '1B tokens'")  # fmt: skip
    if mesh.check_every and (mesh.check_every.value == 0 or mesh.check_every.unit == "epochs"):
        yield Problem("mesh.check_every", str(mesh.check_every), "steps, samples or tokens, "
                      "greater than 0", "for example '100 steps'")  # fmt: skip
    if not isinstance(sync, OuterSection):
        return
    if sync.coordinator and mesh.shard_ranks:
        yield Problem("mesh.shard_ranks", mesh.shard_ranks, "with sync.coordinator each launch is "
                      "one replica, of all its ranks", "remove one of the two")  # fmt: skip
    if sync.coordinator and start == "fresh":
        yield Problem("start", start, "with sync.coordinator no replica may move the folder that "
                      "others write to", "move it by hand, or choose another name")  # fmt: skip
    if isinstance(sync, DiLoCo):
        yield from _streaming_rules(sync, optimizer)


def _streaming_rules(sync: DiLoCo, optimizer: OptimizerSection) -> Iterator[Problem]:
    if sync.parts > sync.every_steps:
        yield Problem("sync.parts", sync.parts, "each has a step of its own: at most "
                      f"every_steps = {sync.every_steps}", "use fewer parts")  # fmt: skip
    elif sync.delay_steps > (most := sync.every_steps // sync.parts):
        yield Problem("sync.delay_steps", sync.delay_steps, "one part is under way at a time: at "
                      f"most every_steps / parts = {most}", "use fewer")  # fmt: skip
    if optimizer.facts.averages and (sync.parts > 1 or sync.delay_steps or sync.mix):
        yield Problem("sync.parts", sync.parts, "Schedule-Free's average cannot be streamed",
                      "parts = 1, delay_steps = 0, no mix")  # fmt: skip


@_check("recipe", "optimizer")
def _momentum_rules(recipe: RecipeSection, optimizer: OptimizerSection) -> Iterator[Problem]:
    rate = recipe.learning_rate
    cycles = isinstance(rate, OneCycle) and rate.cycle_momentum
    key = "recipe.learning_rate.cycle_momentum" if cycles else "recipe.momentum"
    changes = cycles or recipe.momentum is not None
    if optimizer.facts.averages:
        if optimizer.momenta[0] == 0:
            yield Problem("optimizer", optimizer.momenta, "Schedule-Free interpolates: its first "
                          "beta (or momentum) is above 0", "usual: 0.9")  # fmt: skip
        if changes:
            yield Problem(key, str(recipe.momentum or True), "Schedule-Free's average is taken "
                          "at one momentum", "remove it")  # fmt: skip
    elif changes and not optimizer.momenta[0]:
        yield Problem(key, str(recipe.momentum or True),
                      f"optimizer.name = {getattr(optimizer, 'name', '')!r} has no momentum here",
                      "remove it, or set the optimizer's momentum or betas")  # fmt: skip


@_check("recipe", "data")
def _horizon_rules(recipe: RecipeSection, data: Data) -> Iterator[Problem]:
    if any(_ramp_rules(recipe)):
        return
    rate, batch, length = recipe.learning_rate, recipe.batch, data.sequence_length
    problems = []
    for key, horizon in horizons(recipe, "recipe"):
        if horizon.unit == "epochs" and data.epoch() is None:
            problems.append(Problem(key, str(horizon), "the tokens of an epoch must be known",
                            "set data.epoch_tokens, or put the shards in place"))  # fmt: skip
    if isinstance(batch, TableBatch) and batch.stages[0].begins.value:
        problems.append(Problem("recipe.batch.stages.0.begins", str(batch.stages[0].begins),
                        "the first stage begins at 0", "begins = 0"))  # fmt: skip
    if isinstance(batch, GrowingBatch):
        if not isinstance(rate, Step | MultiStep):
            problems.append(Problem("recipe.batch.schedule", batch.schedule,
                            "the batch takes over the drops of shape step or multi-step",
                            "choose one of these shapes"))  # fmt: skip
        if batch.largest < batch.start:
            problems.append(Problem("recipe.batch.largest", batch.largest,
                            f"at least start = {batch.start}", "a batch only grows"))  # fmt: skip
    yield from problems
    if not problems:
        yield from _order_in_time(recipe, data, length)


# Lengths that must not be 0, wherever they stand in the recipe.
_NOT_EMPTY = {"train", "every", "rise", "fall", "timescale", "cooldown", "hold"}


def _order_in_time(recipe: RecipeSection, data: Data, length: int) -> Iterator[Problem]:
    """Rules about what comes before what, once all horizons can be converted."""
    rate = recipe.learning_rate
    axis = recipe_axis(recipe, length, data.epoch)
    for key, horizon in horizons(recipe, "recipe"):
        if key.rpartition(".")[2] in _NOT_EMPTY and axis(horizon) == 0:
            yield Problem(key, str(horizon), f"at least one sample of {length} tokens",
                          "make it longer")  # fmt: skip
            return
    if isinstance(rate, MultiStep):
        drops = list(rate.drops(axis))
        if drops != sorted(set(drops)) or drops[0] < axis(rate.warmup):
            yield Problem("recipe.learning_rate.milestones", [str(m) for m in rate.milestones],
                          "come one after another, after the warm-up", "order them")  # fmt: skip
            return
    edges = [edge for edge, _ in axis.batch.edges]
    if edges != sorted(edges):
        yield Problem("recipe.batch.stages", edges, "stages begin one after another",
                      "order them by begins")  # fmt: skip
        return
    if axis.train_samples < (first := axis.batch(0)):
        yield Problem("recipe.train", str(recipe.train),
                      f"at least one batch: {first} samples of {length}",
                      "lengthen the run or shrink the batch")  # fmt: skip
    if edges[-1] > axis.train_samples and isinstance(recipe.batch, RampBatch):
        yield Problem("recipe.batch.ramp", str(recipe.batch.ramp), f"must end within train = "
                      f"{recipe.train}", "shorten the ramp or lengthen the run")  # fmt: skip
    if (floor := getattr(rate, "floor", 0.0)) > rate.peak:
        yield Problem("recipe.learning_rate.floor", floor,
                      f"must not exceed peak = {rate.peak}",
                      "BLOOM: a tenth of the peak")  # fmt: skip
    decay = getattr(rate, "decay", None)
    begin, end = axis(rate.warmup), axis.end(decay)
    if isinstance(rate, OneCycle):
        begin += axis(rate.rise) * (2 if rate.three_phase else 1)
    if getattr(rate, "cooldown", None):
        begin += axis(rate.cooldown)
    if begin >= end:
        yield Problem("recipe.learning_rate.decay", str(decay or recipe.train),
                      f"must come after warmup = {rate.warmup} and what follows it",
                      "lengthen decay (default: train) or shorten what comes before")  # fmt: skip
    if isinstance(rate, InverseSqrt) and axis(rate.timescale or rate.warmup) == 0:
        yield Problem("recipe.learning_rate.timescale", None, "longer than nothing where there is "
                      "no warmup", "set warmup or timescale")  # fmt: skip
    for name in ("weight_decay", "momentum", "clip_norm"):
        change = getattr(recipe, name)
        if change and axis(change.begins) >= axis.end(change.ends):
            yield Problem(f"recipe.{name}.ends", str(change.ends or recipe.train),
                          f"must come after begins = {change.begins}",
                          "move one of them")  # fmt: skip


@_check("checkpoint", "validation", "observe")
def _interval_rules(
    checkpoint: Checkpoint, validation: Validation, observe: Observe
) -> Iterator[Problem]:
    intervals = {"checkpoint.every": checkpoint.every, "checkpoint.keep_every":
                 checkpoint.keep_every, "validation.every": validation.every,
                 "observe.parameters_every": observe.parameters_every}  # fmt: skip
    if observe.parameters_every and not observe.tensorboard:
        yield Problem("observe.parameters_every", str(observe.parameters_every),
                      "goes to TensorBoard", "observe.tensorboard = true")  # fmt: skip
    for key, interval in intervals.items():
        if interval is not None and (interval.value == 0 or interval.unit == "epochs"):
            yield Problem(key, str(interval), "steps, samples or tokens, greater than 0",
                          "for example '500 steps'")  # fmt: skip
