"""PREFIX.json: where a shard comes from, what is in it, and what its files must hash to."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pretrain.data.shard_writer import partial_files
from pretrain.errors import DataError

BLOCK_BYTES = 2**26  # hashed by itself, so that one file keeps all cores busy
_SUFFIXES = ("bin", "idx")
T = TypeVar("T")


def path_of(prefix: Path | str) -> Path:
    """Where the manifest of a shard lies."""
    return Path(f"{prefix}.json")


def read(prefix: Path | str) -> dict[str, Any] | None:
    """The manifest of a shard; None if it has none, as those that Megatron wrote."""
    path = path_of(prefix)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); it is the JSON that `anthesis corpus encode` "
            "wrote; copy it again, or remove it to do without"
        ) from None


def write(prefix: Path | str, manifest: dict[str, Any]) -> None:
    """Write the manifest of a shard, whole or not at all."""
    write_aside(path_of(prefix), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_aside(path: Path, text: str) -> None:
    """Write a file under another name first, so that it is never seen half done."""
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def versions() -> dict[str, str]:
    """Versions of what the ids depend on."""
    names = ("anthesis", "tokenizers", "datasets", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def digests_of_partial(prefix: Path) -> dict[str, dict[str, Any]]:
    """For bin and idx, while they still have their partial names: bytes, and SHA-256 by block."""
    tokens, index, _ = partial_files(prefix)
    return {
        suffix: {
            "bytes": path.stat().st_size,
            "block_bytes": BLOCK_BYTES,
            "sha256_blocks": list(digests(path, BLOCK_BYTES)),
        }
        for suffix, path in zip(_SUFFIXES, (tokens, index), strict=True)
    }


def faults(
    prefix: Path | str,
    manifest: dict[str, Any],
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    """In what the files of a shard are not those that the manifest was written for."""
    for suffix in _SUFFIXES:
        path, promised = Path(f"{prefix}.{suffix}"), manifest["files"][suffix]
        size, block = path.stat().st_size, promised["block_bytes"]
        if size != promised["bytes"]:
            yield f"{path}: {size:,} bytes, but {promised['bytes']:,} were written"
            continue
        for number, digest in enumerate(digests(path, block, progress)):
            if digest != promised["sha256_blocks"][number]:
                end = min((number + 1) * block, size)
                yield (
                    f"{path}: bytes {number * block:,} to {end:,} are not those that were written "
                    "(SHA-256 differs)"
                )


def digests(
    path: Path, block_bytes: int, progress: Callable[[int], object] = lambda size: None
) -> Iterator[str]:
    """SHA-256 of each block of a file, on all cores."""

    def digest(begin: int) -> str:
        found, left = hashlib.sha256(), block_bytes
        with path.open("rb") as file:
            file.seek(begin)
            while left and (content := file.read(min(left, 2**20))):
                found.update(content)
                left -= len(content)
                progress(len(content))
        return found.hexdigest()

    yield from over_blocks(digest, path.stat().st_size, block_bytes)


def over_blocks(look: Callable[[int], T], size: int, block: int) -> Iterator[T]:
    """`look(begin)` of every block of `size`, in order, by a thread a core: for work that leaves
    Python's lock, as hashing, numpy and reading do."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(look, range(0, size, block))
