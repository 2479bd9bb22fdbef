"""`anthesis doctor --speed`: products on every device and an all-reduce between the hosts.

Run as `python -m launch.speed` it is the rank of one host, which the environment tells its place.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.host_facts import BEGIN, END, read_facts
from pretrain.health.finding import Finding, listed

if TYPE_CHECKING:
    from launch.job import Job

_SLOW = 0.7  # of the median, or of the profile's figure
_JOIN_SECONDS = 120
_REDUCED_BYTES = 16 * 2**20
_ROUNDS = 5


def speed_findings(job: "Job", hosts: Sequence[str], timeout: int) -> list[Finding]:
    """Start a rank on each of `hosts` (none: here), and tell who is slow."""
    from launch.doctor import on_hosts, remote

    if job.hosts and not hosts:
        return []
    first = job.master if not hosts or hosts[0] == job.hosts[0] else hosts[0]
    job = replace(job, hosts=tuple(hosts))

    def measure(host: str | None) -> dict[str, Any] | str:
        variables = {
            "RANK": str(hosts.index(host) if host else 0),
            "WORLD_SIZE": str(max(1, len(hosts))),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": first,
            "MASTER_PORT": str(job.port),
        }
        output, last, _ = remote(
            job, host, ["launch.speed"], timeout, 2 * _JOIN_SECONDS, **variables
        )
        return read_facts(output) or last

    link = getattr(getattr(job.site, "network", None), "between", None)
    return judge(
        on_hosts(job, measure, at_once=max(1, len(hosts))), link.gbytes_per_s if link else None
    )


def judge(
    measured: Mapping[str, dict[str, Any] | str], expected_gbytes: float | None
) -> list[Finding]:
    """What the measurements mean; `expected_gbytes` a second is the profile's bus bandwidth."""
    found = [
        Finding("speed", "error", text, "see why a rank cannot run there: the others wait for it",
                (host,))
        for host, text in measured.items() if isinstance(text, str)
    ]  # fmt: skip
    good = {host: one for host, one in measured.items() if not isinstance(one, str)}
    speeds = [speed for one in good.values() for speed in one["tflops"]]
    if not speeds:
        return found
    median = statistics.median(speeds)
    for host, one in good.items():
        if slow := [speed for speed in one["tflops"] if speed < _SLOW * median]:
            found.append(
                Finding(
                    "speed",
                    "warning",
                    f"{listed([f'{speed:.3g}' for speed in slow])} TFLOPs of a device, the median "
                    f"is {median:.3g}: all others would wait for it",
                    "see what else runs there, its clock rates and its cooling, or --exclude it",
                    (host,),
                )
            )
    text = f"products: {min(speeds):.3g} to {max(speeds):.3g} TFLOPs a device"
    if len(good) > 1:
        seconds = max(one["seconds"] for one in good.values())
        bus = 2 * (len(good) - 1) / len(good) * _REDUCED_BYTES / seconds / 1e9
        text += (
            f"; all-reduce of {len(good)} hosts: {bus:.3g} GB/s, {seconds * 1e3:.3g} ms for 16 MiB"
        )
        if expected_gbytes and bus < _SLOW * expected_gbytes:
            slower = f"all-reduce at {bus:.3g} GB/s; network.between promises {expected_gbytes:g}"
            cure = "see which card is used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or the cables"
            found.append(Finding("speed", "warning", slower, cure))
    return [*found, Finding("speed", "ok", text)]


def main() -> int:
    """Measure as the rank that the environment says; returns the exit code."""
    import torch

    from pretrain.engine.world import join_world
    from pretrain.observe.throughput import measure_peak_flops

    with join_world(_JOIN_SECONDS) as world:
        gpus = range(torch.cuda.device_count())
        devices = [torch.device("cuda", number) for number in gpus] or [world.device]
        dtype = torch.bfloat16 if gpus else torch.float32
        speeds = [measure_peak_flops(device, dtype) / 1e12 for device in devices]
        numbers = torch.zeros(_REDUCED_BYTES // 4, device=world.device)
        seconds = []
        for _ in range(_ROUNDS + 1):
            world.barrier()
            began = time.perf_counter()
            world.sum(numbers)[0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        found = {"tflops": speeds, "seconds": statistics.median(seconds[1:])}
    print(f"\n{BEGIN}{json.dumps(found)}{END}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
