"""Step time of every optimizer on 98M parameters in one process, beside torch's fused AdamW.

    python benchmarks/optimizers.py [--rounds 7] [--markdown] [--only lamb muon]

Only the optimizer's own step is timed: gradients lie in the flat buffers that ZeRO makes, one a
role. AdamW and the other take turns, so that the ratio is of one stretch of time. "least bytes" is
what has to pass through memory once (weights and states read and written, gradients read), "per
byte" the ratio of times for the same number of bytes, "GB/s" those bytes over the time. Above the
table stands what plain copies and additions of as much memory reach.
"""

import argparse
import platform
import statistics
import time

import torch
from tqdm import tqdm

from pretrain.config import BloomModel
from pretrain.config_optim import (
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdEmaMix,
    Lamb,
    Lars,
    Lion,
    Muon,
    OptimizerSection,
    RmsProp,
    ScheduleFreeAdamW,
    ScheduleFreeSgd,
    Sgd,
    Sgdw,
    Soap,
)
from pretrain.engine.world import World
from pretrain.model.bloom import Bloom
from pretrain.optim.groups import ROLES, fused_matrices, parameter_roles
from pretrain.optim.registry import build_optimizer
from pretrain.optim.shards import Place, Shards
from pretrain.sizes import shape_of

MODEL = BloomModel(vocab_size=16384, hidden_size=768, layers=12, heads=12)
SECTIONS: dict[str, OptimizerSection] = {
    "sgd, no momentum": Sgd(momentum=0.0),
    "sgd": Sgd(),
    "sgd, Nesterov": Sgd(nesterov=True),
    "sgdw": Sgdw(),
    "adagrad": Adagrad(),
    "adadelta": Adadelta(),
    "rmsprop": RmsProp(),
    "rmsprop, momentum": RmsProp(momentum=0.9),
    "adam": Adam(),
    "lion": Lion(),
    "ademamix": AdEmaMix(),
    "schedulefree": ScheduleFreeAdamW(),
    "schedulefree-sgd": ScheduleFreeSgd(),
    "lars": Lars(),
    "lamb": Lamb(),
    "adafactor": Adafactor(),
    "muon": Muon(),
    "soap": Soap(every_steps=1000),
}


class Job:
    """An optimizer on the model's flat buffers, which `gradients` fills before each step."""

    def __init__(self, section: OptimizerSection) -> None:
        shape = shape_of(MODEL)
        with torch.device("meta"):
            model = Bloom(MODEL)
        roles, parameters = parameter_roles(model), dict(model.named_parameters())
        masters, held, places = [], [], []
        for role in [role for role in ROLES if role in roles.values()]:
            offset = 0
            for name in (name for name in parameters if roles[name] == role):
                size = parameters[name].numel()
                place = Place(name, parameters[name].shape, role, 0, size, len(masters), offset)
                places.append(place)
                offset += size
            masters.append(torch.randn(offset) * 0.02)
            held.append(role)
        self.gradients = [torch.randn_like(master) * 1e-3 for master in masters]
        self.masters, alone = masters, World(0, 1, torch.device("cpu"))
        shards = Shards(masters, held, places, list(parameters), alone, fused_matrices(model))
        self.optimizer = build_optimizer(shards, section)
        for group in self.optimizer.param_groups:
            decayed = group["role"] in section.decayed_roles
            group.update(lr=1e-5, weight_decay=section.weight_decay if decayed else 0.0)
        states = section.state_numbers(shape.hidden_matrices, shape.others)
        self.least_bytes = 4 * (3 * shape.parameters + 2 * states)

    def seconds(self) -> float:
        """Time of a step."""
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            if master.grad is None:
                master.grad = torch.empty_like(master)
            master.grad.copy_(gradient)  # steps may overwrite it
        began = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - began


def memory_speeds(elements: int = 100_000_000) -> dict[str, float]:
    """GB/s of a copy and of an addition, the best of five."""
    a, b, c = (torch.ones(elements) for _ in range(3))
    found = {}
    for name, work, arrays in (
        ("copy", lambda: a.copy_(b), 2),
        ("addition", lambda: torch.add(a, b, out=c), 3),
    ):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        found[name] = 4 * arrays * elements / min(times) / 1e9
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", action="store_true", help="rows for docs/optimizers.md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    speeds = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in memory_speeds().items())
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{shape_of(MODEL).parameters:,} parameters; memory: {speeds}")
    titles = ("optimizer", "ms", "ratio", "least bytes", "per byte", "GB/s")
    bar = " | " if options.markdown else "  "
    widths = (20, 6, 6, 11, 8, 6)

    def show(*cells: str) -> None:
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(
            zip(cells, widths, strict=True)))  # fmt: skip
        tqdm.write((f"| {bar.join(padded)} |") if options.markdown else bar.join(padded))

    show(*titles)
    adamw = Job(AdamW())
    adamw.seconds()
    for name in tqdm(options.only, unit="optimizer", disable=None):
        job = Job(SECTIONS[name])
        for _ in range(2):  # states are made, kernels compiled
            job.seconds()
        pairs = [(adamw.seconds(), job.seconds()) for _ in range(options.rounds)]
        ratio = statistics.median(other / base for base, other in pairs)
        mine = statistics.median(other for _, other in pairs)
        byte_ratio = ratio * adamw.least_bytes / job.least_bytes
        show(
            name, f"{mine * 1e3:.0f}", f"{ratio:.2f}", f"{job.least_bytes / 1e9:.2f} GB",
            f"{byte_ratio:.2f}", f"{job.least_bytes / mine / 1e9:.1f}",
        )  # fmt: skip
    base = statistics.median(adamw.seconds() for _ in range(options.rounds))
    show(
        "adamw (torch, fused)", f"{base * 1e3:.0f}", "1.00", f"{adamw.least_bytes / 1e9:.2f} GB",
        "1.00", f"{adamw.least_bytes / base / 1e9:.1f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
