"""The worker: `python -m pretrain CONFIG [key=value ...]`, the same under every launcher.

This is the only place that wires things together.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tomli_w
import torch

from pretrain.checkpoint import Checkpoints
from pretrain.config import Config
from pretrain.config_file import differences, load, read_toml
from pretrain.config_optim import OwnOptimizer
from pretrain.config_sync import OuterSection
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Loader
from pretrain.engine.deepspeed_setup import sharded_construction
from pretrain.engine.placement import placement
from pretrain.engine.world import World, join_world, rows_of_rank, split_world
from pretrain.engine.zero import ZeroEngine
from pretrain.errors import CheckpointError, UserError, exit_code
from pretrain.foreign import check_foreign, of_environment
from pretrain.guard import Guard
from pretrain.health.facts import host_facts
from pretrain.health.findings import start_findings
from pretrain.loop import Run, Validator, train
from pretrain.memory import checkpoint_bytes
from pretrain.model import build_model, model_shape
from pretrain.model.precision import matmul_dtype
from pretrain.observe.observers import Observers
from pretrain.observe.throughput import flops_per_token, measure_peak_flops
from pretrain.optim.own import check_own
from pretrain.quantities import human_count
from pretrain.rank_table import RankRow, batch_arithmetic, rank_table
from pretrain.recipe import Clock
from pretrain.stopping import STOPPED, StopAsked, asked_by
from pretrain.sync.registry import build_sync, members_of

_FIRST_LOOK_SAMPLES = 16


def main(arguments: list[str] | None = None) -> int:
    """Run the worker; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=__doc__)
    parser.add_argument("config", help="a run config in TOML")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    # The deepspeed launcher passes it; LOCAL_RANK of the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    # The same arguments as one word, where a launcher would not quote them: base64 of a JSON list.
    parser.add_argument("--encoded", help=argparse.SUPPRESS)
    options = parser.parse_args(_decoded(sys.argv[1:] if arguments is None else arguments))
    # torch renames collectives that DeepSpeed calls; nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    def work() -> int:
        config = load(options.config, options.overrides)
        check_foreign(of_environment(), config, ranks=placement().size)
        try:
            with join_world(config.timeout.value) as world:
                clock = train_run(config, world)
        except StopAsked:
            return STOPPED
        if config.build_recipe().done(clock):
            return 0
        if world.is_first:
            print(
                f"stopped after step {clock.step} by {asked_by() or 'another rank'}; saved: the "
                "same command goes on from here",
                flush=True,
            )
        return STOPPED

    return exit_code(work, "interrupted: the same command goes on from the newest checkpoint")


def _decoded(arguments: list[str]) -> list[str]:
    prefix = "--encoded="
    words = [word for word in arguments if word.startswith(prefix)]
    if not words:
        return arguments
    others = [word for word in arguments if not word.startswith(prefix)]
    return others + json.loads(base64.urlsafe_b64decode(words[0].removeprefix(prefix)))


def train_run(config: Config, world: World) -> Clock:
    """Train a run to its end, or until a signal asks to make way, from its newest checkpoint where
    it has one; where it ended."""
    recipe = config.build_recipe()
    if isinstance(config.optimizer, OwnOptimizer):
        check_own(config.optimizer)
    # Replicas that meet seldom talk over slow links, where gloo's patience is what is wanted.
    world = split_world(world, config.mesh.shard_ranks, not config.sync.facts.every_step)
    ranks = _show_ranks(config, world)
    _look_at_hosts(config, world)
    members = members_of(config, world)
    corpus, held_out = open_data(config, world)
    run_directory = config.run_directory
    checkpoints = checkpoints_of(config, corpus, world)
    if world.is_first:
        _prepare_directory(config)
        (config.run_directory / "ranks.txt").write_text(rank_table(ranks, full=True) + "\n")
    world.barrier()
    newest = checkpoints.newest()
    if newest is None and config.start == "resume":
        raise UserError(
            f"{run_directory}: start=resume, but there is no checkpoint here\n"
            "  cure: check name and directory, or begin anew with start=fresh"
        )
    engine = build_engine(config, world)
    parameters = engine.parameter_count()
    if world.is_first:
        _check_space(config, world.replicas.size, resuming=newest is not None)
    observers = Observers(
        config.observe,
        recipe,
        run_directory,
        first=world.is_first,
        leads=lambda: engine.sync.leads,
        flops_per_token=flops_per_token(config.model, parameters, config.data.sequence_length),
        peak_flops=_peak_flops(config, world),
    )
    run = Run(
        seed=config.seed,
        recipe=recipe,
        engine=engine,
        loader=Loader(corpus, recipe, lambda batch: rows_of_rank(batch, engine.sync.ranks)),
        guard=Guard(config.guard),
        observers=observers,
        checkpoints=checkpoints,
        validate=Validator(held_out, config.validation),
    )
    engine.sync = build_sync(config, engine, members, run.parts)
    clock, newest = _load_newest(checkpoints, run)
    if world.is_first:
        _announce(config, world, parameters, corpus, clock, newest)
    if recipe.done(clock):
        return clock
    try:
        clock = engine.sync.begin(clock)
        if world.is_first and engine.sync.leads:
            _save_config(config)
        observers.open(clock)
        clock = train(run, clock)
    finally:
        observers.close()
        engine.sync.close()
    if world.is_first and recipe.done(clock):
        print(f"done: step {clock.step}, {human_count(clock.tokens)} tokens -> {run_directory}")
    return clock


def _show_ranks(config: Config, world: World) -> list[RankRow]:
    """Show all ranks, and how the batch is dealt to them; the ranks."""
    device = str(world.device)
    if world.device.type == "cuda":
        device += f" {torch.cuda.get_device_name(world.device)}"
    row = RankRow(
        socket.gethostname(),
        world.rank,
        int(os.environ.get("LOCAL_RANK", 0)),
        device,
        world.replicas.rank,
        world.shard.rank if world.replicas.size > 1 else 0,
    )
    rows = world.gather(row)
    if world.is_first:
        print(rank_table(rows))
        print(batch_arithmetic(config, config.build_recipe(), world.size), flush=True)
    return rows


def _look_at_hosts(config: Config, world: World) -> None:
    """The doctor's short form, on the hosts of this launch; raises UserError on all ranks where
    something would spoil the run."""
    first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    world.barrier()  # clocks are compared: all are asked at the same moment
    facts = world.gather(host_facts(config) if first_of_host else None)
    found = start_findings([one for one in facts if one], config, world.size)
    if world.is_first:
        for finding in found:
            if finding.level == "warning":
                print(f"warning: {finding}", flush=True)
    if errors := [str(finding) for finding in found if finding.level == "error"]:
        raise UserError("\n".join(errors))


def _load_newest(checkpoints: Checkpoints, run: Run) -> tuple[Clock, Path | None]:
    """Take up the newest checkpoint, if there is one: where it was saved, and which it is."""
    newest = checkpoints.newest()
    while newest is not None:
        try:
            return checkpoints.load(newest, run.engine, run.parts), newest
        except CheckpointError:
            # A run that goes on meanwhile, on other replicas, retires its older checkpoints.
            if newest == (newest := checkpoints.newest()):
                raise
    return Clock(), None


def checkpoints_of(config: Config, corpus: Corpus, world: World) -> Checkpoints:
    """The checkpoints of a run; those of another model or other data will be refused."""
    # Initialisation is over once there is a checkpoint, and dropout may change.
    model_facts = config.model.model_dump(mode="json", exclude={"init_std", "dropout"})

    def facts(clock: Clock) -> dict[str, Any]:
        return {"model": model_facts, "data": corpus.fingerprint(clock.samples)}

    directory = config.run_directory / "checkpoints"
    return Checkpoints(directory, config.checkpoint, world, facts, config.resolved())


def build_engine(config: Config, world: World) -> ZeroEngine:
    """The engine with the initial weights of the run; collective."""
    torch.manual_seed(config.seed)
    # transformers' own initialisation does not reach weights that are already sharded.
    own = config.model.family == "bloom"
    with sharded_construction(config.engine, world) if own else nullcontext():
        model = build_model(
            config.model, config.engine.activation_checkpointing, config.attention_end
        )
    return ZeroEngine(model, config.optimizer, config.engine, world)


def open_data(config: Config, world: World) -> tuple[Corpus, Corpus | None]:
    """The training corpus and the held-out one, if any."""
    data, vocab = config.data, config.model.vocab_size
    if config.data.tokenizer is not None:
        from pretrain.model.hf import load_tokenizer  # transformers takes seconds to import

        load_tokenizer(config.data.tokenizer, vocab)
    if not world.is_first:
        world.barrier()  # the index of order = "megatron" is built by one and read by all
    corpus = Corpus(data, config.seed, vocab, "train", config.build_recipe().train_samples)
    if world.is_first:
        world.barrier()
    held_out = Corpus(data, config.seed, vocab, "validation") if data.validation_fraction else None
    corpus.batch(0, _FIRST_LOOK_SAMPLES)  # tokens outside the vocabulary show before step 1
    return corpus, held_out


def _prepare_directory(config: Config) -> None:
    """Make the run's folder; move an earlier run aside where asked. What launches the run has a
    folder there, which stays."""
    folder, launch = config.run_directory, config.run_directory / "launch"
    # A job that was put back in the queue is the same start again, and so are ranks that torchrun
    # has started again.
    names = ("SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RESTART_COUNT")
    again = any(os.environ.get(name, "0") not in ("0", "") for name in names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.start == "fresh" and not again and {*folder.iterdir()} - {launch}:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
                number += 1
            folder.rename(aside)
            folder.mkdir()
            if (aside / "launch").exists():
                (aside / "launch").rename(launch)
            print(f"start=fresh: the earlier run now lies in {aside}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}\n"
            "  cure: free space, fix the permissions, or set directory=... to another place"
        ) from None


def _save_config(config: Config) -> None:
    """Save the resolved config with the run, saying what differs from the last start."""
    saved, resolved = config.run_directory / "config.toml", config.resolved()
    if saved.exists() and (changes := differences(read_toml(saved), resolved)):
        print("  changed since the run was last started:\n    " + "\n    ".join(changes))
    saved.with_suffix(".new").write_text(tomli_w.dumps(resolved), encoding="utf-8")
    saved.with_suffix(".new").rename(saved)


def _check_space(config: Config, replicas: int, resuming: bool) -> None:
    """Refuse to begin where two checkpoints (one more, if there is one) do not fit."""
    size = checkpoint_bytes(model_shape(config.model), config.optimizer, config.sync, replicas)
    needed = size if resuming else 2 * size
    free = shutil.disk_usage(config.run_directory).free
    if free < needed:
        raise UserError(
            f"{config.run_directory}: {human_count(free)}B free\n"
            f"  rule: two checkpoints of {human_count(size)}B must fit, since the old one stays "
            "until the new one is whole\n"
            "  cure: free space, or set directory=... to a larger disk"
        )


def _peak_flops(config: Config, world: World) -> float:
    """Matrix-product speed of all devices together, given or measured."""
    if config.observe.peak_tflops is not None:
        return config.observe.peak_tflops * 1e12 * world.size
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    dtype = matmul_dtype(torch.empty(0, dtype=dtype, device=world.device))
    measured = measure_peak_flops(world.device, dtype)
    return world.sum(torch.tensor(measured, device=world.device, dtype=torch.float64)).item()


def _replicas_text(config: Config, world: World) -> str:
    """How many replicas there are, and what keeps them together."""
    if isinstance(config.sync, OuterSection) and config.sync.coordinator:
        return f"\n  one replica of those at {config.sync.coordinator}, {config.sync.method}"
    if world.replicas.size == 1:
        return ""
    ranks = world.shard.size
    return f"\n  {world.replicas.size} replicas of {ranks} rank(s), {config.sync.method}"


def _announce(
    config: Config,
    world: World,
    parameters: int,
    corpus: Corpus,
    clock: Clock,
    newest: Path | None,
) -> None:
    """Say what is about to run."""
    recipe, engine = config.build_recipe(), config.engine
    first, final = recipe.batch(0), recipe.batch.final
    ramp = str(final) if first == final else f"{first} -> {final}"
    print(
        f"{config.name}: {human_count(parameters)} parameters, {world.size} rank(s) on "
        f"{world.device.type}, ZeRO {engine.zero_stage}, {engine.precision}"
        f"{_replicas_text(config, world)}\n"
        f"  {recipe.total_steps} steps, {human_count(recipe.total_samples)} samples of "
        f"{recipe.sequence_length} tokens, batch {ramp}, peak rate "
        f"{config.recipe.learning_rate.peak:g}"
    )
    for row in corpus.summary(recipe.total_samples):
        over = row.epochs > config.data.mixture.epoch_limit
        print(
            f"  source {row.source}: {human_count(row.available_tokens)} tokens, "
            f"{row.share:.1%} of the samples, {row.epochs:.2f} epochs"
            + (f"  (over epoch_limit = {config.data.mixture.epoch_limit:g}!)" if over else "")
        )
    if newest is None:
        print(f"  starts from scratch -> {config.run_directory}", flush=True)
    elif recipe.done(clock):
        print(
            f"already done: step {clock.step} in {newest}\n"
            "  to begin anew: start=fresh; to train longer: raise recipe.train",
            flush=True,
        )
    else:
        print(f"  goes on after step {clock.step} ({newest.name})", flush=True)
