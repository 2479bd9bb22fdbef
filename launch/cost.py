"""What a step costs on a cluster: seconds of computing, of optimizing and of talking."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from launch.clusters import Cluster, Link
from pretrain.config_optim import Muon
from pretrain.config_sync import AllReduce, OuterSection, PowerSgd, SyncSection
from pretrain.errors import UserError
from pretrain.memory import Layout
from pretrain.sizes import ModelShape
from pretrain.wire import matrix_traffic, sync_bytes, zero_traffic


@dataclass(frozen=True)
class Overheads:
    """What a step costs besides products and messages, in bytes of memory traffic: for a parameter
    and pass, for a parameter and step, for a parameter of this rank and step (each by ZeRO stage),
    for a parameter that is reduced (once a step, in stage 1), and for a token and hidden unit of a
    block. `attention` is the share of a product's speed that attention reaches, by precision."""

    passes: tuple[int, int, int]
    step: tuple[int, int, int]
    share: tuple[int, int, int]
    reduction: int
    block: Callable[[int], float]  # of the bytes of an activation
    attention: dict[str, float]


# What is read and written: a gradient is added to what has accumulated or copied to its bucket and
# on; AdamW reads four numbers and writes three, and gradients are laid out flat, measured and cut;
# LayerNorms, GELU, residual sums and copies of a block touch 78 hidden vectors.
_ACCELERATOR = Overheads(
    (12, 24, 48), (8, 0, 0), (56, 56, 56), 16, lambda width: 78 * width, {"bf16": 0.6, "fp32": 0.6}
)
# Fitted to sections of steps timed on two cores: fresh memory has to be zeroed by the system there,
# small operations are bound by arithmetic, and attention in bf16 is slow.
_PROCESSOR = Overheads(
    (60, 160, 260), (95, 0, 0), (60, 85, 160), 130, lambda width: 1150, {"bf16": 0.25, "fp32": 0.5}
)
# For a logit: written, shifted, exponentiated, summed, and read by two products.
_LOGIT_TRAFFIC = 40


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step; they follow one another, since nothing is assumed to overlap."""

    compute: float
    optimizer: float
    zero_communication: float
    sync_communication: float
    idle_share: float  # of the ranks' computing time, that others wait for

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.optimizer + self.zero_communication + self.sync_communication


def step_cost(shape: ModelShape, layout: Layout, cluster: Cluster, batch_samples: int) -> StepCost:
    """A step of `batch_samples`; UserError where the cluster knows no speed for the precision."""
    rows = math.ceil(batch_samples / layout.ranks)  # of the rank that has most
    passes = math.ceil(rows / layout.micro_batch_samples)
    count, width = shape.parameters, layout.weight_bytes
    memory_speed = cluster.device.memory_gbytes_per_s * 1e9 / _sharing(cluster)
    compute = rows * layout.sequence_length * _token_seconds(shape, layout, cluster)
    costs, stage = overheads_of(cluster), layout.zero_stage - 1
    compute += passes * costs.passes[stage] * count / memory_speed
    # The constants are those of AdamW, which keeps two numbers; each is read and written.
    states = layout.optimizer.state_numbers(shape.hidden_matrices, shape.others) / count
    share = costs.share[stage] + 8 * (states - 2)
    optimizer = (costs.step[stage] + share / layout.shards) * count / memory_speed
    optimizer += _orthogonalisation_seconds(shape, layout, cluster)
    if layout.zero_stage == 1:
        copies = costs.reduction if layout.shards > 1 else costs.reduction / 3
        optimizer += copies * count / memory_speed
    zero = 0.0
    if layout.shards > 1:
        group = Group(layout.shards, cluster.devices_per_node, consecutive=True)
        for traffic in zero_traffic(
            count, shape.layers, layout.zero_stage, width, passes, layout.on_cpu
        ):
            zero += group.seconds(
                cluster, traffic.factor * traffic.payload_bytes, traffic.messages * traffic.factor
            )
        if layout.optimizer.facts.kind == "matrix":
            traffic = matrix_traffic(shape, layout.shards)
            zero += group.seconds(cluster, 2 * traffic.payload_bytes, 2 * traffic.messages)
    sync = 0.0
    if layout.replicas > 1:
        group = Group(layout.replicas, cluster.devices_per_node, consecutive=False)
        sent = sync_bytes(layout.sync, shape, layout.zero_stage, layout.shards, layout.replicas)
        once = (layout.replicas - 1) / layout.replicas
        every = getattr(layout.sync, "every_steps", 1)
        sync = group.seconds(cluster, sent / once, 2 / every, layout.shards)
        sync += _compression_traffic(layout.sync) * count / layout.shards / memory_speed / every
    return StepCost(compute, optimizer, zero, sync, 1 - batch_samples / (rows * layout.ranks))


def _compression_traffic(sync: SyncSection) -> int:
    """Bytes that pass through memory for a parameter of this rank and exchange, besides messages.

    PowerSGD: a gradient is added to the error (12), read by two products (8), written and taken
    from the error (12). Quantising: the same sum, its scale, its codes, what they miss; adding up,
    and both once more for the mean. Outer steps: two operands, momentum and weights, masters.
    """
    if isinstance(sync, OuterSection):
        return 36
    if isinstance(sync, AllReduce):
        return 0 if sync.precision == "fp32" else 20
    return 32 if isinstance(sync, PowerSgd) else 56


def _orthogonalisation_seconds(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Products of Muon's iterations, whose matrices are shared among the ranks: of a matrix with r
    rows and c columns, r <= c, 4 r^2 c + 2 r^3 each."""
    if not isinstance(layout.optimizer, Muon):
        return 0.0
    flops = 0.0
    for *sides, count in shape.hidden_matrices:
        short, long = sorted(sides)
        flops += count * layout.optimizer.iterations * (4 * short**2 * long + 2 * short**3)
    device = cluster.device
    speeds = device.peak_tflops
    peak = speeds.get(layout.optimizer.precision) or speeds[layout.precision]
    at_once = min(layout.shards, sum(count for *_, count in shape.hidden_matrices))
    return flops / at_once / (peak * 1e12 * device.product_efficiency) * _sharing(cluster)


@dataclass(frozen=True)
class Group:
    """Ranks that talk: `consecutive` ones fill nodes, others have the same place in each."""

    size: int
    devices_per_node: int
    consecutive: bool

    def seconds(
        self, cluster: Cluster, payload_bytes: float, messages: float, shards: int = 0
    ) -> float:
        """Time in which (n - 1) / n of `payload_bytes` pass every link of a ring.

        Groups side by side share the links of their nodes: with consecutive ranks those that fit
        into a node, else one for each rank of a shard group (`shards`) that lies on the node.
        """
        moved = (self.size - 1) / self.size * payload_bytes
        if self.consecutive:
            inside, nodes = (
                min(self.size, self.devices_per_node),
                -(-self.size // self.devices_per_node),
            )
            sharing = 1
        else:
            per_node = max(1, self.devices_per_node // shards)
            inside, nodes = min(self.size, per_node), -(-self.size // per_node)
            sharing = min(shards, self.devices_per_node)
        seconds = 0.0
        if inside > 1:
            seconds = moved / (cluster.network.inside.gbytes_per_s * 1e9)
        if nodes > 1:
            across = (nodes - 1) / nodes * payload_bytes * sharing
            seconds = max(seconds, across / (cluster.network.between.gbytes_per_s * 1e9))
        slowest: Link = cluster.network.between if nodes > 1 else cluster.network.inside
        return seconds + messages * slowest.latency_us * 1e-6


def overheads_of(cluster: Cluster) -> Overheads:
    """The constants of a cluster's kind of device."""
    return _PROCESSOR if cluster.device.shared_cores else _ACCELERATOR


def _sharing(cluster: Cluster) -> int:
    """Ranks that share the speed which the profile gives for a device."""
    return cluster.devices_per_node if cluster.device.shared_cores else 1


def _token_seconds(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Seconds a rank computes for one token, forward and backward."""
    device, hidden, layers = cluster.device, shape.hidden_size, shape.layers
    if layout.precision not in device.peak_tflops:
        raise UserError(
            f"engine.precision = {layout.precision!r}: {device.name} has none in {cluster.name}\n"
            f"  rule: device.peak_tflops of the profile names {', '.join(device.peak_tflops)}\n"
            "  cure: choose another precision, or add its speed to the profile"
        )
    peak = device.peak_tflops[layout.precision] * 1e12 * device.product_efficiency
    passes = 4 if layout.activation_checkpointing else 3
    head = shape.vocab_size * hidden
    costs = overheads_of(cluster)
    attention = 4 * layers * hidden * layout.sequence_length  # forward, the causal half included
    attention /= costs.attention[layout.precision]
    flops = passes * (2 * (shape.multiplied - head) + attention) + 6 * head
    traffic = costs.block(layout.weight_bytes) * passes / 3 * layers * hidden
    traffic += _LOGIT_TRAFFIC * shape.vocab_size
    speed = device.memory_gbytes_per_s * 1e9
    return (flops / peak + traffic / speed) * _sharing(cluster)
