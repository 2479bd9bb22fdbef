"""The optimizers of a run config: typed options with defaults from their papers, and what the
planner and the checks before launch have to know of each. No torch; the arithmetic is in
`pretrain.optim`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pretrain.config_base import Fraction, Positive, PositiveNumber, Rate, Section, union_by

Betas = tuple[Fraction, Fraction]
Shapes = Iterable[tuple[int, int, int]]
Role = Literal["embedding", "matrix", "head", "bias", "norm"]


@dataclass(frozen=True)
class Facts:
    """What holds for an optimizer whatever its options.

    `state` is the number of fp32 numbers that it keeps for a parameter, `roles` those it works on
    (None: all); the others are updated by AdamW, which keeps two. `learning_rate` is a usual peak
    for a small language model, around which `anthesis compare` looks.
    """

    kind: Literal["element-wise", "layer-wise", "matrix"]
    state: float
    source: str
    learning_rate: float
    roles: tuple[Role, ...] | None = None
    zero_stages: tuple[int, ...] = (1, 2, 3)
    precisions: tuple[str, ...] = ("bf16", "fp32")
    offload: bool = True
    averages: bool = False  # trains at one point and is evaluated at another


class OptimizerSection(Section):
    """What all optimizers have in common."""

    facts: ClassVar[Facts]

    weight_decay: Rate = Field(0.1, description="of the roles in decayed_roles")
    decayed_roles: tuple[Role, ...] = Field(
        ("embedding", "matrix", "head"),
        description="roles of parameters that decay (BLOOM: neither biases nor norms)",
    )
    clip_norm: Rate = Field(1.0, description="global norm to which gradients are cut; 0: never")

    @property
    def momenta(self) -> Betas:
        """(first, second) beta as the recipe governs them; 0 where there is none."""
        return getattr(self, "betas", (getattr(self, "momentum", 0.0), 0.0))

    @property
    def state_floats(self) -> float:
        """fp32 numbers kept for a parameter of the roles that this optimizer works on."""
        return self.facts.state

    def state_numbers(self, matrices: Shapes, others: int) -> float:
        """fp32 numbers kept on all ranks together, for hidden `matrices` (rows, columns, how many)
        and `others` parameters."""
        inside = sum(rows * columns * count for rows, columns, count in matrices)
        return self.state_floats * inside + (2 if self.facts.roles else self.state_floats) * others


# --- element-wise ---------------------------------------------------------------------------------


class AdamW(OptimizerSection):
    """Adam with decoupled weight decay; the defaults are BLOOM's."""

    facts = Facts("element-wise", 2, "Loshchilov and Hutter, arXiv 1711.05101", 2e-3)
    name: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.95)
    epsilon: PositiveNumber = 1e-8


class Adam(OptimizerSection):
    """Adam; weight decay is L2, added to the gradient."""

    facts = Facts("element-wise", 2, "Kingma and Ba, arXiv 1412.6980", 2e-3)
    name: Literal["adam"] = "adam"
    weight_decay: Rate = 0.0
    betas: Betas = (0.9, 0.999)
    epsilon: PositiveNumber = 1e-8


class Sgd(OptimizerSection):
    """Gradient descent, with momentum where it is above 0; weight decay is L2."""

    facts = Facts("element-wise", 1, "Sutskever et al., ICML 2013 (momentum)", 0.5)
    name: Literal["sgd"] = "sgd"
    weight_decay: Rate = 0.0
    momentum: Fraction = 0.9
    nesterov: bool = False

    @property
    def state_floats(self) -> float:
        """The momentum, if there is one."""
        return 1 if self.momentum else 0


class Sgdw(Sgd):
    """Gradient descent with momentum and decoupled weight decay."""

    facts = Facts("element-wise", 1, "Loshchilov and Hutter, arXiv 1711.05101", 0.5)
    name: Literal["sgdw"] = "sgdw"  # type: ignore[assignment]
    weight_decay: Rate = 1e-4


class Adagrad(OptimizerSection):
    """Adagrad; weight decay is L2."""

    facts = Facts("element-wise", 1, "Duchi et al., JMLR 12 (2011)", 3e-2)
    name: Literal["adagrad"] = "adagrad"
    weight_decay: Rate = 0.0
    epsilon: PositiveNumber = 1e-10
    initial_accumulator: Rate = 0.0


class Adadelta(OptimizerSection):
    """Adadelta, whose rate is 1 in the paper; weight decay is L2."""

    facts = Facts("element-wise", 2, "Zeiler, arXiv 1212.5701", 1.0)
    name: Literal["adadelta"] = "adadelta"
    weight_decay: Rate = 0.0
    rho: Fraction = 0.9
    epsilon: PositiveNumber = 1e-6


class RmsProp(OptimizerSection):
    """RMSprop, with momentum where it is above 0; weight decay is L2."""

    facts = Facts("element-wise", 1, "Tieleman and Hinton 2012, lecture 6.5", 1e-3)
    name: Literal["rmsprop"] = "rmsprop"
    weight_decay: Rate = 0.0
    alpha: Fraction = 0.99
    epsilon: PositiveNumber = 1e-8
    momentum: Fraction = 0.0

    @property
    def state_floats(self) -> float:
        """The mean square, and the momentum if there is one."""
        return 2 if self.momentum else 1


class Lion(OptimizerSection):
    """The sign of an interpolated momentum; wants a third to a tenth of AdamW's rate, and as much
    more decay."""

    facts = Facts("element-wise", 1, "Chen et al., arXiv 2302.06675", 3e-4)
    name: Literal["lion"] = "lion"
    weight_decay: Rate = 1.0
    betas: Betas = (0.9, 0.99)


class AdEmaMix(OptimizerSection):
    """AdamW with a second, slow momentum, whose weight and half-life grow over `warmup_steps`."""

    facts = Facts("element-wise", 3, "Pagliardini et al., arXiv 2409.03137", 1e-3)
    name: Literal["ademamix"] = "ademamix"
    betas: Betas = (0.9, 0.999)
    slow_beta: Fraction = 0.9999
    slow_weight: Rate = Field(5.0, description="alpha of the paper")
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = Field(
        0, description="of slow_beta and slow_weight; the paper takes the length of the run"
    )
    epsilon: PositiveNumber = 1e-8


class ScheduleFreeAdamW(OptimizerSection):
    """Schedule-Free AdamW: trains at y, is evaluated and saved at the average x. Takes a constant
    learning rate (with a warm-up) in place of a decaying one."""

    facts = Facts("element-wise", 2, "Defazio et al., arXiv 2405.15682", 5e-3, averages=True)
    name: Literal["schedulefree"] = "schedulefree"
    betas: Betas = Field((0.9, 0.95), description="the first interpolates between z and x")
    epsilon: PositiveNumber = 1e-8
    averaging_power: Rate = Field(0.0, description="r of the paper: later steps count (k+1)^r")
    rate_power: Rate = Field(2.0, description="weight of a step ~ (largest rate so far)^this")


class ScheduleFreeSgd(OptimizerSection):
    """Schedule-Free SGD; see `schedulefree`."""

    facts = Facts("element-wise", 1, "Defazio et al., arXiv 2405.15682", 1.0, averages=True)
    name: Literal["schedulefree-sgd"] = "schedulefree-sgd"
    weight_decay: Rate = 0.0
    momentum: Fraction = Field(0.9, description="interpolates between z and x")
    averaging_power: Rate = 0.0
    rate_power: Rate = 2.0


# --- layer-wise -----------------------------------------------------------------------------------


class Lars(OptimizerSection):
    """The rate of each parameter follows the norms of its weights and gradient; parameters that do
    not decay (biases, norms) take the plain rate. `clip` is LARC: never above the plain rate."""

    facts = Facts("layer-wise", 1, "You et al., arXiv 1708.03888", 5.0)
    name: Literal["lars"] = "lars"
    weight_decay: Rate = 1e-4
    momentum: Fraction = 0.9
    nesterov: bool = False
    trust: PositiveNumber = Field(1e-3, description="eta of the paper")
    epsilon: PositiveNumber = 1e-8
    clip: bool = False


class Lamb(OptimizerSection):
    """AdamW's update, scaled for each parameter to the norm of its weights; parameters that do not
    decay take the plain update unless `always_adapt`."""

    facts = Facts("layer-wise", 2, "You et al., arXiv 1904.00962", 1e-2)
    name: Literal["lamb"] = "lamb"
    weight_decay: Rate = 0.01
    betas: Betas = (0.9, 0.999)
    epsilon: PositiveNumber = 1e-6
    ratio_limit: PositiveNumber | None = Field(
        None, description="largest trust ratio; 1 is LAMBC, default: none"
    )
    always_adapt: bool = False


class Adafactor(OptimizerSection):
    """Adam's second moment as rows x columns, without a first one. `recipe.learning_rate` bounds
    the relative step, as in torch.optim.Adafactor."""

    facts = Facts("layer-wise", 0.01, "Shazeer and Stern, arXiv 1804.04235", 2e-2)
    name: Literal["adafactor"] = "adafactor"
    weight_decay: Rate = 0.0
    beta2_decay: Annotated[float, Field(lt=0)] = Field(
        -0.8, description="beta2 of step t is 1 - t^this"
    )
    epsilons: tuple[PositiveNumber, PositiveNumber] = Field(
        (2**-23, 1e-3),
        description="least RMS of a gradient (torch's default, that of fp32) and of the weights",
    )
    clip_threshold: PositiveNumber = Field(1.0, description="largest RMS of an update")

    def state_numbers(self, matrices: Shapes, others: int) -> float:
        """A row and a column for each matrix, one for each element of a vector.

        An estimate for `others`: the vectors beside a matrix (its bias, its share of norms) are
        taken to be as long as its sides, the rest to be embeddings of the narrowest width.
        """
        shapes = list(matrices)
        sides = sum((rows + columns) * count for rows, columns, count in shapes)
        width = min((min(rows, columns) for rows, columns, _ in shapes), default=1)
        return sides + min(sides, others) + max(0, others - sides) / width


# --- matrix ---------------------------------------------------------------------------------------

_MATRICES: tuple[Role, ...] = ("matrix",)


class _MatrixSection(OptimizerSection):
    """Hidden matrices by the method itself; embeddings, head and vectors by AdamW."""

    adamw_betas: Betas = (0.9, 0.95)
    adamw_epsilon: PositiveNumber = 1e-8
    adamw_rate: PositiveNumber = Field(
        1.0, description="learning rate of the parameters left to AdamW, as a factor"
    )


class Muon(_MatrixSection):
    """Orthogonalised momentum. With scale "rms" the rates of AdamW serve; with "spectral" the
    update of a rows x columns matrix is scaled by sqrt(max(1, rows / columns))."""

    facts = Facts("matrix", 1, "Jordan et al. 2024; Liu et al., arXiv 2502.16982", 2e-3, _MATRICES)
    name: Literal["muon"] = "muon"
    momentum: Fraction = 0.95
    nesterov: bool = True
    scale: Literal["rms", "spectral"] = Field(
        "rms", description='rms: 0.2 sqrt(max(rows, columns)), torch\'s "match_rms_adamw"'
    )
    iterations: Positive = Field(5, description="of Newton and Schulz")
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the iterations")
    split_qkv: bool = Field(True, description="fused query, key and value are three matrices")


class Soap(_MatrixSection):
    """AdamW in the eigenbasis of Shampoo's preconditioner."""

    # States lie with the owners of the matrices, on their devices: there is little to offload.
    facts = Facts("matrix", 2, "Vyas et al., arXiv 2409.11321", 2e-3, _MATRICES, offload=False)
    name: Literal["soap"] = "soap"
    weight_decay: Rate = 0.01
    betas: Betas = (0.95, 0.95)
    epsilon: PositiveNumber = 1e-8
    every_steps: Positive = Field(10, description="steps between changes of the basis")
    largest_side: Positive = Field(
        10_000, description="a side longer than this keeps its own basis"
    )
    split_qkv: bool = True

    def state_numbers(self, matrices: Shapes, others: int) -> float:
        """Two moments, and for each side that is not too long its statistics and its basis.

        A matrix three times as long as wide is taken for a fused query, key and value.
        """
        shapes = list(matrices)
        sides = 0
        for rows, columns, count in shapes:
            short, long = sorted((rows, columns))
            fused = self.split_qkv and long == 3 * short
            both, number = ((short, short), 3 * count) if fused else ((short, long), count)
            sides += sum(2 * side**2 * number for side in both if side <= self.largest_side)
        return super().state_numbers(shapes, others) + sides


# --- the user's own -------------------------------------------------------------------------------


class OwnOptimizer(OptimizerSection):
    """An element-wise torch.optim.Optimizer of the user's own, as "module:Class"; it is refused if
    a step on a part of a tensor differs from one on the whole."""

    facts = Facts("element-wise", 2, "yours", 1e-3)
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = "module:Class"
    betas: Betas | None = Field(
        None, description="governed by the recipe if given; default: left as the class has them"
    )
    options: dict[str, Any] = Field(default={}, description="keyword arguments of the class")
    state: Rate = Field(2.0, description="fp32 numbers it keeps for a parameter, for the planner")

    @property
    def momenta(self) -> Betas:
        """The betas, if given."""
        return self.betas or (0.0, 0.0)

    @property
    def state_floats(self) -> float:
        """As told."""
        return self.state


Optimizer = union_by(
    "name",
    AdamW,
    Adam,
    Sgd,
    Sgdw,
    Adagrad,
    Adadelta,
    RmsProp,
    Lion,
    AdEmaMix,
    ScheduleFreeAdamW,
    ScheduleFreeSgd,
    Lars,
    Lamb,
    Adafactor,
    Muon,
    Soap,
    OwnOptimizer,
    tag_of=lambda name: "module:Class" if ":" in str(name) else name,
)
