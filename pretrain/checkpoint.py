"""Checkpoints: torch.distributed.checkpoint over fragments, committed by one atomic rename.

A checkpoint is a folder `step-N` that holds one file a rank with its fragments (1-D slices of each
parameter's flattened master weight and optimizer states), and `state.json`: the clock, everything
else that changes a future number, and size and SHA-256 of every file. It is written as
`.partial-step-N` and renamed when complete, so whatever happens, the last good one remains.
Because slices carry their place, any number of ranks and any ZeRO stage can read it.

Random numbers need no saving: they are drawn from (seed, step, rank) anew at each step.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pretrain.checkpoint_slices import to_load, to_save
from pretrain.config import Checkpoint as CheckpointConfig
from pretrain.engine.world import World
from pretrain.engine.zero import ZeroEngine
from pretrain.errors import CheckpointError
from pretrain.recipe import Clock

_FORMAT = 1
_LATEST = "latest.json"


class Stateful(Protocol):
    """A part of the run whose memory changes future numbers or curves."""

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        ...


class Checkpoints:
    """The checkpoints of one run, in `directory`.

    `facts` says what the run is about (model, data) until a clock: a checkpoint with others is
    refused.
    `run_config` is kept for the reader.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        world: World,
        facts: Callable[[Clock], dict[str, Any]],
        run_config: dict[str, Any],
    ) -> None:
        self.directory, self._config, self._world = directory, config, world
        self._facts, self._run_config = facts, run_config

    def due(self, before: Clock, after: Clock) -> bool:
        """Whether one is to be saved after the step from `before` to `after`."""
        return self._config.every.crossed(before, after)

    def newest(self) -> Path | None:
        """The newest complete checkpoint; None where none was ever committed.

        Raises CheckpointError where one was committed and is gone.
        """
        found = _complete(self.directory)
        latest = self.directory / _LATEST
        if not found and latest.exists():
            step = json.loads(latest.read_text())["step"]
            raise CheckpointError(
                f"{self.directory}: step {step} was saved here, but no checkpoint is left.\n"
                "  cure: restore the folder, or begin anew with start=fresh"
            )
        return found[-1] if found else None

    def save(self, clock: Clock, engine: ZeroEngine, parts: dict[str, Stateful]) -> Path:
        """Write a checkpoint and commit it; collective. Replicas are compared first."""
        engine.sync.check(clock)
        target = self.directory / f"step-{clock.step:07d}"
        partial = self.directory / f".partial-{target.name}"
        if self._world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._world.barrier()
        try:
            dcp.save(to_save(engine), checkpoint_id=partial)
            files = self._hash_files(partial)
            if self._world.is_first:
                permanent = self._permanent(clock)
                state = {
                    "format": _FORMAT,
                    "clock": asdict(clock),
                    "optimizer_scalars": engine.optimizer_scalars(),
                    "parts": {name: part.state() for name, part in parts.items()},
                    "facts": self._facts(clock),
                    "config": self._run_config,
                    "files": files,
                    "permanent": permanent,
                    "saved_at": time.time(),
                }
                _write_synced(partial / "state.json", json.dumps(state, indent=1))
                _commit(partial, target)
                self._retire()
        except (CheckpointException, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            cause = _root_cause(error)
            raise CheckpointError(
                f"{target}: could not be written: {cause}\n"
                f"  cure: free space or fix the permissions of {self.directory}; the run goes on "
                "from the newest complete checkpoint"
            ) from error
        self._world.barrier()
        return target

    def load(self, path: Path, engine: ZeroEngine, parts: dict[str, Stateful]) -> Clock:
        """Verify `path`, then take all of it up; collective."""
        state = read_state(path)
        _compare_facts(path, state["facts"], self._facts(Clock(**state["clock"])))
        self._verify(path, state["files"])
        entries, finish = to_load(path, engine)
        dcp.load(entries, checkpoint_id=path)
        finish()
        engine.loaded(state["optimizer_scalars"])
        for name, part in parts.items():
            if name in state["parts"]:
                part.load_state(state["parts"][name])
        self._world.barrier()
        return Clock(**state["clock"])

    def _hash_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of the files, each hashed by one rank."""
        self._world.barrier()
        names = sorted(os.listdir(folder))
        mine = {
            name: _digest(folder / name) for name in names[self._world.rank :: self._world.size]
        }
        gathered = self._world.gather(mine)
        return dict(sorted(item for part in gathered for item in part.items()))

    def _verify(self, path: Path, files: dict[str, dict[str, Any]]) -> None:
        """Compare every file with its recorded size and checksum, each on one rank."""
        found = []
        for name in sorted(files)[self._world.rank :: self._world.size]:
            try:
                actual = _digest(path / name)
            except OSError as error:
                found.append(f"{name}: {error.strerror}")
                continue
            if actual != files[name]:
                found.append(f"{name}: {actual['bytes']} bytes, {files[name]['bytes']} were written"
                             if actual["bytes"] != files[name]["bytes"]
                             else f"{name}: its checksum differs from the one written")  # fmt: skip
        gathered = self._world.gather(found)
        if damage := [line for part in gathered for line in part]:
            raise CheckpointError(_damaged(path, "; ".join(damage)))

    def _permanent(self, clock: Clock) -> bool:
        """Whether this is the first checkpoint after a multiple of `keep_every`."""
        if self._config.keep_every is None:
            return False
        found = _complete(self.directory)
        before = Clock(**read_state(found[-1])["clock"]) if found else Clock()
        return self._config.keep_every.crossed(before, clock)

    def _retire(self) -> None:
        """Remove checkpoints beyond the newest `keep`, except permanent ones; and left-overs."""
        for left_over in self.directory.glob(".partial-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        for path in _complete(self.directory)[: -self._config.keep]:
            if not read_state(path)["permanent"]:
                # Renamed first, so that a crash while deleting leaves no half checkpoint behind.
                doomed = path.with_name(f".partial-{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def newest_checkpoint(run_directory: Path) -> Path:
    """The newest complete checkpoint of a run; CheckpointError where there is none."""
    found = _complete(run_directory / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{run_directory}: no checkpoint here\n"
            "  cure: name the folder of a run that has saved one"
        )
    return found[-1]


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, f"state.json: {error}")) from None
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: format {state.get('format')}; this version reads format {_FORMAT}\n"
            "  cure: use the version of anthesis that wrote it"
        )
    return state


def read_masters(path: Path) -> dict[str, Tensor]:
    """The whole fp32 master weights of a checkpoint by parameter name, flattened; one process."""
    for name, recorded in read_state(path)["files"].items():
        if not (path / name).exists() or (path / name).stat().st_size != recorded["bytes"]:
            raise CheckpointError(_damaged(path, f"{name} is missing or has another size"))
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    masters = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith("master/")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load(masters, checkpoint_id=path, no_dist=True)
    return {key.removeprefix("master/"): value for key, value in masters.items()}


def _complete(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def _commit(partial: Path, target: Path) -> None:
    """Make a written checkpoint durable and visible."""
    _sync_folder(partial)
    if target.exists():  # the same step, saved by an earlier attempt at it
        doomed = target.with_name(f".partial-old-{target.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        target.rename(doomed)
    partial.rename(target)
    _sync_folder(target.parent)
    latest = target.parent / _LATEST
    _write_synced(latest.with_suffix(".new"), json.dumps({"step": int(target.name[5:])}))
    latest.with_suffix(".new").rename(latest)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
        return "; ".join(sorted({f"{type(c).__name__}: {c}" for c in causes}))
    return str(error)


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path}: damaged: {what}\n"
        f"  cure: move {path} away to go on from the checkpoint before it, or begin anew with "
        "start=fresh"
    )


def _compare_facts(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint whose model or data are not those of this run."""
    lines = []
    for topic in sorted(saved.keys() | now.keys()):
        before, after = saved.get(topic), now.get(topic)
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted(before.keys() | after.keys())
            lines += [f"{topic}.{key}: {before.get(key)} then, {after.get(key)} now"
                      for key in keys if before.get(key) != after.get(key)]  # fmt: skip
        elif before != after:
            lines.append(f"{topic}: {before} then, {after} now")
    if lines:
        raise CheckpointError(
            f"{path} belongs to another model or other data:\n    " + "\n    ".join(lines) + "\n"
            "  rule: a run goes on with the model, corpus, mixture and seed it began with\n"
            "  cure: restore them, give the run another name, or begin anew with start=fresh"
        )
