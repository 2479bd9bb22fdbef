"""`anthesis cluster measure`: fills in a cluster profile by measuring.

By itself it starts some ranks on this machine. Started by a launcher on several nodes (torchrun,
deepspeed, srun: whatever sets RANK) each process is a rank of that job:

    torchrun --nnodes 2 --nproc-per-node 8 ... -m launch.measure --output ours.toml
"""

import argparse
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from launch.arguments import positive

_TIMEOUT_SECONDS = 600
# BLOOM lost one or two GPUs a week on 48 nodes (huggingface.co/blog/bloom-megatron-deepspeed).
_NODE_MTBF_DAYS = 224.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--output", type=Path, default=Path("cluster.toml"), metavar="FILE",
                        help="profile to write (cluster.toml)")  # fmt: skip
    parser.add_argument("--name", help="of the cluster (default: that of the file)")
    parser.add_argument("--ranks", type=positive, metavar="N",
                        help="to start here (one a GPU, else 2)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S",
                        help="to spend on each figure (2)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(options: argparse.Namespace) -> int:
    """Measure and write the profile; returns the exit code. Raises UserError."""
    from pretrain.errors import UserError

    if "RANK" not in os.environ:
        if problem := _problem(options.output, options.force):  # before anything takes time
            raise UserError(problem)
        import torch

        ranks = options.ranks or torch.cuda.device_count() or 2
        if ranks > 1:
            return _start(options, ranks, torch.get_num_threads())
    return _measure(options)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank; returns the exit code."""
    from pretrain.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m launch.measure", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _start(options: argparse.Namespace, ranks: int, cores: int) -> int:
    """Run this module on `ranks` local ranks, which share the cores."""
    threads = str(max(1, cores // ranks))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "launch.measure"),
        *("--output", str(options.output), "--seconds", str(options.seconds)),
        *(["--name", options.name] if options.name else []),
        *(["--force"] if options.force else []),
    ]
    # torchrun would give each rank one core, however many there are.
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads} | os.environ).returncode


def _measure(options: argparse.Namespace) -> int:
    """What a rank does."""
    from torch import distributed as dist

    from pretrain.engine.world import join_world
    from pretrain.errors import UserError
    from pretrain.lab.measure import measure

    with join_world(_TIMEOUT_SECONDS) as world:

        def say(what: str) -> None:
            if world.is_first:
                print(f"measuring: {what}", flush=True)

        problem = [_problem(options.output, options.force) if world.is_first else None]
        dist.broadcast_object_list(problem)  # so that all ranks stop, not only the first
        if problem[0]:
            raise UserError(problem[0])
        measured = measure(world, options.seconds, say)
        if world.is_first:
            profile = _completed(measured.profile, options.name or options.output.stem)
            _write(options, profile, measured.notes, world.size)
            print(_table(profile), f"-> {options.output}", sep="\n", flush=True)
    return 0


def _problem(output: Path, force: bool) -> str | None:
    """Why `output` must not or cannot be written."""
    if output.exists() and not force:
        return (
            f"{output}: exists\n"
            "  rule: a profile is not replaced unless asked for\n"
            "  cure: choose another --output, or add --force"
        )
    if not output.parent.is_dir():
        return f"{output}: no such folder\n  cure: make it, or choose another --output"
    return None


def _completed(measured: dict[str, Any], name: str) -> dict[str, Any]:
    """The profile as it is written: name and source first, figures rounded."""
    device = measured["device"]
    sizes = {key: f"{round(device[key] / 1e6)}MB" for key in ("memory", "runtime")}
    return {
        "name": name,
        "sources": [f"measured by `anthesis cluster measure` on {date.today().isoformat()}"],
        **_rounded(measured),
        "device": _rounded(device) | sizes,
        "reliability": {"node_mtbf_days": _NODE_MTBF_DAYS} | _rounded(measured["reliability"]),
    }


def _rounded(value: Any) -> Any:
    """Floats in a tree to three digits: more would be noise."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _write(
    options: argparse.Namespace, profile: dict[str, Any], notes: dict[str, str], ranks: int
) -> None:
    import tomli_w
    import torch

    from pretrain.errors import UserError

    text = tomli_w.dumps(profile)
    notes = notes | {"reliability": "node_mtbf_days is not measured: 1.5 GPUs a week on 48 nodes"}
    for section, note in notes.items():
        text = text.replace(f"[{section}]\n", f"# {note}\n[{section}]\n")
    header = (
        f"# Measured by `anthesis cluster measure` on {date.today().isoformat()}:\n"
        f"# {profile['device']['name']}, torch {torch.__version__}, {ranks} rank(s) at once with "
        f"{torch.get_num_threads()} thread(s) each.\n"
        "# Speed of devices: the best of several rounds of the model's own products, forward and\n"
        "# backward, and of a triad; links and disk: the median of several rounds.\n"
        "# For your own machines: anthesis cluster measure --output FILE\n\n"
    )
    try:
        with options.output.open("w" if options.force else "x", encoding="utf-8") as file:
            file.write(header + text)
    except OSError as error:
        raise UserError(
            f"{options.output}: cannot be written: {error.strerror}\n"
            "  cure: choose another --output"
        ) from None


def _table(profile: dict[str, Any]) -> str:
    device, network = profile["device"], profile["network"]
    rows = [
        ("nodes x devices", f"{profile['nodes']} x {profile['devices_per_node']}"),
        ("device", device["name"] + (" (the whole node)" if device["shared_cores"] else "")),
        ("memory, taken by libraries", f"{device['memory']}, {device['runtime']}"),
        ("memory bandwidth", f"{device['memory_gbytes_per_s']:g} GB/s"),
        *((f"products, {name}", f"{peak:g} TFLOP/s") for name, peak in
          device["peak_tflops"].items()),
        *((f"all-reduce {name}", f"{link['gbytes_per_s']:g} GB/s, {link['latency_us']:g} us")
          for name, link in network.items()),
        ("writing", f"{profile['reliability']['write_gbytes_per_s']:g} GB/s"),
    ]  # fmt: skip
    return "\n".join(f"  {label:28}{value}" for label, value in rows)


if __name__ == "__main__":
    sys.exit(main())
