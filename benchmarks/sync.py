"""Keeping two hosts together, by each method: bytes, time a step on links of several speeds, loss.

    python benchmarks/sync.py speed      98M parameters, two hosts of namespaces (needs root)
    python benchmarks/sync.py quality    the demo's model and data, two ranks (after `make demo`)
    python benchmarks/sync.py report     table and docs/sync.png of what the two have measured

Hosts are those of tests/hosts.py: Linux namespaces with a network card each, on links that `tc`
limits; bytes are read from the cards' counters. A step of DiLoCo is one of its own steps and the
share that a round has in it: a round is measured once and divided by H.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.config_sync import OuterSection, SyncSection, parse_sync  # noqa: E402

RESULTS = ROOT / "runs" / "sync-benchmark"
FIGURE = ROOT / "docs" / "sync.png"
METHODS = ["allreduce", "allreduce:bf16", "powersgd:4", "powersgd:2", "powersgd:1", "int8", "int4"]
ROUNDS = ["diloco:1", "diloco:1:int4"]  # measured by the round
STEPS_BETWEEN = (10, 50)
QUALITY = [*METHODS, "localsgd:10", "diloco:10", "diloco:50", "diloco:50:int4"]
LENGTH, MEASURED = 256, 5
QUALITY_TOKENS = "120k tokens"


@dataclass(frozen=True)
class Link:
    """Between the hosts: a rate for `tc`, and how long a frame is under way."""

    name: str
    rate: str | None
    one_way_seconds: float = 0.0


# A frame passes two cables, each with half of the delay.
LINKS = [Link("unlimited", None), Link("1 Gbit/s", "1gbit"), Link("100 Mbit/s", "100mbit"),
         Link("100 Mbit/s + 10 ms", "100mbit", 0.005)]  # fmt: skip


# --- speed: the controller ------------------------------------------------------------------------


def speed() -> None:
    """Measure every method on every link, and write speed.json."""
    from tests.hosts import reason_missing

    if reason := reason_missing():
        raise SystemExit(f"no hosts here: {reason}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = []
    for delay in sorted({link.one_way_seconds for link in LINKS}):
        found += _on_links([link for link in LINKS if link.one_way_seconds == delay], delay)
    (RESULTS / "speed.json").write_text(json.dumps(found, indent=1))


def _on_links(links: list[Link], delay: float) -> list[dict[str, Any]]:
    from tests.hosts import Hosts

    talk = RESULTS / "talk"
    subprocess.run(["rm", "-rf", str(talk)], check=True)
    talk.mkdir()
    found = []
    with Hosts(2) as hosts:
        for i in range(2):
            hosts.delay(i, delay / 2)
        workers = [
            hosts.start(
                i,
                [sys.executable, __file__, "worker", str(talk)],
                {"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h0",
                 "MASTER_PORT": "29500"},
                RESULTS / f"worker{i}.txt",
            )
            for i in range(2)
        ]  # fmt: skip
        for link in links:
            for method in [*METHODS, *ROUNDS]:
                order = talk / "order.json"
                steps = 1 if link.rate else MEASURED  # a slow link's time is that of the message
                order.with_suffix(".new").write_text(json.dumps({"method": method, "steps": steps}))
                order.with_suffix(".new").rename(order)
                _await(talk / "ready", workers)
                for i in range(2):
                    hosts.shape(i, link.rate)
                before = hosts.sent_bytes(0)
                (talk / "go").touch()
                answer = json.loads(_await(talk / "done", workers))
                answer["bytes"] = (hosts.sent_bytes(0) - before) / steps
                for i in range(2):
                    hosts.shape(i, None)
                found.append({"link": link.name, "method": method, **answer})
                print(json.dumps(found[-1]), flush=True)
        for worker in workers:
            worker.kill()
    return found


def _await(path: Path, workers: list[Any]) -> str:
    while not path.exists():
        if any(worker.poll() is not None for worker in workers):
            raise SystemExit(f"a worker has ended, see {RESULTS}/worker0.txt")
        time.sleep(0.02)
    text = path.read_text()
    path.unlink()
    return text


# --- speed: a rank --------------------------------------------------------------------------------


def worker(talk: Path) -> None:
    """Carry out the controller's orders."""
    import torch

    from pretrain.config import BloomModel, Engine
    from pretrain.config_optim import AdamW
    from pretrain.engine.world import join_world, split_world
    from pretrain.engine.zero import ZeroEngine
    from pretrain.model.bloom import Bloom

    with join_world(600) as world:
        world = split_world(world, 1)
        torch.manual_seed(0)
        model = Bloom(BloomModel(vocab_size=16_384, hidden_size=768, layers=12, heads=12))
        engine = ZeroEngine(model, AdamW(), Engine(precision="fp32"), world)
        while True:
            order = _together(world, talk / "order.json")
            measured = _measure(engine, parse_sync(order["method"]), order["steps"], talk)
            if world.is_first:
                (talk / "done.new").write_text(json.dumps(measured))
                (talk / "done.new").rename(talk / "done")


def _together(world: Any, path: Path) -> dict[str, Any]:
    """What the first rank reads in a file, once it is there."""
    order = None
    if world.is_first:
        while not path.exists():
            time.sleep(0.02)
        order = json.loads(path.read_text())
        path.unlink()
    answer: dict[str, Any] = world.gather(order)[0]
    return answer


def _measure(engine: Any, section: SyncSection, steps: int, talk: Path) -> dict[str, float]:
    """Seconds of a whole step and of its sync (medians), and of processor time in the sync."""
    import torch

    from pretrain.recipe import Clock, StepPlan
    from pretrain.sync.fixed import FixedMembers
    from pretrain.sync.gradients import GradientSync
    from pretrain.sync.registry import mean_of
    from pretrain.sync.rounds import OuterSync

    world = engine.world
    if isinstance(section, OuterSection):
        engine.sync = OuterSync(section, engine, FixedMembers(world), {})
    else:
        mean = mean_of(section, engine.shards, world.replicas, 0)
        engine.sync = GradientSync(engine, mean, mean, 0, None)
    clock = engine.sync.begin(Clock())
    whole, sync, busy = [], [], []
    for step in range(-1, steps):
        rows = torch.randint(0, 16_384, (1, LENGTH + 1))
        if step == 0:
            world.barrier()
            if world.is_first:
                (talk / "ready").touch()
                _await(talk / "go", [])
            world.barrier()
        began, spent = time.perf_counter(), _SyncTime(engine.sync)
        with spent:
            plan = StepPlan(2, 1e-5, 0.1, (0.9, 0.95), 1.0)
            engine.step(plan, engine.forward_backward(rows, 2, clock))
            clock = Clock(clock.step + 1, clock.samples + 2, clock.tokens + 2 * LENGTH)
            engine.sync.stepped(clock)
        world.barrier()
        if step >= 0:
            whole.append(time.perf_counter() - began)
            sync.append(engine.sync.seconds)
            busy.append(spent.processor_seconds)
    engine.sync.close()
    median = statistics.median
    return {"step_seconds": median(whole), "sync_seconds": median(sync),
            "processor_seconds": median(busy)}  # fmt: skip


class _SyncTime:
    """Processor time of this process inside the sync's own calls."""

    def __init__(self, sync: Any) -> None:
        self._sync, self.processor_seconds = sync, 0.0

    def __enter__(self) -> None:
        for name in ("gradients", "stepped"):
            setattr(self._sync, name, self._timed(getattr(self._sync, name)))

    def __exit__(self, *_: object) -> None:
        del self._sync.gradients, self._sync.stepped

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments)
            finally:
                self.processor_seconds += time.process_time() - began

        return timed


# --- quality --------------------------------------------------------------------------------------


def quality() -> None:
    """Train the demo's model with every method on the same tokens, and write quality.json."""
    from pretrain.config_file import load
    from pretrain.observe.metrics import read_metrics

    RESULTS.mkdir(parents=True, exist_ok=True)
    found = []
    for method in QUALITY:
        section = parse_sync(method).model_dump(mode="json", exclude_unset=True)
        section["method"] = parse_sync(method).method
        overrides = [
            f"name={method.replace(':', '-')}", f"directory={RESULTS / 'runs'}", "start=fresh",
            "mesh.shard_ranks=1", f"recipe.train={QUALITY_TOKENS}", "observe.tensorboard=false",
            f"recipe.learning_rate.decay={QUALITY_TOKENS}", "recipe.batch={final=4}",
            "checkpoint.every=10M tokens", "engine.micro_batch_samples=4",
            f"validation.every={QUALITY_TOKENS}", "observe.console_every_steps=50",
            *(f"sync.{key}={value}" for key, value in section.items()),
        ]  # fmt: skip
        config = load(ROOT / "configs" / "demo.toml", overrides)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node=2", "-m", "pretrain", "configs/demo.toml"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, *overrides], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL
        )
        rows = read_metrics(config.run_directory / "metrics.jsonl")
        sent = sum(row.get("sync_bytes", 0) for row in rows)
        loss = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
        found.append({"method": method, "loss": loss, "bytes": sent, "steps": rows[-1]["step"]})
        print(json.dumps(found[-1]), flush=True)
        (RESULTS / "quality.json").write_text(json.dumps(found, indent=1))


# --- report ---------------------------------------------------------------------------------------


def report() -> None:
    """Print the table and draw the two plots."""
    speeds = json.loads((RESULTS / "speed.json").read_text())
    losses = {row["method"]: row for row in json.loads((RESULTS / "quality.json").read_text())}
    rows = _rows(speeds)
    plain = rows["allreduce"]["bytes"]
    links = [link.name for link in LINKS]
    print("| method | sent a step | fewer | " + " | ".join(f"s, {name}" for name in links)
          + " | loss |\n|" + "---|" * (len(links) + 4))  # fmt: skip
    for method, row in rows.items():
        times = " | ".join(f"{row['seconds'][link]:.2f}" for link in links)
        loss = f"{losses[method]['loss']:.3f}" if method in losses else ""
        print(f"| `{method}` | {row['bytes'] / 1e6:.4g} MB | {plain / row['bytes']:.3g}x | {times} "
              f"| {loss} |")  # fmt: skip
    for link in links:
        ratio = rows["allreduce"]["seconds"][link] / rows["powersgd:4"]["seconds"][link]
        print(f"all-reduce takes {ratio:.2f} times the step of powersgd:4 on {link}")
    _draw(rows, losses)
    print(f"-> {FIGURE.relative_to(ROOT)}")


def _rows(speeds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bytes a step and seconds a step by link, for each method."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in speeds:
        sync = entry["sync_seconds"]
        if not entry["method"].startswith("diloco"):
            row = rows.setdefault(entry["method"], {"bytes": entry["bytes"], "seconds": {}})
            row["seconds"][entry["link"]] = entry["step_seconds"]
            continue
        tail = entry["method"].removeprefix("diloco:1")
        for steps in STEPS_BETWEEN if not tail else STEPS_BETWEEN[1:]:
            row = rows.setdefault(
                f"diloco:{steps}{tail}", {"bytes": entry["bytes"] / steps, "seconds": {}}
            )
            row["seconds"][entry["link"]] = entry["step_seconds"] - sync + sync / steps
    return rows


def _draw(rows: dict[str, dict[str, Any]], losses: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colours = {m: f"C{n % 10}" for n, m in enumerate(dict.fromkeys([*rows, *losses]))}
    markers = dict(zip(colours, "osDv^<>Pp*hX", strict=False))
    for method, row in losses.items():
        left.scatter(row["bytes"] / 1e6, row["loss"], color=colours[method], s=60,
                     marker=markers[method], label=method, zorder=3)  # fmt: skip
    left.set(xscale="log", xlabel="MB that a rank sent in the run", ylabel="validation loss, nats",
             title=f"Loss against bytes (demo model, two replicas, {QUALITY_TOKENS})")  # fmt: skip
    names = ["unlimited", "1 Gbit/s", "100 Mbit/s"]
    for method, row in rows.items():
        right.plot(range(3), [row["seconds"][n] for n in names], color=colours[method],
                   marker=markers[method], label=method)  # fmt: skip
    right.set(yscale="log", ylabel="seconds a step",
              title="Time against bandwidth (98M parameters, two hosts)")  # fmt: skip
    right.set_xticks(range(3), names)
    seconds = [3, 5, 10, 20, 40]
    right.set_yticks(seconds, [str(number) for number in seconds])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    handles, labels = [], []
    for axes in (left, right):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Run what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["speed", "quality", "report", "worker"])
    parser.add_argument("talk", nargs="?", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "worker":
        worker(options.talk)
    else:
        {"speed": speed, "quality": quality, "report": report}[options.what]()


if __name__ == "__main__":
    main()
