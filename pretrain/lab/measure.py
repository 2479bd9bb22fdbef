"""Measures the machines of a job: what a cluster profile (`launch.clusters`) has to know of them.

All ranks work at once, in rounds that begin together; a round lasts as long as its slowest rank.
The speed of devices is that of the best round, since other users of a machine only slow it down;
that of links and disks is the median, since queues are part of what they are.
"""

import gc
import os
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pretrain.train  # noqa: F401  (what a worker imports is part of its memory)
from pretrain.config import BloomModel, Engine
from pretrain.config_optim import AdamW
from pretrain.engine.world import World
from pretrain.engine.zero import ZeroEngine
from pretrain.errors import UserError
from pretrain.model import build_model
from pretrain.model.bloom import linear

_LEAST_ROUNDS = 3
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Tokens of a micro-batch and hidden size, elements of a triad's array, bytes of a large message.
_PRODUCTS = {"cpu": (1024, 512), "cuda": (4096, 4096)}
_TRIAD_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
_MESSAGE_BYTES = {"cpu": 2**26, "cuda": 2**28}
_PROBE_BYTES = 2**20  # tells how long a message may be
_LATENCY_OPS = 20  # one after the other, so that a late start of one rank does not count
_WRITE_BYTES = 2**26


@dataclass(frozen=True)
class Measured:
    """A profile without its name, and by section what in it could not be measured."""

    profile: dict[str, Any]
    notes: dict[str, str]


def measure(world: World, seconds: float, say: Callable[[str], None]) -> Measured:
    """Measure with all ranks of `world`, some `seconds` for each figure; the same on all ranks.

    `say` is told what is being measured. Raises UserError where nodes have unequal numbers of
    ranks, or the current folder cannot be written.
    """
    say("memory of a rank with all libraries")
    runtime = _largest(world, _runtime_bytes(world))  # first: later figures leave memory behind
    hosts = _ranks_by_host(world)
    nodes, per_node = len(hosts), len(hosts[0])
    shared = world.device.type == "cpu"
    together = per_node if shared else 1  # ranks whose speed adds up to a device's

    def peak(name: str) -> float:
        say(f"matrix products in {name}")
        work, flops = _products(world.device, _DTYPES[name])
        return together * flops / min(_rounds(world, work, seconds)) / 1e12

    peaks = {name: peak(name) for name in _dtypes(world.device)}
    say("bandwidth of memory")
    work, moved = _triad(world.device)
    memory_speed = together * moved / min(_rounds(world, work, seconds)) / 1e9
    network, notes = _network(world, hosts, seconds, say)
    if network["inside"] is None:
        network["inside"] = {"gbytes_per_s": memory_speed, "latency_us": 1.0}
    if network["between"] is None:
        network["between"] = dict(network["inside"])
    say("writing to the current folder")
    written = world.size * _WRITE_BYTES / statistics.median(_rounds(world, _write, seconds)) / 1e9
    profile = {
        "nodes": nodes,
        "devices_per_node": per_node,
        "device": {
            "name": _device_name(world.device),
            "memory": -int(_largest(world, -_memory_bytes(world.device))),
            "peak_tflops": peaks,
            "memory_gbytes_per_s": memory_speed,
            "runtime": int(runtime),
            "shared_cores": shared,
        },
        "network": network,
        "reliability": {"write_gbytes_per_s": written},
    }
    return Measured(profile, notes)


# --- rounds ---------------------------------------------------------------------------------------


def _rounds(world: World, work: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each of several rounds of `work`, for `seconds` in all; the first is left out."""
    times: list[float] = []
    began = time.perf_counter()
    while True:
        world.barrier()
        start = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        end = time.perf_counter()
        times.append(_largest(world, end - start))
        if len(times) == 1:
            began = end  # a first round sets up threads, connections and plans of kernels
        elif len(times) > _LEAST_ROUNDS and _largest(world, end - began) >= seconds:
            return times[1:]


def _largest(world: World, value: float) -> float:
    """The largest of all ranks' values."""
    largest = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


# --- devices --------------------------------------------------------------------------------------


def _dtypes(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["bf16", "fp32"]
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return [*(["bf16"] if bf16 else []), "fp16", "fp32"]


def _products(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """The linear maps of a block, forward and backward, as the model computes them; their FLOPs."""
    tokens, hidden = _PRODUCTS[device.type]
    maps = []
    for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
        x, weight, grad = (
            torch.randn(rows, columns, device=device, dtype=dtype)
            for rows, columns in (
                (tokens, inputs * hidden),
                (outputs * hidden, inputs * hidden),
                (tokens, outputs * hidden),
            )
        )
        maps.append((x.requires_grad_(), weight.requires_grad_(), grad))

    def work() -> None:
        for x, weight, grad in maps:
            torch.autograd.grad(linear(x, weight, None), (x, weight), grad)

    return work, 3 * sum(2 * tokens * weight.numel() for _, weight, _ in maps)


def _triad(device: torch.device) -> tuple[Callable[[], None], int]:
    """STREAM's triad a = b + s c, and the bytes that it moves."""
    a, b, c = (torch.rand(_TRIAD_ELEMENTS[device.type], device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a), 3 * a.nbytes


def _runtime_bytes(world: World) -> int:
    """Memory of this rank, libraries and contexts, after a pass of a model of some kilobytes.

    The pass makes the libraries load what they load at their first use.
    """
    model = build_model(BloomModel(vocab_size=64, hidden_size=16, layers=1, heads=2))
    config = Engine(zero_stage=1, precision="fp32")
    engine = ZeroEngine(model, AdamW(), config, world)
    engine.forward_backward(torch.zeros(1, 9, dtype=torch.long), world.size)
    del model, engine
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(world.device)
        return total - free - torch.cuda.memory_reserved(world.device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, {os.cpu_count()} cores"


def _write() -> None:
    """Write to a file of the current folder, down to the disk."""
    data = torch.randint(256, (_WRITE_BYTES,), dtype=torch.uint8).numpy()
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"the current folder cannot be written: {error.strerror}\n"
            f"  rule: its speed is measured with {_WRITE_BYTES >> 20} MiB a rank\n"
            "  cure: start in the folder where checkpoints will be"
        ) from None


# --- links ----------------------------------------------------------------------------------------


def _ranks_by_host(world: World) -> list[list[int]]:
    """The ranks of each node; nodes are told apart by their host names."""
    names: list[str] = [""] * world.size
    dist.all_gather_object(names, socket.gethostname())
    by_host: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        by_host.setdefault(name, []).append(rank)
    if len({len(ranks) for ranks in by_host.values()}) > 1:
        found = ", ".join(f"{name}: {len(ranks)}" for name, ranks in by_host.items())
        raise UserError(
            f"ranks by host name are {found}\n"
            "  rule: all nodes have the same number of ranks\n"
            "  cure: start one rank for each device of each node"
        )
    return list(by_host.values())


def _network(
    world: World, hosts: list[list[int]], seconds: float, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of both networks, None for one that is not there, and why it is not."""
    figures: dict[str, Any] = {"inside": None, "between": None}
    notes: dict[str, str] = {}
    if len(hosts[0]) > 1:
        say("all-reduce inside a node")
        figures["inside"] = _link(world, hosts, 1, seconds)
    else:
        notes["network.inside"] = (
            "not measured, there was one rank a node: the memory's bandwidth stands in"
        )
    if len(hosts) > 1:
        say("all-reduce between nodes")
        # All ranks of a node at once, since one may not fill all of its network cards.
        lanes = [list(ranks) for ranks in zip(*hosts, strict=True)]
        figures["between"] = _link(world, lanes, len(lanes), seconds)
    else:
        notes["network.between"] = "not measured, there was one node: copied from network.inside"
    return figures, notes


def _link(world: World, groups: list[list[int]], sharing: int, seconds: float) -> dict[str, float]:
    """Ring bandwidth and latency of all-reduces inside `groups`, `sharing` of which share a link.

    Bus bandwidth: 2 (n - 1) / n times the bytes of the message, over seconds.
    """
    group, _ = dist.new_subgroups_by_enumeration(groups)
    ring = 2 * (len(groups[0]) - 1) / len(groups[0])

    def all_reduces(size_bytes: int, count: int, limit_seconds: float) -> float:
        """Median of the seconds of one."""
        message = torch.zeros(size_bytes // 4, device=world.device)  # sums of ones would overflow

        def work() -> None:
            for _ in range(count):
                dist.all_reduce(message, group=group)

        return statistics.median(_rounds(world, work, limit_seconds)) / count

    probe = all_reduces(_PROBE_BYTES, 1, 0.0)
    most = _MESSAGE_BYTES[world.device.type]
    fits = int(_PROBE_BYTES * seconds / _LEAST_ROUNDS / probe)
    size_bytes = max(_PROBE_BYTES, min(most, fits)) & ~3
    return {
        "gbytes_per_s": sharing * ring * size_bytes / all_reduces(size_bytes, 1, seconds) / 1e9,
        "latency_us": 1e6 * all_reduces(4, _LATENCY_OPS, seconds),
    }
