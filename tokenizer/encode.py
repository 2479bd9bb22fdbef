"""Text -> a shard of token ids and its manifest, on all cores; killed anywhere, it goes on there.

One process reads, decides what is dropped, and writes in order; others only turn chunks of text
into ids. So the result depends on neither their number nor on interruptions.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain.data.shard_writer import Position, ShardWriter, publish, remove_partial_files
from pretrain.errors import DataError
from tokenizer import manifest as manifests
from tokenizer.documents import Input, find_inputs, read
from tokenizer.duplicates import Seen, find_seen, lines_of, without_spaces
from tokenizer.folder import Loaded, load
from tokenizer.workers import Workers

DEDUPLICATIONS = ("lines", "documents")
_CHUNK_CHARACTERS = 2**18  # text encoded in one task, but for a single longer document
_CHUNK_DOCUMENTS = 2**12
_COMMIT_SECONDS = 1.0  # work lost by a kill, at most
_BAD_SHOWN = 10


@dataclass
class _Progress:
    """How far the inputs have been used; all that is needed to go on, and all counts."""

    source: int = 0  # inputs before this one are done
    documents_of_source: int = 0  # read from it, bad ones included
    documents: int = 0  # read from all, bad ones not included
    lines: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    bad_documents: int = 0
    duplicate_lines: int = 0
    duplicate_documents: int = 0
    bad_examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """What is to be encoded, and how."""

    inputs: list[Input]
    tokenizer_dir: Path
    loaded: Loaded
    prefix: Path
    field: str
    skip_bad: bool
    dedup: tuple[str, ...]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the result; made once, since there may be a million inputs."""
        inputs = json.dumps(self.inputs).encode()
        return {
            "inputs": hashlib.sha256(inputs).hexdigest(),
            "tokenizer_sha256": self.loaded.fingerprint,
            "field": self.field,
            "deduplicated": list(self.dedup),
        }

    @property
    def state_file(self) -> Path:
        return Path(f"{self.prefix}.encoding.json")

    @property
    def dedup_folder(self) -> Path:
        return Path(f"{self.prefix}.dedup")


class _InputLog:
    """SHA-256 and documents of each input that is done: a line each, in a file that only grows."""

    def __init__(self, job: _Job, done: int) -> None:
        """Go on after `done` inputs; lines of later ones were not committed."""
        self._path = Path(f"{job.prefix}.inputs.partial")
        self._file = self._path.open("r+b" if done else "wb")
        for _ in range(done):
            self._file.readline()
        self._file.truncate()

    def add(self, sha256: str | None, documents: int) -> None:
        self._file.write(json.dumps([sha256, documents]).encode() + b"\n")

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def rows(self) -> list[tuple[str | None, int]]:
        self.commit()
        return [tuple(json.loads(line)) for line in self._path.read_text("utf-8").splitlines()]


def encode(
    inputs: Sequence[str | Path],
    tokenizer_dir: Path,
    prefix: Path,
    field: str = "text",
    *,
    on_error: str = "stop",
    dedup: Sequence[str] = (),
    workers: int | None = None,
    restart: bool = False,
) -> dict[str, Any]:
    """Encode `inputs` to PREFIX.bin, PREFIX.idx and PREFIX.json; returns the manifest.

    Each document ends with the tokenizer's end-of-text token (`</s>`); empty ones are counted and
    left out. A special token spelled out in a text is encoded as the characters it is, so text
    cannot fake the end of a document. `on_error`: "stop" at what is no document, or "skip" and
    count it. `dedup`: any of "lines" and "documents" (see `duplicates`). `workers`: processes
    (default: one a core). An interrupted call goes on; one that is done says so by returning.
    `restart` discards what is there instead.

    Progress goes to stderr. Raises DataError for inputs that cannot be read (see `documents`), a
    folder without tokenizer, a full disk, and an output that was begun from something else.
    """
    prefix = Path(prefix)
    job = _Job(
        find_inputs(inputs),
        Path(tokenizer_dir),
        load(tokenizer_dir),
        prefix,
        field,
        on_error == "skip",
        tuple(name for name in DEDUPLICATIONS if name in dedup),
    )
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with _lock(prefix):
            if restart:
                _forget(job)
            state = _state(job)
            if (done := _already_done(job, state, restart)) is not None:
                return done
            manifest = state.get("manifest") if state else None
            if manifest is None:
                manifest = _encode_rest(job, state, workers or len(os.sched_getaffinity(0)))
            manifests.path_of(prefix).unlink(missing_ok=True)
            publish(prefix)
            manifests.write(prefix, manifest)
            _forget(job)
    except OSError as error:
        raise DataError(
            f"{prefix}: cannot be written: {error.strerror}\n      rule: the shard's folder is "
            "writable and has room\n      cure: free space there, or choose another place"
        ) from error
    return manifest


def _encode_rest(job: _Job, state: dict[str, Any] | None, workers: int) -> dict[str, Any]:
    """From the last commit to a sealed shard."""
    start, position = _Progress(), None
    if state:
        start = _Progress(**state["progress"])
        position = Position(*state["shard"])
    seen, log = _find_duplicates(job), _InputLog(job, start.source)
    done_bytes = sum(source.bytes for source in job.inputs[: start.source])
    with (
        ShardWriter(job.prefix, job.loaded.vocab_size, keep=True, resume=position) as writer,
        Workers(workers, job.tokenizer_dir) as pool,
        _bar(job, "encoding", done_bytes) as bar,
    ):
        last, committed = start, time.monotonic()
        for ids, lengths, after in pool.in_order(_chunks(job, seen, start, bar, log)):
            writer.extend(ids, lengths)
            last = after
            if time.monotonic() - committed > _COMMIT_SECONDS:
                _commit(job, writer, log, after)
                committed = time.monotonic()
        writer.seal()
        manifest = _manifest(job, writer, log, last)
        _commit(job, writer, log, last, manifest)
    return manifest


def _chunks(
    job: _Job, seen: dict[str, Seen], start: _Progress, bar: "tqdm[Any]", log: _InputLog
) -> Iterator[tuple[list[str], _Progress]]:
    now, texts, characters = replace(start), [], 0
    for document in _documents(job, now, bar, log):
        text = _deduplicated(document, seen, now)
        now.documents += 1
        if not text:
            continue
        texts.append(text)
        now.text_bytes += len(text.encode())
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS or len(texts) >= _CHUNK_DOCUMENTS:
            yield texts, replace(now)
            texts, characters = [], 0
    yield texts, replace(now)


def _documents(
    job: _Job, now: _Progress, bar: "tqdm[Any]", log: _InputLog | None = None
) -> Iterator[str]:
    """The documents from `now` on, which is kept up to date."""
    while now.source < len(job.inputs):
        source = job.inputs[now.source]
        digest = hashlib.sha256()

        def used(content: bytes | memoryview, digest: Any = digest) -> None:
            digest.update(content)
            bar.update(len(content))

        for document in read(source, job.field, used, skip=now.documents_of_source):
            now.documents_of_source += 1
            if isinstance(document, str):
                yield document
                continue
            if not job.skip_bad:
                raise document
            now.bad_documents += 1
            if len(now.bad_examples) < _BAD_SHOWN:
                now.bad_examples = [*now.bad_examples, str(document).partition(";")[0]]
        if log is not None:
            log.add(digest.hexdigest() if source.kind != "hub" else None, now.documents_of_source)
        now.source, now.documents_of_source = now.source + 1, 0


def _deduplicated(document: str, seen: dict[str, Seen], now: _Progress) -> str:
    """The document without what was seen before; counts what is dropped, `""` if all of it."""
    if not document:
        now.empty_documents += 1
        return ""
    if "lines" in seen:
        lines, first = lines_of(document), now.lines
        now.lines += len(lines)
        kept = [line for k, line in enumerate(lines, first) if not seen["lines"][k]]
        now.duplicate_lines += len(lines) - len(kept)
        document = "\n".join(kept)
    if "documents" in seen and seen["documents"][now.documents]:
        # All that became empty are one another's duplicates, but they count as empty.
        if document:
            now.duplicate_documents += 1
        else:
            now.empty_documents += 1
        return ""
    now.empty_documents += not document
    return document


def _find_duplicates(job: _Job) -> dict[str, Seen]:
    """What to drop, by kind; found in one pass over the text each, unless found before."""
    seen: dict[str, Seen] = {}
    for kind in job.dedup:
        path = job.dedup_folder / kind
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with _bar(job, f"looking for repeated {kind}") as bar:
                find_seen(_items(job, kind, dict(seen), bar), path)
        seen[kind] = Seen(path)
    return seen


def _items(job: _Job, kind: str, seen: dict[str, Seen], bar: "tqdm[Any]") -> Iterator[str]:
    now = _Progress()
    for document in _documents(job, now, bar):
        if kind == "lines":
            yield from lines_of(document)
        else:
            yield without_spaces(_deduplicated(document, seen, now))
        now.documents += 1


# --- state and manifest --------------------------------------------------------------------------


def _state(job: _Job) -> dict[str, Any] | None:
    """What an interrupted call has left, which must have been begun from the same."""
    try:
        state = json.loads(job.state_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    before, now = state["settings"], job.settings
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise DataError(
            f"{job.prefix}: an encoding that was begun here differs in: {', '.join(changed)}\n"
            "      rule: an interrupted encoding goes on from the very files and settings it was "
            "begun with\n      cure: repeat the first command, choose another output, or begin "
            "anew with --restart"
        )
    return state


def _commit(
    job: _Job,
    writer: ShardWriter,
    log: _InputLog,
    progress: _Progress,
    manifest: dict[str, Any] | None = None,
) -> None:
    position = writer.commit()
    log.commit()
    state = {"settings": job.settings, "progress": asdict(progress), "shard": list(position)}
    manifests.write_aside(job.state_file, json.dumps(state | {"manifest": manifest}))


def _already_done(job: _Job, state: dict[str, Any] | None, restart: bool) -> dict[str, Any] | None:
    """The manifest of the same encoding, done; DataError if something else is there."""
    if state or restart or not Path(f"{job.prefix}.bin").exists():
        return None
    found = manifests.read(job.prefix)
    paths = [(source.name, source.bytes) for source in job.inputs]
    settings = job.settings
    if (
        found is not None
        and [(entry["path"], entry["bytes"]) for entry in found["inputs"]] == paths
        and all(found.get(key) == settings[key] for key in settings if key != "inputs")
    ):
        return found
    raise DataError(
        f"{job.prefix}: a shard is there, encoded from something else\n      rule: a finished "
        "shard is not overwritten by chance\n      cure: choose another output, or replace it "
        "with --restart"
    )


def _manifest(job: _Job, writer: ShardWriter, log: _InputLog, counts: _Progress) -> dict[str, Any]:
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": counts.text_bytes,
        "empty_documents": counts.empty_documents,
        "bad_documents": counts.bad_documents,
        "bad_examples": counts.bad_examples,
        "duplicate_documents": counts.duplicate_documents,
        "duplicate_lines": counts.duplicate_lines,
        "deduplicated": list(job.dedup),
        "field": job.field,
        "vocab_size": job.loaded.vocab_size,
        "end_of_text": job.loaded.end_of_text,
        "tokenizer": os.path.abspath(job.tokenizer_dir),
        "tokenizer_sha256": job.loaded.fingerprint,
        "inputs": [
            {"path": source.name, "bytes": source.bytes, "sha256": sha256, "documents": documents}
            for source, (sha256, documents) in zip(job.inputs, log.rows(), strict=True)
        ],
        "files": manifests.digests_of_partial(job.prefix),
        "versions": manifests.versions(),
    }


def _forget(job: _Job) -> None:
    """Remove what only an interrupted encoding needs."""
    remove_partial_files(job.prefix)
    Path(f"{job.prefix}.inputs.partial").unlink(missing_ok=True)
    job.state_file.unlink(missing_ok=True)
    shutil.rmtree(job.dedup_folder, ignore_errors=True)


def _bar(job: _Job, what: str, done_bytes: int = 0) -> "tqdm[Any]":
    total = sum(source.bytes for source in job.inputs) or None
    return tqdm(
        total=total,
        initial=done_bytes,
        unit="B",
        unit_scale=True,
        desc=f"{job.prefix.name}: {what}",
    )


@contextlib.contextmanager
def _lock(prefix: Path) -> Iterator[None]:
    """Only one process writes a shard."""
    path = Path(f"{prefix}.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{prefix}: another process is encoding to it; wait for it, or choose another "
                "output"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
