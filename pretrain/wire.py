"""Bytes on the wire: what a rank sends in a step, by ZeRO inside a shard group and by each method
that keeps replicas together. Closed forms, no torch.

Collectives are rings: n ranks reduce-scatter or all-gather N bytes by sending (n - 1) / n N each,
and all-reduce by twice that.
"""

from dataclasses import dataclass

from pretrain.config_sync import OuterSection, PowerSgd, SyncSection
from pretrain.sizes import ModelShape

BUCKET_ELEMENTS = 50_000_000  # of a communication bucket; DeepSpeed's 5e8 would reserve 2 GB
LIVE_ELEMENTS = 1_000_000_000  # weights that ZeRO 3 may keep gathered
SCALE_BLOCK = 256  # elements that share an fp32 scale in quantised messages


def sync_bytes(
    sync: SyncSection, shape: ModelShape, zero_stage: int, shards: int, replicas: int
) -> float:
    """Bytes that a rank sends to other replicas in a step, on average over steps."""
    if replicas == 1:
        return 0.0
    once = (replicas - 1) / replicas
    elements = shape.parameters / shards
    if isinstance(sync, PowerSgd):
        sent = powersgd_elements(sync.rank, shape, zero_stage, shards, sync.min_compression)
        return 2 * once * 4 * sent
    every = getattr(sync, "every_steps", 1)
    return 2 * once * elements * number_bytes(sync_bits(sync)) / every


def sync_bits(sync: SyncSection) -> int:
    """Of a number on the wire."""
    bits: int = getattr(sync, "bits", 16 if getattr(sync, "precision", "") == "bf16" else 32)
    return bits


def number_bytes(bits: int) -> float:
    """Of a number on the wire, its share of a scale included."""
    return bits / 8 + (4 / SCALE_BLOCK if bits < 16 else 0)


def powersgd_elements(
    rank: int, shape: ModelShape, zero_stage: int, shards: int, min_compression: float = 2.0
) -> float:
    """Numbers that a shard sends in place of its gradient: r (rows + columns) for each matrix whose
    size is more than `min_compression` times that, all of the others (arXiv 1905.13727).

    ZeRO 1 and 2 give a rank whole matrices but for those that two of them share, ZeRO 3 a block of
    rows of each.
    """
    slices = shards if zero_stage == 3 else 1
    elements = shape.vectors / shards
    matrices = sum(rows * columns * count for rows, columns, count in shape.matrices)
    for rows, columns, count in shape.matrices:
        factors = rank * (rows / slices + columns)
        whole = rows * columns / slices
        sent = factors if factors * min_compression < whole else whole
        elements += sent * count * slices / shards
        if slices == 1 and sent < whole:  # each border between shards lies in some matrix
            share = whole * count / matrices
            elements += share * (shards - 1) / shards * rank * columns
    return elements


def sync_state_bytes(sync: SyncSection, parameters: int, shards: int) -> int:
    """Bytes a rank holds for it: error feedback, or the outer weights and their momentum."""
    if isinstance(sync, OuterSection):
        copies = 2 if sync.outer[1] else 1
    else:
        copies = int(getattr(sync, "error_feedback", False))
    return 4 * parameters * copies // shards


@dataclass(frozen=True)
class Traffic:
    """What ZeRO sends inside a shard group of n ranks: N bytes in `messages` collectives, each
    passing (n - 1) / n N times `factor` over every link."""

    payload_bytes: float
    factor: int
    messages: int


def zero_traffic(
    parameters: int, layers: int, stage: int, weight_bytes: int, passes: int, on_cpu: bool
) -> list[Traffic]:
    """A step of `passes` micro-batches, gradients in fp32.

    DeepSpeed all-reduces buckets of gradients in stages 1 (once a step) and 2 (each pass) and
    gathers the weights after the step; stage 3 reduce-scatters in each pass, and gathers weights
    in the forward pass and, if they could not stay until then, again in the backward one. Between
    processors gloo reduce-scatters by an all-reduce.
    """
    buckets = -(-parameters // BUCKET_ELEMENTS)
    if stage == 3:
        gathers = passes * (1 if parameters <= LIVE_ELEMENTS else 2)
        modules = 6 * layers  # a gather for each module that holds parameters
        return [
            Traffic(gathers * weight_bytes * parameters, 1, gathers * modules),
            Traffic(passes * 4 * parameters, 2 if on_cpu else 1, passes * buckets),
        ]
    reductions = passes if stage == 2 else 1
    return [
        Traffic(reductions * 4 * parameters, 2, reductions * buckets),
        Traffic(weight_bytes * parameters, 1, buckets),
    ]


def matrix_traffic(shape: ModelShape, ranks: int) -> Traffic:
    """A step of an optimizer that needs whole matrices: fragments go to the matrix's owner and the
    update comes back, in rounds of a matrix a rank."""
    elements = sum(rows * columns * count for rows, columns, count in shape.hidden_matrices)
    rounds = -(-sum(count for *_, count in shape.hidden_matrices) // ranks)
    return Traffic(4 * elements / ranks, 2, rounds)
