"""The planner held against what happens: memory and step time, predicted and measured.

    python benchmarks/planner.py [--only NAME ...] [--cluster FILE] [--steps 4] [--json FILE]

The profile of this machine is measured first (or read from --cluster), then each case is planned
and run: real ranks under torchrun, twice. Time is the median step of a run as users start it.
Memory is the highest resident size of the fullest rank in a run whose C library gives freed blocks
back at once (MALLOC_MMAP_THRESHOLD_): what is in use, as max_memory_allocated tells on a GPU. With
the C library's defaults the resident size is larger by what it keeps for later, also shown.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w

from launch.cli import main as anthesis
from launch.clusters import load_cluster
from launch.plan import Plan
from pretrain.config_file import load
from pretrain.data import ShardWriter
from pretrain.quantities import human_bytes


class Case(NamedTuple):
    """A model, and how it is spread."""

    hidden: int
    layers: int
    vocab: int
    length: int
    stage: int
    precision: str
    ranks: int
    micro: int
    batch: int
    recompute: bool = False


CASES = {
    "30M-zero1-fp32": Case(512, 8, 8192, 256, 1, "fp32", 1, 2, 4),
    "55M-zero2-fp32": Case(768, 6, 16384, 256, 2, "fp32", 2, 2, 8),
    "110M-zero1-bf16": Case(1024, 8, 8192, 256, 1, "bf16", 2, 2, 8),
    "110M-zero3-bf16": Case(1024, 8, 8192, 256, 3, "bf16", 2, 4, 8),
    "55M-zero2-bf16": Case(768, 6, 16384, 512, 2, "bf16", 1, 4, 8),
    "30M-zero3-recompute": Case(512, 8, 8192, 512, 3, "bf16", 1, 8, 16, True),
    # Not looked at when the planner's constants were fitted.
    "new-13M-zero3-fp32": Case(384, 6, 4096, 512, 3, "fp32", 2, 4, 16),
    "new-67M-zero1-recompute": Case(768, 8, 16384, 256, 1, "fp32", 2, 4, 16, True),
    "new-21M-zero2-bf16": Case(512, 4, 16384, 256, 2, "bf16", 2, 8, 32),
}


def write_config(case: Case, folder: Path, steps: int) -> Path:
    """A run of `steps` steps on random tokens."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "text", case.vocab) as writer:
        for _ in range(200):
            writer.append(generator.integers(0, case.vocab, size=1000).tolist())
    tree = {
        "name": "planner",
        "directory": str(folder / "runs"),
        "start": "fresh",
        "model": {"vocab_size": case.vocab, "hidden_size": case.hidden, "layers": case.layers,
                  "heads": case.hidden // 64},
        "data": {"sequence_length": case.length,
                 "sources": [{"name": "text", "path": str(folder / "text")}]},
        "recipe": {"train": f"{steps} steps", "learning_rate": {"peak": 1e-4},
                   "batch": {"final": case.batch}},
        "engine": {"zero_stage": case.stage, "precision": case.precision,
                   "micro_batch_samples": case.micro, "activation_checkpointing": case.recompute},
        "observe": {"tensorboard": False, "peak_tflops": 1.0},
    }  # fmt: skip
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def run(case: Case, config: Path, given_back: bool) -> tuple[float, int]:
    """(median seconds of a step, highest resident bytes of a rank) of a run under torchrun."""
    folder = config.parent
    env = os.environ | {"PLANNER_OUTPUT": str(folder)}
    if given_back:
        env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={case.ranks}", __file__, "--rank-of", str(config)]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    rows = (folder / "runs/planner/metrics.jsonl").read_text().splitlines()
    seconds = [row["step_seconds"] for row in map(json.loads, rows) if "loss" in row]
    peaks = [int(path.read_text()) for path in folder.glob("peak-*")]
    return statistics.median(seconds[1:]), max(peaks)


def rank_main(config: str) -> int:
    """One rank: the worker, then its highest resident size into a file."""
    from pretrain.train import main as worker

    code = worker([config])
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    file = Path(os.environ["PLANNER_OUTPUT"]) / f"peak-{os.environ['RANK']}"
    file.write_text(str(1024 * int(peak[1]) if peak else 0))
    return code


def measure(name: str, cluster: Path, steps: int) -> dict[str, Any]:
    """Predicted and measured figures of one case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(case, Path(folder), steps)
        profile = load_cluster(cluster).model_copy(update={"devices_per_node": case.ranks})
        plan = Plan(load(config), profile)
        kept_seconds, kept = run(case, config, given_back=False)
        _, peak = run(case, config, given_back=True)
    cost = plan.final_cost
    return {
        "case": name,
        "parameters": plan.shape.parameters,
        "parts": plan.memory,
        "predicted_bytes": plan.rank_bytes,
        "measured_bytes": peak,
        "resident_bytes": kept,
        "predicted_seconds": cost.seconds,
        "parts_seconds": [cost.compute, cost.optimizer, cost.zero_communication],
        "measured_seconds": kept_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--cluster", type=Path, help="default: measured now")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        raise SystemExit(rank_main(options.rank_of))
    with tempfile.TemporaryDirectory() as folder:
        cluster = options.cluster or Path(folder) / "cluster.toml"
        if options.cluster is None:
            anthesis(["cluster", "measure", "--output", str(cluster)])
        print(f"{'case':<24}{'ranks':>6}{'memory':>9}{'found':>9}{'ratio':>7}{'(kept)':>9}"
              f"{'s/step':>9}{'found':>8}{'ratio':>7}")  # fmt: skip
        results = []
        for name in options.only:
            results.append(found := measure(name, cluster, options.steps))
            print(
                f"{name:<24}{CASES[name].ranks:>6}{human_bytes(found['predicted_bytes']):>9}"
                f"{human_bytes(found['measured_bytes']):>9}"
                f"{found['predicted_bytes'] / found['measured_bytes']:>7.2f}"
                f"{human_bytes(found['resident_bytes']):>9}"
                f"{found['predicted_seconds']:>9.3g}{found['measured_seconds']:>8.3g}"
                f"{found['predicted_seconds'] / found['measured_seconds']:>7.2f}",
                flush=True,
            )
        if options.json:
            profile = load_cluster(cluster).model_dump(mode="json")
            options.json.write_text(json.dumps({"profile": profile, "results": results}, indent=1))


if __name__ == "__main__":
    main()
