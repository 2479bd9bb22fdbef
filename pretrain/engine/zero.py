"""The training engine: DeepSpeed ZeRO 1, 2 or 3 behind the few verbs that the loop needs.

DeepSpeed shards and communicates; accumulation, loss scaling, clipping and the settings of each
step are ours (`managed_gradient_accumulation: false`), so that any batch runs on any ranks and the
gradient is the mean over the tokens of the global batch, however it is split.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import Engine as EngineConfig
from pretrain.config_optim import OptimizerSection
from pretrain.engine.deepspeed_setup import initialize
from pretrain.engine.fragments import Fragment, FragmentMap
from pretrain.engine.world import World
from pretrain.optim.groups import fused_matrices, parameter_groups, parameter_roles
from pretrain.optim.registry import build_optimizer
from pretrain.optim.shards import Shards
from pretrain.optim.statistics import Measurement, ParameterStatistics
from pretrain.recipe import Clock, StepPlan
from pretrain.sync.base import ReplicaSync


@dataclass(frozen=True)
class StepStats:
    """What a step's forward and backward passes found; the same on all ranks that step together."""

    loss: float  # mean over the tokens of the batch, in nats
    grad_norm: float  # L2 norm of its whole gradient, before clipping
    stop: bool = False  # whether any of those ranks has been asked to make way


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
        self.sync: ReplicaSync = ReplicaSync(world)
        roles, matrices = parameter_roles(model), fused_matrices(model)
        # Never stepped: it tells DeepSpeed which parameters lie together.
        holder = torch.optim.SGD(parameter_groups(model), lr=0.0)
        self._engine = initialize(model, holder, config, world)
        self._zero = self._engine.optimizer
        parameters = dict(self._engine.module.named_parameters())
        self._map = FragmentMap(
            self._zero, parameters, roles, matrices, config.zero_stage, world.shard,
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

    def forward_backward(
        self, rows: Tensor, batch_samples: int, clock: Clock | None = None, stop: bool = False
    ) -> StepStats:
        """Accumulate the gradient of this rank's `rows` (n x (T + 1) token ids, n may be 0), and
        bring it together with those of other replicas, as is due at `clock` (None: the start).
        `stop`: this rank has been asked to make way; all others learn of it.

        All ranks make the same number of passes, since the collectives need it: a rank without
        rows left runs a pass over a single token with weight zero.
        """
        self._engine.train()
        together, device = self.sync.together, self.world.device
        per_rank = -(-batch_samples // self.sync.ranks.size)
        micro = self.config.micro_batch_samples
        tokens_together = max(1, self.sync.samples_together(batch_samples)) * (rows.shape[1] - 1)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, per_rank, micro):
            chunk, weight = rows[first : first + micro], 1.0
            if len(chunk) == 0:
                chunk, weight = rows.new_zeros(1, 2), 0.0
            chunk = chunk.to(device, non_blocking=True)
            loss_sum = self._engine(chunk[:, :-1], chunk[:, 1:])
            # DeepSpeed, and the sync after it, average gradients over the ranks; the sum is wanted.
            self._engine.backward(loss_sum * (weight * together.size / tokens_together))
            total += weight * loss_sum.detach()
        self._finish_accumulation()
        gradients = self._map.flat_gradients()
        self.sync.gradients(gradients, clock or Clock())
        square = torch.zeros((), dtype=torch.float64, device=device)
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        # Replicas in step have the same gradient now: their squares are summed once too often.
        square *= self.world.shard.size / together.size
        found = torch.stack([total / tokens_together, square, square.new_full((), stop)])
        # The step's one wait for the device.
        loss, square_norm, stops = together.sum(found).tolist()
        return StepStats(loss, square_norm**0.5, stops > 0)

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
    def masters(self) -> list[Tensor]:
        """The flat fp32 masters of this rank."""
        return self._map.masters

    @property
    def shards(self) -> Shards:
        """What lies where in the masters."""
        return self._map.shards

    def refresh_weights(self) -> None:
        """Take changed masters up into the weights that the model computes with; collective."""
        self._map.refresh_weights()

    @property
    def keeps_average(self) -> bool:
        """Whether what is evaluated and exported is an average, not the weights of training."""
        return bool(self.sync.outer_weights) or hasattr(self.optimizer, "eval")

    @torch.no_grad()
    def exported(self) -> list[Tensor]:
        """What this replica alone would evaluate and export, laid out like the masters: copies of
        the optimizer's averages where it keeps any, else the masters themselves."""
        if not hasattr(self.optimizer, "eval"):
            return self.masters
        with self._masters_put_back():
            self.optimizer.eval()
            averages = [master.detach().clone() for master in self.masters]
            self.optimizer.train()
        return averages

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, masters and model hold the weights that are evaluated and exported: those that
        replicas agreed on last where they step by themselves, or the average where the optimizer
        keeps one, else those of training. Afterwards all is as before, bit by bit. Collective."""
        if not self.keeps_average:
            yield
            return
        exported = self.sync.outer_weights or self.exported()
        with torch.no_grad():
            with self._masters_put_back():
                for master, average in zip(self.masters, exported, strict=True):
                    master.copy_(average)
                self.refresh_weights()
                yield
            self.refresh_weights()

    @contextmanager
    def _masters_put_back(self) -> Iterator[None]:
        trained = [master.detach().clone() for master in self.masters]
        try:
            yield
        finally:
            for master, kept in zip(self.masters, trained, strict=True):
                master.detach().copy_(kept)

    @torch.no_grad()
    def evaluate(self, rows: Tensor, batch_samples: int) -> float:
        """Mean loss over the tokens of `batch_samples` rows, of which `rows` are this rank's among
        those of `sync.together`.

        Passes are counted as in `forward_backward`, for ZeRO 3 gathers weights in them.
        """
        with self.averaged():
            return self._evaluate(rows, batch_samples)

    def _evaluate(self, rows: Tensor, batch_samples: int) -> float:
        self._engine.eval()
        micro = self.config.micro_batch_samples
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        together = self.sync.together
        for first in range(0, -(-batch_samples // together.size), micro):
            chunk = rows[first : first + micro]
            idle = len(chunk) == 0
            chunk = (rows.new_zeros(1, 2) if idle else chunk).to(self.world.device)
            loss_sum = self._engine(chunk[:, :-1], chunk[:, 1:])
            total += 0.0 if idle else loss_sum
        return together.sum(total).item() / (batch_samples * (rows.shape[1] - 1))

    def close(self) -> None:
        """Let go of the model. DeepSpeed hangs hooks into autograd's graph, where the collector
        does not see the cycle: without this every engine of a process stays in memory."""
        self._engine.destroy()

    # --- state of the optimizer that is not a fragment --------------------------------------------

    def optimizer_scalars(self) -> dict[str, float]:
        """State that is one number for all parameters: Adam's step count (by its name), and what
        an optimizer changes in its groups (as "group.NAME")."""
        scalars: dict[str, set[float]] = {}
        for master in self.masters:
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

    def state_tensors(self) -> list[Tensor]:
        """All that makes this replica's next steps what they are, in the same order on all
        replicas: masters and states of the optimizer."""
        states = [self.optimizer.state.get(master, {}) for master in self.masters]
        wholes = self.optimizer_wholes()
        return [
            *self.masters,
            *(s[key] for s in states for key in sorted(s) if torch.is_tensor(s[key])),
            *(wholes[key] for key in sorted(wholes)),
        ]

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

        A step with rate and gradient zero does it for any optimizer; the masters stay as they are,
        and so do the settings of the groups, such as a count of steps.
        """
        settings = [dict(group) for group in self.optimizer.param_groups]
        masters = [master.detach().clone() for master in self.masters]
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer.step()
        for master, before in zip(self.masters, masters, strict=True):
            master.grad = None
            master.copy_(before)
        for group, before in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(before)

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
