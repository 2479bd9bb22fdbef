"""Which ranks hold a replica together, and how the replicas are kept in step: one section for each
method, with its paper's defaults."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ByteSize, Field

from pretrain.config_base import Fraction, Positive, PositiveNumber, Section, union_by
from pretrain.quantities import Duration, Horizon


class Mesh(Section):
    """How ranks are dealt to replicas of the model."""

    shard_ranks: Positive | None = Field(
        None,
        description="consecutive ranks over which ZeRO spreads a replica, such as those of a node; "
        "default: all ranks, so there is one replica",
    )
    check_every: Horizon | None = Field(
        Horizon(100, "steps"),
        description="how often checksums of all replicas are compared, as they are at every "
        "checkpoint",
    )


@dataclass(frozen=True)
class SyncFacts:
    """What the rest of the house must know of a method."""

    every_step: bool  # whether replicas take the same step, so that they are always alike
    source: str


class SyncSection(Section):
    """Base of all methods."""

    facts: ClassVar[SyncFacts]


class AllReduce(SyncSection):
    """The mean of all gradients, exactly."""

    facts: ClassVar[SyncFacts] = SyncFacts(every_step=True, source="")

    method: Literal["allreduce"] = "allreduce"
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of gradients on the wire; sums are fp32"
    )
    bucket: ByteSize = Field(
        ByteSize(64 * 2**20),
        validate_default=True,
        gt=0,
        description="size of a message; several are under way at once",
    )


class PowerSgd(SyncSection):
    """Low-rank approximations of the gradients of matrices, what they miss being added to the next
    ones."""

    facts: ClassVar[SyncFacts] = SyncFacts(every_step=True, source="arXiv 1905.13727")

    method: Literal["powersgd"] = "powersgd"
    rank: Positive = Field(4, description="of the approximation; more is closer and dearer")
    start: Horizon = Field(
        Horizon(0, "tokens"), description="plain all-reduce until then, for example '1B tokens'"
    )
    min_compression: Annotated[float, Field(ge=1)] = Field(
        2.0, description="matrices that would not shrink by more than this go whole"
    )
    error_feedback: bool = True
    warm_start: bool = Field(True, description="each step refines the factors of the one before")


class Quantized(SyncSection):
    """Gradients of 8 or 4 bits with a scale for each block, rounding errors being added to the next
    ones."""

    facts: ClassVar[SyncFacts] = SyncFacts(every_step=True, source="arXiv 2306.10209")

    method: Literal["quantized"] = "quantized"
    bits: Literal[8, 4] = 8
    start: Horizon = Field(
        Horizon(0, "tokens"), description="plain all-reduce until then, for example '1B tokens'"
    )
    error_feedback: bool = True


class OuterSection(SyncSection):
    """Base of the methods whose replicas train by themselves and meet every `every_steps`."""

    every_steps: Positive
    coordinator: Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")] | None = Field(
        None,
        description="HOST:PORT of `anthesis coordinator`: then each replica is a launch of its "
        "own, and may leave or join while the others train",
    )
    replicas: Positive = Field(
        2, description="with a coordinator: launches that the run waits for at its start"
    )
    lost_after: Duration = Field(
        Duration(30, "s"),
        description="with a coordinator: a replica not heard of for so long is left behind",
    )

    @property
    def outer(self) -> tuple[float, float]:
        """Rate and momentum of the outer step."""
        raise NotImplementedError

    @property
    def bits(self) -> int:
        """Of a number on the wire."""
        return {"fp32": 32, "int8": 8, "int4": 4}[getattr(self, "precision", "fp32")]


class DiLoCo(OuterSection):
    """Outer steps of Nesterov's momentum on the difference that the replicas' own steps made."""

    facts: ClassVar[SyncFacts] = SyncFacts(False, "arXiv 2311.08105, 2501.18512")

    method: Literal["diloco"] = "diloco"
    every_steps: Positive = Field(50, description="H: a replica's own steps between outer steps")
    outer_rate: PositiveNumber = 0.7
    outer_momentum: Fraction = 0.9
    precision: Literal["fp32", "int8", "int4"] = Field(
        "fp32", description="of the differences on the wire"
    )
    parts: Positive = Field(
        1, description="streaming: the model in so many parts, whose outer steps take turns"
    )
    delay_steps: Annotated[int, Field(ge=0, strict=True)] = Field(
        0, description="streaming: own steps during which a difference is under way"
    )
    mix: Fraction = Field(
        0.0,
        description="streaming: weight that a replica's own parameters keep when an outer step "
        "arrives (the paper, which delays it: 0.5)",
    )

    @property
    def outer(self) -> tuple[float, float]:
        """Rate and momentum of the outer step."""
        return self.outer_rate, self.outer_momentum


class LocalSgd(OuterSection):
    """Plain averaging of the replicas' weights."""

    facts: ClassVar[SyncFacts] = SyncFacts(False, "arXiv 1805.09767")

    method: Literal["localsgd"] = "localsgd"
    every_steps: Positive = Field(30, description="a replica's own steps between averages")
    parts: ClassVar[int] = 1
    delay_steps: ClassVar[int] = 0
    mix: ClassVar[float] = 0.0

    @property
    def outer(self) -> tuple[float, float]:
        """Rate and momentum of the outer step: the mean itself."""
        return 1.0, 0.0


Sync = union_by("method", AllReduce, PowerSgd, Quantized, DiLoCo, LocalSgd)


def parse_sync(text: str) -> SyncSection:
    """A method as written for a plan: "allreduce:bf16", "powersgd:2", "int8", "int4", "diloco:50",
    "diloco:50:int4", "localsgd:9".

    Raises ValueError with the rule.
    """
    method, *options = text.split(":")
    try:
        if method == "allreduce" and len(options) <= 1:
            return AllReduce(precision=(options or ["fp32"])[0])  # type: ignore[arg-type]
        if method == "powersgd" and len(options) <= 1:
            return PowerSgd(rank=int(*options or ["4"]))
        if method in ("int8", "int4") and not options:
            return Quantized(bits=8 if method == "int8" else 4)
        if method == "localsgd" and len(options) <= 1:
            return LocalSgd(every_steps=int(*options or ["30"]))
        if method == "diloco" and len(options) <= 2:
            steps, width = [*options, *["50", "fp32"][len(options) :]]
            return DiLoCo(every_steps=int(steps), precision=width)  # type: ignore[arg-type]
    except ValueError:  # pydantic's is one
        pass
    raise ValueError(
        f"{text!r}: one of allreduce[:bf16], powersgd[:RANK], int8, int4, "
        "diloco[:STEPS[:int8|int4]], localsgd[:STEPS]"
    )
