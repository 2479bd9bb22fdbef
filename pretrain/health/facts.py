"""What a run depends on and a host may have otherwise than its neighbours, as JSON.

Nothing here imports what it asks about, and no file is read in full but the tokenizer's, so it
takes a moment, whatever the size of the corpus. Compilers are not looked for: no run of this house
compiles anything while it runs (`pretrain.engine.deepspeed_setup` switches off the one part of
DeepSpeed that would).
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pretrain
from pretrain.config import Config, Source
from pretrain.data.shards import Shard, bin_and_idx
from pretrain.errors import DataError

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "numpy", "anthesis")
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
_END_BYTES = 4096  # of each end of a file
_YOUNG_SECONDS = 60  # a lock that someone may just have made
_GPU_SECONDS = 10  # nvidia-smi that has not answered until then hangs in its driver
_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "used_mib": "memory.used",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
}


def host_facts(
    config: Config, *, master: str | None = None, port: int | None = None
) -> dict[str, Any]:
    """All of this host, JSON-able. `began` and `ended` are its clock (seconds since 1970): ask all
    hosts at the same moment where clocks are to be compared. With `port` it is tried whether that
    can be bound, with `master` what that name means here. Raises nothing for what is wrong."""
    began = time.time()
    gpus = _ask_gpus()
    folder = _nearest(config.run_directory)
    facts = {
        "host": socket.gethostname(),
        "began": began,
        "versions": _versions(),
        "config": _config_hashes(config),
        **_data(config),
        "folder": _folder(folder, config),
        "shm": _space("/dev/shm"),
        "locks": list(_old_locks()),
        "port": None if port is None else _try_port(port),
        "names": {name: _addresses(name) for name in {master, socket.gethostname()} if name},
        "gpus": _answer(gpus),
    }
    return facts | {"ended": time.time()}


# --- software and config -------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    """Of what must be alike; None where a package is not there."""

    def version(*names: str) -> str | None:
        for name in names:
            with suppress(metadata.PackageNotFoundError):
                return metadata.version(name)
        return None

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "nccl": version(*_NCCL),
        # A checkout keeps its version while its code changes.
        "code": _hash_files(Path(pretrain.__path__[0]), "*.py"),
    }


def _config_hashes(config: Config) -> dict[str, str]:
    """A hash of each section as resolved, but for paths: data may lie elsewhere on each host."""
    tree = config.resolved()
    tree.pop("directory")
    for key in ("directory", "index_directory", "tokenizer"):
        tree["data"].pop(key, None)
    for source in tree["data"]["sources"]:
        source.pop("path")
    return {key: _hash(json.dumps(value, sort_keys=True).encode()) for key, value in tree.items()}


# --- data ----------------------------------------------------------------------------------------


def _data(config: Config) -> dict[str, Any]:
    """Fingerprints by source, of the tokenizer, and what cannot be read, by name."""
    sources, manifests, unreadable = {}, {}, {}
    with ThreadPoolExecutor(8) as pool:  # a few reads each, which a network makes slow
        for source, found in zip(used := _used(config), pool.map(_source, used), strict=True):
            if isinstance(found, str):
                unreadable[source.name] = found
            else:
                sources[source.name], manifest = found
                manifests |= {source.name: manifest} if manifest else {}
    tokenizer = None
    if folder := config.data.tokenizer:
        try:
            folder.stat()  # what is not there has no files, without an error
            tokenizer = _hash_files(folder)
        except OSError as error:
            unreadable["tokenizer"] = f"{error.filename}: {error.strerror}"
    return {
        "sources": sources,
        "manifests": manifests,
        "tokenizer": tokenizer,
        "unreadable": unreadable,
    }


def _used(config: Config) -> list[Source]:
    """Sources that the run opens (as `Corpus` does)."""
    data = config.data
    return [
        source
        for source in data.sources
        if data.order == "megatron"
        or source.weight > 0
        or any(stage.weights.get(source.name, 0) > 0 for stage in data.mixture.stages)
    ]


def _source(source: Source) -> tuple[str, str | None] | str:
    """Hashes of the sizes and ends of both files, and of the checksums in PREFIX.json if there are
    any; or what is wrong. Fewer reads than `Shard.fingerprint`, which there is no time for here."""
    try:
        Shard.open(source.path)  # a damaged index, or files that are no pair
        digest = hashlib.blake2b(digest_size=16)
        for path in bin_and_idx(source.path):
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(b"%d " % size + file.read(_END_BYTES))
                file.seek(max(size - _END_BYTES, 0))
                digest.update(file.read(_END_BYTES))
    except DataError as error:
        return " ".join(str(error).partition("\n      cure:")[0].split())
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    manifest = None
    with suppress(OSError, ValueError, LookupError, TypeError):
        files = json.loads(Path(f"{source.path}.json").read_bytes())["files"]
        manifest = _hash(json.dumps(files, sort_keys=True).encode())
    return digest.hexdigest(), manifest


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash_files(folder: Path, pattern: str = "*") -> str:
    """Hash of the names and contents of the files under a folder."""
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    lines = [f"{path.relative_to(folder)} {_hash(path.read_bytes())}" for path in files]
    return _hash("\n".join(lines).encode())


# --- disks ---------------------------------------------------------------------------------------


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _space(folder: Path | str) -> dict[str, int | None] | None:
    """Bytes in all and free, and free inodes (None where the file system does not count them)."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return {
        "bytes": found.f_blocks * found.f_frsize,
        "free": found.f_bavail * found.f_frsize,
        "inodes": found.f_favail if found.f_files else None,
    }


def _folder(folder: Path, config: Config) -> dict[str, Any]:
    """Where checkpoints go: its space, how many lie there already, and whether it works."""
    kept = list((config.run_directory / "checkpoints").glob("step-*"))
    return {
        "path": str(folder),
        "space": _space(folder),
        "checkpoints": 0 if config.start == "fresh" else len(kept),
        "problem": _write_problem(folder),
    }


def _write_problem(folder: Path) -> str | None:
    """Do what a checkpoint does, on a small scale; None where a file survives it."""
    path = folder / f".anthesis-{os.urandom(8).hex()}"
    new, content = path.with_suffix(".new"), os.urandom(_END_BYTES)
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        return None if path.read_bytes() == content else "a file reads otherwise than written"
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for left in (new, path):
            with suppress(OSError):
                left.unlink(missing_ok=True)


# --- locks ---------------------------------------------------------------------------------------


def _old_locks() -> Iterator[dict[str, Any]]:
    """Locks of torch's compiled extensions that are older than a minute.

    Who compiles has the lock open until it is done, so `held` says whether a process of this host
    does; `made` tells whether two hosts see the same file. Triton and numba need no such look: they
    lock nothing, or by the kernel, which lets go when a process dies.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))
    for path in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with suppress(OSError):  # it may go while we look
            found = path.stat()
            if time.time() - found.st_mtime > _YOUNG_SECONDS:
                yield {"path": str(path), "made": found.st_mtime_ns, "held": _is_open(found)}


def _is_open(file: os.stat_result) -> bool:
    """Whether a process that we may look at has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            other = link.stat()
            if (other.st_dev, other.st_ino) == (file.st_dev, file.st_ino):
                return True
    return False


# --- network and devices -------------------------------------------------------------------------


def _try_port(port: int) -> str:
    """ "free", or why the port cannot be bound."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return "free"


def _addresses(name: str) -> list[str]:
    """What a name means here; nothing where it means nothing."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(address[0]) for *_, address in found})


def _ask_gpus() -> subprocess.Popen[str] | None:
    """nvidia-smi on its way; it takes longer than all the rest."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = f"--query-gpu={','.join(_GPU_FIELDS.values())}"
    return subprocess.Popen(
        [program, query, "--format=csv,noheader,nounits"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _answer(asked: subprocess.Popen[str] | None) -> list[dict[str, Any]] | str | None:
    """A row a GPU; or why nvidia-smi gave none; None without nvidia-smi."""
    if asked is None:
        return None
    try:
        output, _ = asked.communicate(timeout=_GPU_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()
        return f"nvidia-smi has not answered within {_GPU_SECONDS} s"
    if asked.returncode:
        return (output.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    return [
        {
            key: int(cell) if cell.isdecimal() else cell
            for key, cell in zip(_GPU_FIELDS, row, strict=True)
        }
        for row in rows
        if len(row) == len(_GPU_FIELDS)  # others are warnings
    ]
