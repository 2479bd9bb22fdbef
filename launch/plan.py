"""What a run will be: its stages, memory, time and cost, before anything is paid for. No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from launch.clusters import Cluster
from launch.cost import StepCost, step_cost
from pretrain.config import BloomModel, Config
from pretrain.config_sync import SyncSection
from pretrain.errors import UserError
from pretrain.memory import Layout, checkpoint_bytes, initial_bytes, memory
from pretrain.quantities import Horizon
from pretrain.recipe import Clock, Recipe
from pretrain.sizes import (
    ModelShape,
    hardware_flops_per_token,
    model_flops_per_token,
    shape_of,
)
from pretrain.wire import sync_bytes


@dataclass(frozen=True)
class PlannedStage:
    """Steps of one batch. Times are None without a cluster."""

    begin: Clock
    end: Clock
    batch_samples: int
    first_rate: float
    cost: StepCost | None

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return self.end.step - self.begin.step

    @property
    def step_seconds(self) -> float:
        """Time of a step; 0 without a cluster."""
        return self.cost.seconds if self.cost else 0.0

    @property
    def seconds(self) -> float:
        """Time of the stage."""
        return self.steps * self.step_seconds

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time in which they wait for those that have more rows."""
        return self.cost.idle_share if self.cost else 0.0


@dataclass(frozen=True)
class Plan:
    """A run on a cluster; without one only what the config alone says."""

    config: Config
    cluster: Cluster | None = None

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.config.build_recipe()

    @cached_property
    def shape(self) -> ModelShape:
        """The model's parameters."""
        model = self.config.model
        if isinstance(model, BloomModel):
            return shape_of(model)
        from pretrain.model import model_shape  # transformers has to build it

        return model_shape(model)

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.config.data.sequence_length

    @property
    def flops_per_token(self) -> float:
        """What a token costs, recomputation included: by BLOOM's formula where it is one."""
        model, recompute = self.config.model, self.config.engine.activation_checkpointing
        if isinstance(model, BloomModel):
            return hardware_flops_per_token(model, self.length, recompute)
        return model_flops_per_token(self.shape, self.length) * (4 if recompute else 3) / 3

    @property
    def model_flops_per_token(self) -> int:
        """What a token needs, without recomputation."""
        return model_flops_per_token(self.shape, self.length)

    def with_replicas(self, shard_ranks: int | None, sync: SyncSection) -> "Plan":
        """The same run with replicas of `shard_ranks` ranks."""
        mesh = self.config.mesh.model_copy(update={"shard_ranks": shard_ranks})
        return self._variant(config=self.config.model_copy(update={"mesh": mesh, "sync": sync}))

    def with_nodes(self, nodes: int) -> "Plan":
        """The same run on another number of nodes."""
        assert self.cluster is not None
        return self._variant(cluster=self.cluster.model_copy(update={"nodes": nodes}))

    def _variant(self, **changes: Any) -> "Plan":
        """The same recipe and model, which are not worked out again, otherwise."""
        other = replace(self, **changes)
        other.__dict__.update(recipe=self.recipe, shape=self.shape)
        return other

    @property
    def most_rows(self) -> int:
        """A rank's share of the largest batch, in samples."""
        assert self.cluster is not None
        return math.ceil(max(batch for _, _, batch in self.recipe.stages) / self.cluster.devices)

    @cached_property
    def layout(self) -> Layout:
        """How the run is spread over the cluster; UserError where groups do not fit."""
        assert self.cluster is not None, "only a cluster has a layout"
        engine, ranks = self.config.engine, self.cluster.devices
        shards = self.config.mesh.shard_ranks or ranks
        if ranks % shards:
            raise UserError(
                f"mesh.shard_ranks = {shards}: does not divide the {ranks} ranks\n"
                "  rule: replicas are alike, so ranks = replicas x shard_ranks\n"
                f"  cure: choose a divisor, for example {math.gcd(ranks, shards)}"
            )
        model, rows = self.config.model, self.most_rows
        return Layout(
            ranks=ranks,
            zero_stage=engine.zero_stage,
            precision=engine.precision,
            # A rank never has more rows than its share of the largest batch.
            micro_batch_samples=min(engine.micro_batch_samples, rows),
            activation_checkpointing=engine.activation_checkpointing,
            sequence_length=self.length,
            passes=math.ceil(rows / engine.micro_batch_samples),
            dropout=model.dropout if isinstance(model, BloomModel) else 0.0,
            optimizer=self.config.optimizer,
            offload=engine.offload == "cpu",
            shard_ranks=shards,
            sync=self.config.sync,
            on_cpu=self.cluster.device.shared_cores,
        )

    # --- timeline ---------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[PlannedStage]:
        """A row for each batch of the run."""
        return [
            PlannedStage(
                begin,
                self.recipe.clock_at(step=begin.step + steps),
                batch,
                self.recipe.at(begin).learning_rate,
                self.cost(batch) if self.cluster else None,
            )
            for begin, steps, batch in self.recipe.stages
        ]

    def at(self, question: str) -> dict[str, Any]:
        """The step that "step=N" names, or in which "tokens=20B" or "samples=N" is reached: the
        clock after it, its batch, the rate it applies and the one BLOOM would log after it."""
        unit, _, text = question.partition("=")
        step = self._step(unit.strip().rstrip("s"), text, question)
        clock = self.recipe.clock_at(step=step)
        applied, logged = self.recipe.learning_rate_at(step)
        before = self.recipe.clock_at(step=step - 1)
        return {
            "step": step,
            "samples": clock.samples,
            "tokens": clock.tokens,
            "batch_samples": clock.samples - before.samples,
            "lr_applied": applied,
            "lr_logged": logged,
        }

    def _step(self, unit: str, text: str, question: str) -> int:
        rule = UserError(
            f"--at {question}\n  rule: step=N, samples=N or tokens=N within the run of "
            f"{self.recipe.total_steps} steps, counted from 1\n  cure: for example tokens=20B"
        )
        try:
            value = Horizon.parse(f"{text} {unit}s").value
        except ValueError:
            raise rule from None
        recipe = self.recipe
        if unit == "step":
            step = value
        else:
            samples = value if unit == "sample" else -(-value // self.length)
            before = recipe.batch.step_at(samples)
            step = before + (recipe.batch.samples_at(before) < samples)
        if not 1 <= step <= recipe.total_steps:
            raise rule
        return step

    # --- memory -----------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes of each part on the fullest rank, libraries included."""
        assert self.cluster is not None
        parts = memory(self.shape, self.layout) | {"libraries": int(self.cluster.device.runtime)}
        beginning = initial_bytes(self.shape, self.layout) + parts["libraries"]
        if (more := beginning - sum(parts.values())) > 0:
            parts["more while starting"] = more
        return parts

    @property
    def rank_bytes(self) -> int:
        """Memory of the fullest rank."""
        return sum(self.memory.values())

    @property
    def available_bytes(self) -> int:
        """Memory that a rank has."""
        assert self.cluster is not None
        device = self.cluster.device
        return int(device.memory) // (self.cluster.devices_per_node if device.shared_cores else 1)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits into its device."""
        return self.rank_bytes <= self.available_bytes

    def with_engine(self, **settings: Any) -> "Plan":
        """The same run with other settings of `engine`."""
        engine = self.config.engine.model_copy(update=settings)
        return self._variant(config=self.config.model_copy(update={"engine": engine}))

    def largest_micro_batch(self) -> int:
        """The most samples of a pass that fit, at most a rank's share of the batch; 0 if none."""
        low, high = 0, self.most_rows
        while low < high:
            middle = (low + high + 1) // 2
            if self.with_engine(micro_batch_samples=middle).fits:
                low = middle
            else:
                high = middle - 1
        return low

    def ways_to_fit(self) -> Iterator[str]:
        """Changes, each by itself or a few together, with which the run would fit."""
        assert self.cluster is not None
        engine = self.config.engine
        for stage in range(engine.zero_stage, 4):
            for recompute in sorted({engine.activation_checkpointing, True}):
                for micro in sorted({engine.micro_batch_samples, 1}, reverse=True):
                    changed = self.with_engine(
                        zero_stage=stage,
                        activation_checkpointing=recompute,
                        micro_batch_samples=micro,
                    )
                    if changed.fits:
                        yield " ".join(
                            f"engine.{key}={str(value).lower()}"
                            for key, value in (
                                ("zero_stage", stage),
                                ("activation_checkpointing", recompute),
                                ("micro_batch_samples", micro),
                            )
                            if value != getattr(engine, key)
                        )
        if engine.zero_stage == 3 or self.layout.shards < 2:
            smallest = self.with_engine(
                zero_stage=3, activation_checkpointing=True, micro_batch_samples=1
            )
            for nodes in (2**power * self.cluster.nodes for power in range(1, 8)):
                if smallest.with_nodes(nodes).fits:
                    yield (
                        "engine.zero_stage=3 engine.activation_checkpointing=true "
                        f"engine.micro_batch_samples=1 --nodes {nodes}"
                    )
                    return

    # --- time and cost ----------------------------------------------------------------------------

    def cost(self, batch_samples: int) -> StepCost:
        """What a step costs."""
        assert self.cluster is not None
        return step_cost(self.shape, self.layout, self.cluster, batch_samples)

    @cached_property
    def seconds(self) -> float:
        """Training time of the run, without checkpoints and failures."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def final_cost(self) -> StepCost:
        """Cost of a step with the last batch."""
        cost = self.stages[-1].cost
        assert cost is not None
        return cost

    def device_tflops(self, stage: PlannedStage) -> float:
        """TFLOPs a second of a device in a stage, recomputation included (BLOOM's figure)."""
        assert self.cluster is not None
        assert stage.cost is not None
        flops = stage.batch_samples * self.length * self.flops_per_token
        return flops / stage.cost.seconds / self.cluster.devices / 1e12

    @cached_property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends to other replicas in a step."""
        layout = self.layout
        return sync_bytes(
            layout.sync, self.shape, layout.zero_stage, layout.shards, layout.replicas
        )

    def bill(self) -> dict[str, float]:
        """Device hours and, where the profile knows them, energy, price and carbon."""
        assert self.cluster is not None
        price, hours = self.cluster.price, self.seconds / 3600
        bill = {"device_hours": hours * self.cluster.devices}
        if price.device_hour:
            bill["price"] = bill["device_hours"] * price.device_hour
        if price.node_watts:
            watts = price.node_watts * self.cluster.nodes * price.facility_factor
            bill["energy_mwh"] = watts * hours / 1e6
            if price.carbon_g_per_kwh:
                bill["carbon_tonnes"] = bill["energy_mwh"] * price.carbon_g_per_kwh / 1e3
        return bill

    def checkpoint_advice(self) -> dict[str, float] | None:
        """Seconds of a save, the interval that loses least to failures and saves (Young 1974;
        Daly 2006 adds the second term), in seconds and in steps of the last batch."""
        assert self.cluster is not None
        reliability = self.cluster.reliability
        if reliability is None:
            return None
        size = checkpoint_bytes(
            self.shape, self.config.optimizer, self.layout.sync, self.layout.replicas
        )
        save = size / (reliability.write_gbytes_per_s * 1e9)
        between_failures = reliability.node_mtbf_days * 86400 / self.cluster.nodes
        interval = daly_interval(save, between_failures)
        lost = save / interval + interval / 2 / between_failures
        lost += reliability.restart_minutes * 60 / between_failures
        return {
            "checkpoint_bytes": size,
            "save_seconds": save,
            "seconds_between_failures": between_failures,
            "interval_seconds": interval,
            "interval_steps": max(1, round(interval / self.final_cost.seconds)),
            "lost_share": lost,
        }

    def uneven_stages(self) -> list[PlannedStage]:
        """Stages whose batch the ranks cannot share evenly."""
        return [stage for stage in self.stages if stage.idle_share > 0]


def daly_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of work between checkpoints that lose the least time (Daly 2006, equation 37)."""
    ratio = save_seconds / (2 * seconds_between_failures)
    if ratio >= 1:
        return seconds_between_failures
    young = math.sqrt(2 * save_seconds * seconds_between_failures)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds
