"""The run config: one frozen tree of sections.

`config_file.py` reads it from TOML and reports what is wrong, `config_rules.py` has the rules that
span several keys. Nothing else in the project restates a setting: DeepSpeed's JSON and the like are
derived from here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, model_validator

from pretrain.config_base import (
    AbsolutePath,
    Fraction,
    Positive,
    PositiveNumber,
    Rate,
    Section,
    union_by,
)
from pretrain.config_optim import AdamW, Optimizer
from pretrain.config_recipe import Constants, RecipeSection, build_recipe
from pretrain.config_sync import AllReduce, Mesh, Sync
from pretrain.quantities import Duration, Horizon
from pretrain.recipe import Recipe


class BloomModel(Section):
    """A BLOOM: ALiBi, LayerNorm after the embedding, fused QKV, tanh GELU, tied head."""

    family: Literal["bloom"] = "bloom"
    vocab_size: Positive = Field(description="rows of the embedding, padding included")
    hidden_size: Positive
    layers: Positive
    heads: Positive
    init_std: PositiveNumber | None = Field(
        None,
        description="standard deviation of the weights at initialisation (BLOOM: 0.0048 for all "
        "sizes); default sqrt(1 / (3 hidden_size)). Projections back into the residual stream "
        "get it divided by sqrt(2 layers)",
    )
    layernorm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    dropout: Fraction = Field(
        0.0, description="of embeddings, inside and after attention, after the MLP (BLOOM: 0.1)"
    )
    residual: bool = Field(True, description="false removes the skip connections (for studies)")


class HfModel(Section):
    """Any causal language model that transformers can build from a config."""

    family: Literal["hf"] = "hf"
    vocab_size: Positive
    config: dict[str, Any] = Field(
        description='the transformers config, "model_type" included; vocab_size comes from above'
    )


Model = union_by("family", BloomModel, HfModel)


class Source(Section):
    """One source of text, encoded as PATH.bin and PATH.idx in Megatron's MMap format."""

    name: str
    path: AbsolutePath = Field(
        description="path of the shard without .bin / .idx; default: data.directory/NAME"
    )
    weight: Rate = Field(1.0, description="share of the samples, relative to the other sources")


class Stage(Section):
    """A later part of the run, in which other weights hold."""

    begins: Horizon
    weights: Annotated[dict[str, Rate], Field(min_length=1)] = Field(
        description="weight of each source by name; sources that are not named rest"
    )


class Mixture(Section):
    """How the weights of the sources become shares of the samples."""

    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="share ~ weight * tokens^alpha: 0 takes the weights as they are, 1 the sizes "
        "of the sources, BLOOM's tokenizer text 0.3",
    )
    cap: Horizon | None = Field(
        None, description="sources count as no larger than this, for example '50B tokens'"
    )
    epoch_limit: Annotated[float, Field(gt=0)] = Field(
        4.0,
        description="a warning is given where a source is read more often; up to 4 epochs are "
        "nearly as good as new text (arXiv 2305.16264)",
    )
    stages: tuple[Stage, ...] = ()


class Data(Section):
    """What the model reads. The order of samples is a function of the seed and this section."""

    sequence_length: Positive = Field(description="tokens of a sample that are predicted")
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(
        description="the sources, or the path of a TOML file that holds them (from this one)"
    )
    directory: AbsolutePath | None = Field(
        None, description="where the shards of sources without a path lie"
    )
    mixture: Mixture = Mixture()
    order: Literal["keyed", "megatron"] = Field(
        "keyed",
        description="keyed: computed, nothing to build; megatron: the published index, to go on "
        "with a run begun there",
    )
    index_directory: AbsolutePath | None = Field(
        None, description="where the index files of order = 'megatron' are kept"
    )
    validation_fraction: Fraction = Field(
        0.05, description="share of the documents of each source, from its end, never trained on"
    )
    attention: Literal["window", "document"] = Field(
        "window",
        description="window: attention crosses the documents of a sample, as in BLOOM; document: "
        "it stays inside each",
    )
    epoch_tokens: Positive | None = Field(
        None,
        description="tokens of an epoch, for horizons in epochs; default: those of the shards "
        "that are trained on",
    )
    end_of_text: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="id of the token that ends a document (BLOOM: 2)"
    )
    tokenizer: AbsolutePath | None = Field(
        None, description="folder of the tokenizer, copied into exports and used to sample text"
    )

    def epoch(self) -> int | None:
        """Tokens of an epoch: as given, or counted in the shards; None where these are not here.

        Held-out documents are taken to be as long as the others.
        """
        if self.epoch_tokens is not None:
            return self.epoch_tokens
        try:
            tokens = sum(_shard_tokens(source.path) for source in self.sources)
        except (OSError, LookupError):
            return None
        return round(tokens * (1 - self.validation_fraction))

    @model_validator(mode="before")
    @classmethod
    def _place_sources(cls, value: Any) -> Any:
        """Give sources without a path theirs."""
        if not isinstance(value, dict) or not isinstance(value.get("directory"), str | Path):
            return value
        sources = value.get("sources")
        if not isinstance(sources, list | tuple):
            return value
        return value | {
            "sources": [
                {"path": str(Path(value["directory"]) / s["name"]), **s}
                if isinstance(s, dict) and isinstance(s.get("name"), str)
                else s
                for s in sources
            ]
        }


def _shard_tokens(path: Path) -> int:
    """Tokens of a shard, from the size of PATH.bin and the dtype code in PATH.idx (byte 17)."""
    with open(path.with_name(path.name + ".idx"), "rb") as index:
        code = index.read(18)[17]
    return path.with_name(path.name + ".bin").stat().st_size // int(TOKEN_DTYPES[code][2:])


# Little-endian numpy types by their code in an index: kind and bytes.
TOKEN_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class Engine(Section):
    """How the work is spread and computed; none of it changes what is learned, but for rounding."""

    zero_stage: Literal[1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations; masters and accumulation are fp32"
    )
    micro_batch_samples: Positive = Field(1, description="samples of one forward pass on a rank")
    activation_checkpointing: bool = False
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="cpu: masters and optimizer states lie in the host's memory and are stepped "
        "there; nothing is compiled for it",
    )


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
    parameters_every: Horizon | None = Field(
        None,
        description="norm, update and distribution of each parameter go to TensorBoard this often",
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one device, for the utilisation; default: measured at start"
    )


class Published(Section):
    """Figures of an earlier run of this recipe, which a plan shows beside its own."""

    source: str
    layout: str = Field(description="how that run was spread, since it changes the figures")
    rank_memory: ByteSize
    step_seconds: PositiveNumber
    device_tflops: PositiveNumber


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    directory: AbsolutePath = Field(
        Path("runs"), validate_default=True, description="the run is written to DIRECTORY/NAME"
    )
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
    optimizer: Optimizer = AdamW()
    engine: Engine = Engine()
    mesh: Mesh = Mesh()
    sync: Sync = AllReduce()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    guard: Guard = Guard()
    observe: Observe = Observe()
    published: Published | None = None

    @property
    def run_directory(self) -> Path:
        """Where everything that the run writes lies."""
        return self.directory / self.name

    @property
    def attention_end(self) -> int | None:
        """The token across which attention does not reach; None if it crosses documents."""
        return self.data.end_of_text if self.data.attention == "document" else None

    def resolved(self) -> dict[str, Any]:
        """Plain values (paths absolute, quantities as text) that `load` reads back unchanged."""
        return without_none(self.model_dump(mode="json"))

    def build_recipe(self) -> Recipe:
        """The recipe with all horizons converted to samples, once."""
        optimizer, data = self.optimizer, self.data
        return build_recipe(
            self.recipe,
            data.sequence_length,
            data.epoch,
            Constants(optimizer.weight_decay, optimizer.momenta, optimizer.clip_norm),
        )


def without_none(value: Any) -> Any:
    """A tree without the keys whose value is None, which TOML cannot say."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value
