"""The run config: one TOML file plus `key.sub=value` overrides -> one frozen tree.

Everything wrong with a config is reported at once: what was found, the rule, the cure and the key.
Nothing else in the project restates a setting; DeepSpeed's JSON and the like are derived from here.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from pretrain.errors import ConfigError, Problem
from pretrain.quantities import Duration, Horizon
from pretrain.recipe import LinearRamp, Recipe, WarmupCosine

Positive = Annotated[int, Field(gt=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all config sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BloomModel(Section):
    """A BLOOM: ALiBi, LayerNorm after the embedding, fused QKV, tanh GELU, tied head."""

    family: Literal["bloom"] = "bloom"
    vocab_size: Positive = Field(description="rows of the embedding, padding included")
    hidden_size: Positive
    layers: Positive
    heads: Positive
    init_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="standard deviation of the weights at initialisation (BLOOM: 0.0048 for all "
        "sizes); default sqrt(1 / (3 hidden_size)). Projections back into the residual stream "
        "get it divided by sqrt(2 layers)",
    )
    layernorm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    dropout: Fraction = Field(0.0, description="after the embedding, attention and MLP")
    residual: bool = Field(True, description="false removes the skip connections (for studies)")


class HfModel(Section):
    """Any causal language model that transformers can build from a config."""

    family: Literal["hf"] = "hf"
    vocab_size: Positive
    config: dict[str, Any] = Field(
        description='the transformers config, "model_type" included; vocab_size comes from above'
    )


def _family(value: Any) -> str:
    return value.get("family", "bloom") if isinstance(value, dict) else value.family


Model = Annotated[
    Annotated[BloomModel, Tag("bloom")] | Annotated[HfModel, Tag("hf")], Discriminator(_family)
]


class Source(Section):
    """One source of text, encoded as PATH.bin and PATH.idx in Megatron's MMap format."""

    name: str
    path: Path = Field(description="path of the shard without .bin / .idx")
    weight: Rate = Field(1.0, description="share of the samples, relative to the other sources")


class Data(Section):
    """What the model reads. The order of samples is a function of the seed and this section."""

    sequence_length: Positive = Field(description="tokens of a sample that are predicted")
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    validation_fraction: Fraction = Field(
        0.05, description="share of the documents of each source, from its end, never trained on"
    )
    tokenizer: Path | None = Field(
        None, description="folder of the tokenizer, copied into exports and used to sample text"
    )


class LearningRate(Section):
    """Linear warm-up, then cosine to a floor; the rate of an update is that of the samples consumed
    before it, so the first update has rate 0 (as in BLOOM)."""

    peak: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    floor: Rate = 0.0
    warmup: Horizon = Horizon(0, "tokens")
    decay: Horizon = Field(description="where the cosine reaches the floor")


class Batch(Section):
    """Samples of a global batch: constant, or growing linearly from `start` to `final`."""

    final: Positive
    start: Positive | None = Field(None, description="default: final, so a constant batch")
    increment: Positive | None = None
    ramp: Horizon | None = Field(None, description="length of the growth")


class RecipeSection(Section):
    """Length, learning rate and batch of the run, on the token clock."""

    train: Horizon = Field(description="length of the run; a partial last batch is dropped")
    learning_rate: LearningRate
    batch: Batch


class Optimizer(Section):
    """The optimizer and its constants."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    weight_decay: Rate = Field(0.1, description="of embeddings and matrices, not biases and norms")
    clip_norm: Rate = Field(1.0, description="global norm to which gradients are cut; 0: never")


class Engine(Section):
    """How the work is spread and computed; none of it changes what is learned, but for rounding."""

    zero_stage: Literal[1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations; masters and accumulation are fp32"
    )
    micro_batch_samples: Positive = Field(1, description="samples of one forward pass on a rank")
    activation_checkpointing: bool = False


class Checkpoint(Section):
    """When a checkpoint is due and how many are kept."""

    every: Horizon = Horizon(500, "steps")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_every: Horizon | None = Field(None, description="also keep the first after each of these")


class Validation(Section):
    """Loss on held-out samples during the run."""

    every: Horizon | None = None
    samples: Positive = 64


class Guard(Section):
    """What happens to steps whose loss or gradient is not finite: skipped, up to a limit."""

    max_skipped_in_a_row: Annotated[int, Field(ge=0, strict=True)] = 3


class Observe(Section):
    """What is shown and recorded."""

    console_every_steps: Positive = 1
    tensorboard: bool = True
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one device, for the utilisation; default: measured at start"
    )


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    directory: Path = Field(Path("runs"), description="the run is written to DIRECTORY/NAME")
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    start: Literal["auto", "resume", "fresh"] = Field(
        "auto",
        description="auto: go on from the newest checkpoint if there is one; resume: demand one; "
        "fresh: begin anew, an earlier run of this name is moved aside",
    )
    timeout: Duration = Field(
        Duration(1800, "s"), description="of a collective; then the run stops with an error"
    )
    model: Model
    data: Data
    recipe: RecipeSection
    optimizer: Optimizer = Optimizer()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    guard: Guard = Guard()
    observe: Observe = Observe()

    @property
    def run_directory(self) -> Path:
        """Where everything that the run writes lies."""
        return self.directory / self.name

    def resolved(self) -> dict[str, Any]:
        """Plain values (paths absolute, quantities as text) that `load` reads back unchanged."""
        return _without_none(self.model_dump(mode="json"))

    def build_recipe(self) -> Recipe:
        """The recipe with all horizons converted to samples, once."""
        length, rate, batch = (
            self.data.sequence_length,
            self.recipe.learning_rate,
            self.recipe.batch,
        )
        ramp = batch.ramp.samples(length) if batch.ramp else 0
        return Recipe(
            sequence_length=length,
            train_samples=self.recipe.train.samples(length),
            learning_rate=WarmupCosine(
                rate.peak, rate.floor, rate.warmup.samples(length), rate.decay.samples(length)
            ),
            batch=LinearRamp(batch.start or batch.final, batch.final, batch.increment or 1, ramp),
            weight_decay=self.optimizer.weight_decay,
            betas=self.optimizer.betas,
        )


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply overrides, validate everything.

    Relative paths are taken from the working directory. Raises ConfigError with all problems.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [Problem("CONFIG", str(path), "a readable TOML file",
                          f"{error.strerror}: check the path")]) from None  # fmt: skip
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem("CONFIG", str(path), "valid TOML in UTF-8",
                          str(error))]) from None  # fmt: skip
    problems = [p for text in overrides or [] if (p := _override(tree, text))]
    config, found = validate(tree)
    problems += found
    if problems or config is None:
        raise ConfigError(str(path), problems)
    return config


def validate(tree: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """All problems of a config tree; the config if there are none."""
    problems: list[Problem] = []
    try:
        config = Config.model_validate(_absolute_paths(tree))
        good: dict[str, Any] = {name: getattr(config, name) for name in Config.model_fields}
    except ValidationError as error:
        # A list left too short by errors inside it is no problem of its own.
        details = [d for d in error.errors() if d["type"] != "too_short" or not d["input"]]
        config, problems = None, [_explain(detail) for detail in details]
        good = _valid_sections(tree)
    for needs, check in _CHECKS:
        if all(need in good for need in needs):
            problems += check(*(good[need] for need in needs))
    return (None if problems else config), problems


def schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    return Config.model_json_schema()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf in which two resolved configs differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


# --- reading -------------------------------------------------------------------------------------


def _override(tree: dict[str, Any], text: str) -> Problem | None:
    """Apply "a.b=value" to `tree`; the value is TOML, or a plain string where it is not."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return Problem("override", text, "key.sub=value", "for example engine.zero_stage=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        else:
            node = None
    if isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
        node[int(leaf)] = parsed
    elif isinstance(node, dict):
        node[leaf] = parsed
    else:
        return Problem("override", text, "the key must lie inside a section", "check the key")
    return None


def _absolute_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree whose paths are absolute, so that the saved config works from anywhere."""

    def absolute(value: Any) -> Any:
        return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) else value

    tree = {"directory": "runs", **tree}
    tree["directory"] = absolute(tree["directory"])
    if isinstance(data := tree.get("data"), dict):
        data = dict(data)
        if "tokenizer" in data:
            data["tokenizer"] = absolute(data["tokenizer"])
        if isinstance(sources := data.get("sources"), list):
            data["sources"] = [
                {**s, "path": absolute(s["path"])} if isinstance(s, dict) and "path" in s else s
                for s in sources
            ]
        tree["data"] = data
    return tree


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


# --- explaining ----------------------------------------------------------------------------------


def _explain(detail: Any) -> Problem:
    """A pydantic error in our words: the key, what was found, the rule and the cure."""
    location = [part for part in detail["loc"] if part not in ("bloom", "hf")]
    key, found, message = ".".join(map(str, location)), detail.get("input"), detail["msg"]
    message = message.removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        names = _names_at(detail["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(names))}"
        return Problem(key, found, "no such key", cure)
    if detail["type"] == "missing":
        return Problem(key, None, "the key is required", f"add it ({_describe(detail['loc'])})")
    if detail["type"] == "union_tag_invalid":
        return Problem(f"{key}.family", _family(found), "a known model family",
                       'use "bloom" or "hf"')  # fmt: skip
    return Problem(key, found, message[0].lower() + message[1:], f"{_describe(detail['loc'])}")


def _names_at(location: tuple[Any, ...]) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section else []


def _section_at(location: tuple[Any, ...]) -> type[Section] | None:
    """The section class that a pydantic error location points into."""
    section: type[Section] = Config
    for part in location:
        if part in ("bloom", "hf"):
            section = BloomModel if part == "bloom" else HfModel
        elif isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            inner = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
            if inner:
                section = inner[0]
    return section


def _describe(location: tuple[Any, ...]) -> str:
    section = _section_at(location[:-1])
    if section and (field := section.model_fields.get(str(location[-1]))):
        return field.description or "see `anthesis config --schema`"
    return "see `anthesis config --schema`"


def _valid_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """The sections that are valid by themselves, so that cross checks run where they can."""
    good = {}
    for name, field in Config.model_fields.items():
        if name in tree:
            only = _absolute_paths({name: tree[name]}).get(name)
            wrapper = type("One", (Section,), {"__annotations__": {"value": field.annotation}})
            try:
                good[name] = wrapper(value=only).value
            except ValidationError:
                continue
        elif not field.is_required():
            good[name] = field.default
    return good


# --- rules that span several keys ----------------------------------------------------------------

_CHECKS: list[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]] = []


def _check(*needs: str) -> Callable[[Callable[..., Iterator[Problem]]], Any]:
    def register(function: Callable[..., Iterator[Problem]]) -> Any:
        _CHECKS.append((needs, function))
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
                      f"must not exceed peak = {rate.peak}", "BLOOM: a tenth of the peak")  # fmt: skip
    if recipe.train.samples(length) < (batch.start or batch.final):
        yield Problem("recipe.train", str(recipe.train),
                      f"at least one batch: {batch.start or batch.final} samples of {length} tokens",
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
