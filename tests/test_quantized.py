"""Means of gradients that are exchanged exactly, in bf16, or in 8 or 4 bits with error feedback."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pretrain.config_sync import AllReduce, Quantized
from pretrain.engine.world import World
from pretrain.optim.shards import Shards
from pretrain.sync.mean import AllReduceMean, Bfloat16, piece_elements
from pretrain.sync.quantized import Levels, QuantizedMean, quantized_mean
from tests.ranks import run_ranks

BLOCK = 256
LENGTHS = [
    3000,
    5,
    7 * BLOCK,
    40,
]  # with ragged ends, and less than a block for each of three ranks
LARGE = 2 * piece_elements(torch.device("cpu")) + 3 * BLOCK + 17  # several pieces for each of two


def section_of(kind, feedback=True):
    if kind in ("fp32", "bf16"):
        return AllReduce(precision=kind, bucket=400)
    return Quantized(bits=int(kind.removeprefix("int")), error_feedback=feedback)


def build(section, lengths, world):
    masters = [torch.zeros(length) for length in lengths]
    shards = Shards(masters, [], [], [], world, {})
    return (AllReduceMean if isinstance(section, AllReduce) else QuantizedMean)(
        section, shards, world
    )


def gradients_of(rank, step, lengths=LENGTHS):
    """What rank and step have, of sizes that vary from block to block."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [
        torch.randn(length, generator=generator) * (1 + torch.arange(length) // BLOCK % 5)
        for length in lengths
    ]


def true_mean(ranks, step, lengths=LENGTHS):
    every = [torch.cat(gradients_of(rank, step, lengths)).double() for rank in range(ranks)]
    return (sum(every) / ranks).numpy()


def joined(flats):
    return torch.cat(flats).numpy().copy()


def average_steps(world, kind, feedback, steps, lengths=LENGTHS):
    """Results of the steps, errors before the first and after each, bytes as told."""
    mean = build(section_of(kind, feedback), lengths, world)
    results, errors = [], [joined(mean.errors) if mean.errors else None]
    for step in range(steps):
        gradients = gradients_of(world.rank, step, lengths)
        mean.average(gradients)
        results.append(joined(gradients))
        errors.append(joined(mean.errors) if mean.errors else None)
    return results, errors, mean.sent_bytes


def largest_of_blocks(flat, lengths=LENGTHS):
    """For each element the largest absolute value of its block."""
    found = []
    for part in np.split(flat, np.cumsum(lengths)[:-1]):
        edges = range(0, len(part), BLOCK)
        tops = [np.abs(part[edge : edge + BLOCK]).max() for edge in edges]
        found.append(np.repeat(tops, BLOCK)[: len(part)])
    return np.concatenate(found)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_mean_is_as_close_as_rounding_lets_it(kind):
    """Half a step for the roundings of the ranks, half a step for that of the mean."""
    top = {"int8": 127, "int4": 7}[kind]
    ranks = run_ranks(3, average_steps, kind, False, 1)
    every = [torch.cat(gradients_of(rank, 0)).numpy() for rank in range(3)]
    first = sum(largest_of_blocks(flat) for flat in every) / 3 / top / 2
    mean = true_mean(3, 0)
    second = (largest_of_blocks(mean) + first) / top / 2
    off = np.abs(ranks[0][0][0] - mean)
    assert (off <= (first + second) * (1 + 1e-5)).all()
    assert (off / (first + second)).max() > 0.7  # no finer than it is said to be
    assert all(np.array_equal(other[0][0], ranks[0][0][0]) for other in ranks)
    assert ranks[0][1] == [None, None]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounding_goes_to_the_nearest_level(kind):
    """In a block whose largest number is the top level a step is 1."""
    top = {"int8": 127, "int4": 7}[kind]
    codec = Levels(int(kind[3:]))
    values = torch.linspace(-top, top, 3 * BLOCK).view(3, BLOCK)
    values[:, 0], values[1, 1:4] = top, torch.tensor([0.5, 1.5, -2.5])
    message = torch.zeros(1, 3 * codec.block_bytes, dtype=torch.uint8)
    fields = [field[0] for field in codec.fields(message)]
    rest, read = values.clone(), torch.empty_like(values)
    codec.encode(rest, fields, True)
    codec.decode(fields, read)
    assert torch.equal(read, values.round())  # of two as near the even one
    torch.testing.assert_close(rest, values - read, rtol=0, atol=1e-6)
    total = torch.ones_like(values)
    codec.add(fields, total)
    assert torch.equal(total, 1 + read)
    assert codec.block_bytes == BLOCK * int(kind[3:]) // 8 + 4


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nothing_is_lost_with_error_feedback(kind):
    """Mean of gradients and errors = result + mean of the errors after it, at each step; so what is
    handed out over all steps is what came in, but for the errors of the last."""
    steps, size = 12, 3
    ranks = run_ranks(size, average_steps, kind, True, steps)
    plain = run_ranks(size, average_steps, kind, False, steps)
    errors = np.mean([np.stack(rank[1]).astype(np.float64) for rank in ranks], 0)
    assert not errors[0].any()
    for step in range(steps):
        came = true_mean(size, step) + errors[step]
        np.testing.assert_allclose(ranks[0][0][step] + errors[step + 1], came, atol=3e-6)
        assert all(np.array_equal(rank[0][step], ranks[0][0][step]) for rank in ranks)
    came = sum(true_mean(size, step) for step in range(steps))
    off, plain_off = (np.abs(np.sum(r[0][0], 0) - came).mean() for r in (ranks, plain))
    assert off < 0.6 * plain_off
    np.testing.assert_allclose(np.sum(ranks[0][0], 0) + errors[-1], came, atol=3e-5)


def average_constant(world, steps):
    """The sum of the results for the same gradients at each step, with feedback and without."""
    found = []
    for feedback in (True, False):
        mean = build(section_of("int4", feedback), LENGTHS, world)
        total = torch.zeros(sum(LENGTHS))
        for _ in range(steps):
            gradients = gradients_of(world.rank, 0)
            mean.average(gradients)
            total += torch.cat(gradients)
        found.append((total / steps).numpy())
    return found


def test_a_constant_gradient_comes_through():
    """Numbers far below half a step are never seen without feedback."""
    with_feedback, without = run_ranks(2, average_constant, 40)[0]
    mean = true_mean(2, 0)
    assert np.abs(with_feedback - mean).max() < 0.06
    assert np.abs(without - mean).max() > 0.4


def test_large_tensors_go_in_pieces():
    lengths = [LARGE, 100]
    ranks = run_ranks(2, average_steps, "int8", True, 2, lengths)
    errors = np.mean([np.stack(rank[1]).astype(np.float64) for rank in ranks], 0)
    for step in range(2):
        came = true_mean(2, step, lengths) + errors[step]
        np.testing.assert_allclose(ranks[0][0][step] + errors[step + 1], came, atol=3e-6)
        assert np.array_equal(ranks[0][0][step], ranks[1][0][step])
    assert np.abs(errors[2]).max() < 0.15


BAD = [float("nan"), float("inf"), -float("inf")]


def average_bad(world, kind):
    """Three good steps with bad ones between them: results, errors."""
    mean, clean = (build(section_of(kind), LENGTHS, world) for _ in range(2))
    found = []
    for step in range(3):
        gradients, same = gradients_of(world.rank, step), gradients_of(world.rank, step)
        mean.average(gradients)
        clean.average(same)
        before = joined(mean.errors)
        bad = gradients_of(world.rank, step)
        if world.rank == 1:
            bad[step][2] = BAD[step]
        mean.average(bad)
        finite = bool(torch.cat(bad).isfinite().all())
        found.append((np.array_equal(joined(mean.errors), before), finite,
                      np.array_equal(joined(gradients), joined(same))))  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_bad_gradient_reaches_all_and_leaves_no_trace(kind):
    for rank in run_ranks(3, average_bad, kind):
        assert rank == [(True, False, True)] * 3


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
def test_numbers_of_all_sizes(kind, size):
    """Zeros stay zeros; what is too small for a reciprocal is kept for later."""
    mean = build(section_of(kind), [600], World(0, 1, torch.device("cpu")))
    gradient = torch.randn(600, generator=torch.Generator().manual_seed(1)) * size
    given = gradient.clone()
    mean.average([gradient])
    assert gradient.isfinite().all()
    assert mean.errors[0].isfinite().all()
    torch.testing.assert_close(gradient + mean.errors[0], given, rtol=1e-5, atol=1e-45)
    assert (gradient != 0).any() == (size >= 1e-30)


# --- exact and bf16 ------------------------------------------------------------------------------


def messages_of(world):
    """Of a plain all-reduce in buckets of 100 numbers: (numbers, whether asynchronous)."""
    messages, all_reduce = [], dist.all_reduce

    def recorded(tensor, **options):
        messages.append((len(tensor), options["async_op"]))
        return all_reduce(tensor, **options)

    dist.all_reduce = recorded
    average_steps(world, "fp32", False, 1, [250, 30])
    dist.all_reduce = all_reduce
    return messages


def test_allreduce_goes_in_buckets_that_overlap():
    assert run_ranks(2, messages_of)[0] == [(n, True) for n in (100, 100, 50, 30)]


def test_bf16_and_what_it_leaves_are_the_number():
    values = torch.randn(2, BLOCK, generator=torch.Generator().manual_seed(0))
    fields = [f[0] for f in Bfloat16().fields(torch.zeros(1, 4 * BLOCK, dtype=torch.uint8))]
    rest = values.clone()
    Bfloat16().encode(rest, fields, True)
    assert torch.equal(fields[0], values.bfloat16())
    assert torch.equal(rest + fields[0].float(), values)


def test_one_replica_keeps_its_gradients():
    (gradient,) = gradients_of(0, 0, [50])
    given = gradient.clone()
    build(section_of("bf16"), [50], World(0, 1, torch.device("cpu"))).average([gradient])
    assert torch.equal(gradient, given)


def test_allreduce_is_the_mean():
    for results, errors, sent in run_ranks(3, average_steps, "fp32", False, 2):
        for step in range(2):
            np.testing.assert_allclose(results[step], true_mean(3, step), rtol=1e-5, atol=1e-6)
        assert errors == [None] * 3
        assert sent == 2 * 2 * 4 * sum(LENGTHS) // 3


def test_bf16_rounds_once_each_way():
    """Not at each hop of a ring: the sum is fp32."""
    ranks = run_ranks(3, average_steps, "bf16", False, 1)
    rounded = [torch.cat(gradients_of(rank, 0)).bfloat16().float() for rank in range(3)]
    expected = ((rounded[0] + rounded[1] + rounded[2]) / 3).bfloat16().float().numpy()
    assert all(np.array_equal(rank[0][0], expected) for rank in ranks)


# --- bytes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountingWorld(World):
    """Counts what the exchanges of the ring's algorithms send."""

    calls = []

    def transpose(self, tensor):
        self.calls.append(tensor.nbytes * (self.size - 1) // self.size)
        return super().transpose(tensor)


def count_bytes(world, lengths):
    counting = CountingWorld(world.rank, world.size, world.device)
    found = {}
    for kind in ("bf16", "int8", "int4"):
        mean = build(section_of(kind), lengths, counting)
        counting.calls.clear()
        mean.average(gradients_of(world.rank, 0, lengths))
        found[kind] = (mean.sent_bytes, list(counting.calls))
    return found


def test_bytes_are_those_sent():
    lengths, size = [70_000, 900], 3
    blocks = 92 + 2  # a third of 70,000 and 900 elements, in whole blocks
    found = run_ranks(size, count_bytes, lengths)[0]
    for kind, (told, calls) in found.items():
        width = {"bf16": 2, "int8": 1, "int4": 0.5}[kind]
        block_bytes = BLOCK * width + (4 if kind != "bf16" else 0)
        assert calls == [2 * blocks * block_bytes] * 2
        assert told == sum(calls)
        planned = 2 * 2 / 3 * sum(lengths) * block_bytes / BLOCK
        assert planned <= told <= 1.02 * planned


def average_alone(world):
    """`quantized_mean`, and the same by a QuantizedMean without feedback."""
    (flat,) = gradients_of(world.rank, 0, [5000])
    given = flat.clone()
    mean = quantized_mean(flat, world, 8)
    other = [flat.clone()]
    build(section_of("int8", False), [5000], world).average(other)
    return torch.equal(flat, given), torch.equal(mean, other[0])


def test_quantized_mean_leaves_its_argument():
    assert run_ranks(2, average_alone) == [(True, True)] * 2


def test_a_shard_of_nothing():
    """ZeRO may leave a rank without parameters."""
    for kind in ("fp32", "bf16", "int8"):
        build(section_of(kind), [], World(0, 1, torch.device("cpu"))).average([])
