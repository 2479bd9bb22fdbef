"""Training speed of our BLOOM against transformers.BloomForCausalLM: forward and backward.

    python benchmarks/model_speed.py [--rounds 5] [--only NAME ...] [--json FILE]

Both models hold the same weights and read the same tokens, alternately in one process, so that a
busy machine slows both; the ratio is the median of the ratios of the rounds. The peer runs as its
users train it: train mode, labels, its default attention. Memory is the highest resident size of a
fresh process that does one step of one model alone, less what it held before.
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from pretrain.config import BloomModel
from pretrain.model import build_model
from pretrain.model.hf import bloom_hf_config

SMALL = BloomModel(vocab_size=16_384, hidden_size=512, layers=8, heads=8)
WIDE_VOCABULARY = BloomModel(vocab_size=250_880, hidden_size=128, layers=4, heads=4)
# The peer's bf16 on a CPU without bf16 instructions takes minutes a step: fewer rounds then.
SECONDS_A_CASE = 60
CASES: dict[str, tuple[BloomModel, int, torch.dtype]] = {
    f"{name}-{length}-{str(dtype).removeprefix('torch.')}": (model, length, dtype)
    for name, model in (("small", SMALL), ("vocab", WIDE_VOCABULARY))
    for length in (512, 1024)
    for dtype in (torch.float32, torch.bfloat16)
}


def make_step(case: str, peer: bool) -> Callable[[], float]:
    """A function that does one forward and backward pass and returns the mean loss."""
    config, length, dtype = CASES[case]
    torch.manual_seed(0)
    ours = build_model(config).to(dtype)
    stream_bt = torch.randint(config.vocab_size, (1, length + 1))
    tokens_bt, targets_bt = stream_bt[:, :-1].contiguous(), stream_bt[:, 1:].contiguous()
    if not peer:
        model = ours
        compute = lambda: model(tokens_bt, targets_bt) / targets_bt.numel()  # noqa: E731
    else:
        model = transformers.BloomForCausalLM(bloom_hf_config(config)).to(dtype).train()
        model.load_state_dict(ours.state_dict())
        # The peer shifts the labels itself; shift_labels hands it ours, so that both predict alike.
        batch = {"input_ids": tokens_bt, "labels": tokens_bt, "shift_labels": targets_bt}
        compute = lambda: model(**batch, use_cache=False).loss  # noqa: E731

    def step() -> float:
        loss = compute()
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


def peak_growth_bytes(case: str, peer: bool) -> int:
    """Growth of this process's highest resident size over one step (Linux)."""

    def peak_bytes() -> int:  # getrusage would begin with the peak of the parent process
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return 1024 * int(found[1]) if found else 0

    step = make_step(case, peer)
    before = peak_bytes()
    step()
    return peak_bytes() - before


def measure(case: str, rounds: int) -> dict[str, Any]:
    """Tokens a second, ratio and memory of one case."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(peak_growth_bytes, (case, peer)) for peer in (False, True)]
    steps = [make_step(case, peer) for peer in (False, True)]
    losses = [step() for step in steps]
    tolerance = 1e-5 if "float32" in case else 1e-2
    if abs(losses[0] / losses[1] - 1) > tolerance:
        raise SystemExit(f"{case}: the losses differ, {losses}: not the same work")
    seconds: list[list[float]] = []
    began = time.perf_counter()
    while len(seconds) < rounds and time.perf_counter() - began < SECONDS_A_CASE:
        seconds.append([])
        for step in steps:
            start = time.perf_counter()
            step()
            seconds[-1].append(time.perf_counter() - start)
    tokens = CASES[case][1]
    return {
        "case": case,
        "ours_tokens_per_second": tokens / statistics.median(ours for ours, _ in seconds),
        "hf_tokens_per_second": tokens / statistics.median(peers for _, peers in seconds),
        "ratio": statistics.median(peers / ours for ours, peers in seconds),
        "rounds": len(seconds),
        "ours_peak_bytes": memory[0],
        "hf_peak_bytes": memory[1],
    }


def machine() -> str:
    """CPU model, cores in use and library versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} cores, "
            f"torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(machine())
    print("case                   ours tok/s   HF tok/s  ratio rounds  ours MB    HF MB")
    results = []
    for case in arguments.only:
        results.append(found := measure(case, arguments.rounds))
        print(
            "{case:22} {ours_tokens_per_second:10.0f} {hf_tokens_per_second:10.0f} {ratio:6.2f} "
            "{rounds:6}".format(**found),
            f"{found['ours_peak_bytes'] / 1e6:8.0f} {found['hf_peak_bytes'] / 1e6:8.0f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
