"""Memory of a rank at its fullest moment, part by part, in closed form; no torch.

What DeepSpeed 0.19.8 holds as `pretrain.engine` runs it was read off its resident memory by
`benchmarks/planner.py`, which also compares these sums with what is measured.
"""

from dataclasses import dataclass, field

from pretrain.config_optim import AdamW, OptimizerSection
from pretrain.config_sync import AllReduce, OuterSection, SyncSection
from pretrain.sizes import ModelShape
from pretrain.wire import BUCKET_ELEMENTS, LIVE_ELEMENTS, sync_state_bytes

# Upper bound of one slice of fp32 logits. A slice reads and writes the whole fp32 gradient of the
# weight once, so an accelerator, which multiplies far faster than it reads, wants more rows.
CPU_SLICE_BYTES = 64 * 2**20
ACCELERATOR_SLICE_BYTES = 512 * 2**20
# bf16 parts that hold an ALiBi slope or position; a column of queries and keys for each pair
SLOPE_PARTS, POSITION_PARTS = 3, 2


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks; `on_cpu` chooses the kernels of a processor."""

    ranks: int
    zero_stage: int
    precision: str
    micro_batch_samples: int
    activation_checkpointing: bool
    sequence_length: int
    passes: int  # micro-batches of the largest step on a rank
    dropout: float = 0.0
    optimizer: OptimizerSection = field(default_factory=AdamW)
    offload: bool = False
    shard_ranks: int = 0  # 0: all ranks are one shard group
    sync: SyncSection = field(default_factory=AllReduce)
    on_cpu: bool = False

    @property
    def shards(self) -> int:
        """Ranks over which a replica is spread."""
        return self.shard_ranks or self.ranks

    @property
    def replicas(self) -> int:
        """Copies of the model, which `sync` keeps together."""
        return self.ranks // self.shards

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight or activation."""
        return 2 if self.precision == "bf16" else 4


def memory(shape: ModelShape, layout: Layout) -> dict[str, int]:
    """Bytes of each part at the fullest moment of training, libraries not included."""
    count, shards, width = shape.parameters, layout.shards, layout.weight_bytes
    third = layout.zero_stage == 3
    parts = {
        "weights": width * count // (shards if third else 1),
        **({} if layout.offload else host_memory(shape, layout)),
        "gradients": 4 * count // (1 if layout.zero_stage == 1 else shards),
    }
    if third:
        # Layers are gathered as they are needed and stay until LIVE_ELEMENTS are exceeded.
        parts["gathered weights"] = width * min(count, max(LIVE_ELEMENTS, shape.largest_matrix))
    # Outer weights lie in the host's memory, wherever the masters are.
    if layout.replicas > 1 and (layout.sync.facts.every_step or layout.on_cpu):
        parts["replica sync"] = sync_state_bytes(layout.sync, count, shards)
    # Activations shrink during the backward pass while buckets fill, and in stage 1 gradients are
    # reduced once a step, when both activations and logits are gone: the larger side counts.
    forward = {
        "activations": activation_bytes(shape, layout),
        "logits and loss": logit_bytes(shape, layout),
    }
    backward = {"communication buckets": _bucket_bytes(count, layout)}
    if layout.zero_stage == 1 and layout.passes == 1:
        backward["gradients"] = parts.pop("gradients")
    if third:
        parts["reduction buffer"] = 4 * min(BUCKET_ELEMENTS, count)
    return parts | max(forward, backward, key=lambda side: sum(side.values()))


def host_memory(shape: ModelShape, layout: Layout) -> dict[str, int]:
    """Bytes of what a rank keeps on the host with engine.offload = "cpu", else on its device."""
    states = 4 * layout.optimizer.state_numbers(shape.hidden_matrices, shape.others)
    return {
        "masters": 4 * shape.parameters // layout.shards,
        "optimizer states": int(states) // layout.shards,
    }


def checkpoint_bytes(
    shape: ModelShape,
    optimizer: OptimizerSection,
    sync: SyncSection | None = None,
    replicas: int = 1,
) -> int:
    """Bytes of a checkpoint: fp32 masters, and their average if one is kept, and states; of each
    replica what it has of its own."""
    masters = 2 if optimizer.facts.averages else 1
    states = optimizer.state_numbers(shape.hidden_matrices, shape.others)
    if isinstance(sync, OuterSection):  # outer weights are the masters there
        outer = 2 if sync.outer[1] else 1
        return int(4 * (outer * shape.parameters + replicas * (shape.parameters + states)))
    errors = replicas * sync_state_bytes(sync, shape.parameters, 1) if sync and replicas > 1 else 0
    return int(4 * (masters * shape.parameters + states)) + errors


def initial_bytes(shape: ModelShape, layout: Layout) -> int:
    """Bytes while DeepSpeed takes over the fp32 weights of a new model. Under ZeRO 3 it is sharded
    as it is built."""
    count, shards = shape.parameters, layout.shards
    if layout.zero_stage == 3 and shards > 1:
        return (2 * layout.weight_bytes + 8) * count // shards
    return (4 + layout.weight_bytes) * count + 8 * count // shards


def activation_bytes(shape: ModelShape, layout: Layout) -> int:
    """What the forward pass of a micro-batch keeps for the backward one, and its own gradients.

    A block keeps, in units of hidden size: both LayerNorms' inputs and outputs (4), fused query,
    key and value (3) and the attention's output twice (2), the MLP's inner product before and after
    GELU (2 x feed forward = 8): 17; query, key, value and output have ALiBi's columns besides.
    """
    tokens = layout.micro_batch_samples * layout.sequence_length
    hidden, width, heads = shape.hidden_size, layout.weight_bytes, shape.heads
    head_dim = hidden // heads
    columns = SLOPE_PARTS * POSITION_PARTS
    columns += -(head_dim + columns) % 8
    block = width * (9 * hidden + 2 * shape.feed_forward + 4 * columns * heads) + 4 * heads
    if layout.dropout:
        block += 2 * hidden  # masks
        if layout.on_cpu:  # no fused kernel there: scores, their mask, and what is left of them
            block += (2 * width + 1) * heads * layout.sequence_length
    ends = width * 4 * hidden  # embedding, its LayerNorm, the last LayerNorm's input and output
    if layout.activation_checkpointing:
        kept = shape.layers * width * hidden + block
    else:
        kept = shape.layers * block
    flowing = width * (hidden + 2 * shape.feed_forward)  # gradients on their way through an MLP
    return tokens * (kept + ends + flowing)


def logit_bytes(shape: ModelShape, layout: Layout) -> int:
    """A slice of logits, and the gradients of the head and of its input, which are fp32."""
    tokens = layout.micro_batch_samples * layout.sequence_length
    if not shape.sliced_loss:  # logits, their fp32 copy, and the gradients of both
        return 2 * tokens * shape.vocab_size * (layout.weight_bytes + 4)
    limit = CPU_SLICE_BYTES if layout.on_cpu else ACCELERATOR_SLICE_BYTES
    rows = min(tokens, max(1, limit // (4 * shape.vocab_size)))
    copies = 4 if layout.weight_bytes == 4 else 4 + 2 * layout.weight_bytes
    head = shape.vocab_size * shape.hidden_size
    # In bf16 the fp32 gradient is rounded to a second tensor; in fp32 it is the same one.
    head_bytes = head * (4 if layout.weight_bytes == 4 else 4 + layout.weight_bytes)
    return rows * shape.vocab_size * copies + head_bytes + 4 * tokens * shape.hidden_size


def _bucket_bytes(count: int, layout: Layout) -> int:
    """Gradients on their way to their owners: DeepSpeed's buckets, their fp32 copies, and in stage
    1 the flat gradient of this rank, which in fp32 is made when the buckets are gone."""
    bucket, flat = min(BUCKET_ELEMENTS, count), 4 * count // layout.shards
    if layout.zero_stage == 1:
        return max(4 * bucket, flat) if layout.weight_bytes == 4 else 4 * bucket + flat
    return bucket * (8 if layout.zero_stage == 2 else 5)
