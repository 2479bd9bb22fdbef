"""The training engine: DeepSpeed ZeRO 1, 2 or 3 behind the few verbs that the loop needs.

DeepSpeed shards and communicates; accumulation, loss scaling, clipping and the settings of each
step are ours (`managed_gradient_accumulation: false`), so that any batch runs on any ranks and the
gradient is the mean over the tokens of the global batch, however it is split.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import Engine as EngineConfig
from pretrain.config_optim import OptimizerSection
from pretrain.engine.fragments import Fragment, FragmentMap
from pretrain.engine.world import World
from pretrain.optim.groups import fused_matrices, parameter_groups, parameter_roles
from pretrain.optim.registry import build_optimizer
from pretrain.optim.statistics import Measurement, ParameterStatistics
from pretrain.recipe import StepPlan
from pretrain.wire import BUCKET_ELEMENTS, LIVE_ELEMENTS


@dataclass(frozen=True)
class StepStats:
    """What a step's forward and backward passes found; the same on all ranks."""

    loss: float  # mean over the tokens of the global batch, in nats
    grad_norm: float  # global L2 norm of its gradient, before clipping


def deepspeed_settings(config: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's own config, derived from ours: nothing in it is written by hand."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if config.zero_stage == 3:
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_ELEMENTS
    else:
        zero["compute_grad_norm"] = False  # ours, before the step, so that the guard can judge it
    return {
        # DeepSpeed insists on these two; neither governs anything under unmanaged accumulation.
        "train_micro_batch_size_per_gpu": config.micro_batch_samples,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # of gradients; the default would round sums to bf16
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
    }


def rows_of_rank(batch_samples: int, world: World) -> tuple[int, int]:
    """[first, end) of the rows of a global batch that this rank works on: contiguous and even.

    The set of samples in a step does not depend on the number of ranks; only this split does.
    """
    first = batch_samples * world.rank // world.size
    return first, batch_samples * (world.rank + 1) // world.size


class ZeroEngine:
    """A model and its optimizer, sharded over the ranks of `world`.

    `model(tokens_bt, targets_bt)` returns the sum over tokens of the negative log likelihood.
    DeepSpeed shards, communicates and accumulates; the step itself is ours, over the masters of all
    groups at once, so that an optimizer may look at whole parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSection,
        config: EngineConfig,
        world: World,
    ) -> None:
        self.config, self.world = config, world
        roles, matrices = parameter_roles(model), fused_matrices(model)
        # Never stepped: it tells DeepSpeed which parameters lie together.
        holder = torch.optim.SGD(parameter_groups(model), lr=0.0)
        self._engine = _initialize(model, holder, config)
        self._zero = self._engine.optimizer
        parameters = dict(self._engine.module.named_parameters())
        self._map = FragmentMap(
            self._zero, parameters, roles, matrices, config.zero_stage, world,
            config.offload == "cpu",
        )  # fmt: skip
        self.use_optimizer(optimizer)

    def use_optimizer(self, section: OptimizerSection) -> None:
        """Begin anew with an optimizer, from the weights as they are; collective."""
        self._section = section
        self.optimizer = build_optimizer(self._map.shards, section)
        self._map.states = self.optimizer.state
        self._as_built = [_numbers(group) for group in self.optimizer.param_groups]

    @property
    def module(self) -> nn.Module:
        """The model; under ZeRO 3 its parameters are whole only inside its modules' passes."""
        return self._engine.module

    def parameter_count(self) -> int:
        """Parameters of the whole model."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        return sum(sizes)

    def fragments(self) -> list[Fragment]:
        """What this rank owns, as live views."""
        return self._map.fragments()

    def forward_backward(self, rows: Tensor, batch_samples: int) -> StepStats:
        """Accumulate the gradient of this rank's `rows` (n x (T + 1) token ids, n may be 0).

        All ranks make the same number of passes, since the collectives need it: a rank without
        rows left runs a pass over a single token with weight zero.
        """
        self._engine.train()
        per_rank = -(-batch_samples // self.world.size)
        micro = self.config.micro_batch_samples
        tokens_in_batch = batch_samples * (rows.shape[1] - 1)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for first in range(0, per_rank, micro):
            chunk, weight = rows[first : first + micro], 1.0
            if len(chunk) == 0:
                chunk, weight = rows.new_zeros(1, 2), 0.0
            chunk = chunk.to(self.world.device, non_blocking=True)
            loss_sum = self._engine(chunk[:, :-1], chunk[:, 1:])
            # DeepSpeed averages gradients over the ranks; the sum is wanted.
            self._engine.backward(loss_sum * (weight * self.world.size / tokens_in_batch))
            total += weight * loss_sum.detach()
        self._finish_accumulation()
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if gradients := self._map.flat_gradients():
            square += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        loss_and_square = self.world.sum(torch.stack([total / tokens_in_batch, square]))
        loss, square_norm = loss_and_square.tolist()  # the step's one wait for the device
        return StepStats(loss, square_norm**0.5)

    @torch.no_grad()
    def step(
        self, plan: StepPlan, stats: StepStats, measure: bool = False
    ) -> ParameterStatistics | None:
        """Clip to the global norm, then update with exactly the settings of `plan`; with `measure`
        says what that did to each parameter."""
        if plan.clip_norm and stats.grad_norm > plan.clip_norm:
            scale = plan.clip_norm / (stats.grad_norm + 1e-6)
            torch._foreach_mul_(self._map.flat_gradients(), scale)
        self._weight_decay = plan.weight_decay  # told back where no role decays
        decayed, governed = self._section.decayed_roles, any(self._section.momenta)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate
            group["weight_decay"] = plan.weight_decay if group["role"] in decayed else 0.0
            if "betas" in group and governed:
                group["betas"] = plan.betas
            elif "momentum" in group and governed:
                group["momentum"] = plan.betas[0]
        self._map.hand_over_gradients()
        measurement = Measurement(self._map.shards) if measure else None
        self.optimizer.step()
        self._map.discard_gradients()
        self._map.refresh_weights()
        return measurement and measurement.finish(getattr(self.optimizer, "ratios", None))

    def discard(self) -> None:
        """Drop the accumulated gradients; the weights stay as they are."""
        self._map.discard_gradients()

    def applied(self) -> dict[str, Any]:
        """Rate, betas and decay of the last step, read back from the optimizer's groups."""
        groups, section = self.optimizer.param_groups, self._section
        decayed = [group for group in groups if group["role"] in section.decayed_roles]
        decays = {group["weight_decay"] for group in decayed} or {self._weight_decay}
        rates = {group["lr"] for group in groups}
        betas = {
            tuple(group["betas"]) if "betas" in group else (group["momentum"], section.momenta[1])
            for group in groups
            if any(section.momenta) and ("betas" in group or "momentum" in group)
        }
        if len(rates) != 1 or len(decays) != 1 or len(betas) > 1:
            raise RuntimeError(f"parameter groups disagree: {rates}, {decays}, {betas}")
        return {
            "learning_rate": rates.pop(),
            "betas": betas.pop() if betas else section.momenta,
            "weight_decay": decays.pop(),
        }

    @property
    def keeps_average(self) -> bool:
        """Whether what is evaluated and exported is an average, not the weights of training."""
        return hasattr(self.optimizer, "eval")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, masters and model hold the weights that are evaluated and exported: the average
        where the optimizer keeps one, else those of training. Afterwards all is as before, bit by
        bit. Collective."""
        if not self.keeps_average:
            yield
            return
        trained = [master.detach().clone() for master in self._map.masters]
        with torch.no_grad():
            self.optimizer.eval()
            self._map.refresh_weights()
            try:
                yield
            finally:
                self.optimizer.train()
                for master, kept in zip(self._map.masters, trained, strict=True):
                    master.copy_(kept)
                self._map.refresh_weights()

    @torch.no_grad()
    def evaluate(self, rows: Tensor, batch_samples: int) -> float:
        """Mean loss over the tokens of `batch_samples` rows, this rank's share of which is `rows`.

        Passes are counted as in `forward_backward`, for ZeRO 3 gathers weights in them.
        """
        with self.averaged():
            return self._evaluate(rows, batch_samples)

    def _evaluate(self, rows: Tensor, batch_samples: int) -> float:
        self._engine.eval()
        micro = self.config.micro_batch_samples
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for first in range(0, -(-batch_samples // self.world.size), micro):
            chunk = rows[first : first + micro]
            idle = len(chunk) == 0
            chunk = (rows.new_zeros(1, 2) if idle else chunk).to(self.world.device)
            loss_sum = self._engine(chunk[:, :-1], chunk[:, 1:])
            total += 0.0 if idle else loss_sum
        return self.world.sum(total).item() / (batch_samples * (rows.shape[1] - 1))

    def close(self) -> None:
        """Let go of the model. DeepSpeed hangs hooks into autograd's graph, where the collector
        does not see the cycle: without this every engine of a process stays in memory."""
        self._engine.destroy()

    # --- state of the optimizer that is not a fragment --------------------------------------------

    def optimizer_scalars(self) -> dict[str, float]:
        """State that is one number for all parameters: Adam's step count (by its name), and what
        an optimizer changes in its groups (as "group.NAME")."""
        scalars: dict[str, set[float]] = {}
        for master in self._map.masters:
            for key, value in self.optimizer.state.get(master, {}).items():
                if not torch.is_tensor(value) or value.shape != master.shape:
                    scalars.setdefault(key, set()).add(float(value))
        for group, as_built in zip(self.optimizer.param_groups, self._as_built, strict=True):
            for key, value in _numbers(group).items():
                if value != as_built.get(key):
                    scalars.setdefault(f"group.{key}", set()).add(value)
        if odd := {key: values for key, values in scalars.items() if len(values) > 1}:
            raise RuntimeError(f"optimizer scalars differ between parameter groups: {odd}")
        return {key: values.pop() for key, values in scalars.items()}

    def optimizer_wholes(self) -> dict[str, Tensor]:
        """State that is not shaped like a shard, as "KEY/NAME of the parameter": what an optimizer
        keeps under the name of a parameter, on the ranks that need it."""
        return {
            f"{key}/{name}": value
            for name, state in self.optimizer.state.items()
            if isinstance(name, str)
            for key, value in state.items()
        }

    def trained_and_averaged(self) -> list[tuple[Tensor, Tensor | None]]:
        """For each fragment its master and, where the optimizer keeps one, a copy of the average;
        collective."""
        trained = [fragment.master for fragment in self.fragments()]
        if not self.keeps_average:
            return [(master, None) for master in trained]
        with self.averaged():
            return [(master, master.clone()) for master in trained]

    @torch.no_grad()
    def materialize_state(self) -> None:
        """Create the optimizer's states (which appear at its first step) to be loaded into.

        A step with rate and gradient zero does it for any optimizer; the masters stay as they are.
        """
        masters = [master.detach().clone() for master in self._map.masters]
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        for master in self._map.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer.step()
        for master, before in zip(self._map.masters, masters, strict=True):
            master.grad = None
            master.copy_(before)

    @torch.no_grad()
    def loaded(self, scalars: dict[str, float]) -> None:
        """To be called once fragments have been written: set scalars, refresh the weights."""
        for key, value in scalars.items():
            for group in self.optimizer.param_groups if key.startswith("group.") else ():
                group[key.removeprefix("group.")] = value
            for state in self.optimizer.state.values():
                if torch.is_tensor(state.get(key)):
                    state[key].fill_(value)
                elif key in state:
                    state[key] = value
        self._map.refresh_weights()

    def _finish_accumulation(self) -> None:
        """Close the accumulation window: reduce what is not reduced yet, lay gradients out flat."""
        engine, optimizer = self._engine, self._zero
        if self.config.zero_stage == 1:
            engine._running_engine_step = True  # the boundary, as engine.step() would set it
            engine.allreduce_gradients()
            engine._running_engine_step = False
        else:
            optimizer.finalize_gradient_accumulation_boundary()
        self._map.flatten_gradients()


def _numbers(group: dict[str, Any]) -> dict[str, float]:
    """The numbers in a parameter group that no recipe governs."""
    governed = ("lr", "weight_decay", "momentum")
    return {k: v for k, v in group.items() if isinstance(v, int | float) and k not in governed}


def sharded_construction(config: EngineConfig, world: World) -> AbstractContextManager[Any]:
    """Under ZeRO 3, modules built in this context are sharded as they are built, so that no rank
    ever holds the whole model. The weights are those of rank 0, hence the same as without it."""
    if config.zero_stage < 3 or world.size == 1:
        return nullcontext()
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed()
    return deepspeed.zero.Init(config_dict_or_path=deepspeed_settings(config))


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig) -> Any:
    """DeepSpeed's engine for `model`, with nothing compiled at run time and quiet logs."""
    deepspeed = _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    class Engine(DeepSpeedEngine):
        """Takes the ZeRO wrapper for stage 1 with bf16 too.

        There DeepSpeed would choose BF16_Optimizer, which all-reduces whole gradients and keeps
        them elsewhere than the other stages; the ZeRO wrapper does the same arithmetic.
        """

        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
            return ZERO_OPTIMIZATION

        def __del__(self) -> None:
            """DeepSpeed's own would touch modules that are gone at interpreter exit."""

    deepspeed.init_distributed()  # adopts the process group that join_world made
    settings = deepspeed_settings(config)
    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        config=settings,
        config_class=DeepSpeedConfig(settings),
    )


def _import_deepspeed() -> Any:
    """Import DeepSpeed with its shared-memory collective switched off.

    It would be compiled at the first use; killed while compiling, it leaves a lock file on which
    every later run of the machine waits for ever.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    return deepspeed
