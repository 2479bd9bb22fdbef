"""Documents out of files and data sets, one at a time: JSONL, text, Parquet, Arrow, the hub.

Lines are read by ourselves, since an error must name its line and a position must be found again;
tables come through `datasets`, streaming.
"""

import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pretrain.errors import DataError

HUB = "hub:"
_TABLE_ROWS = 1000  # rows of a table in memory at once
_BUFFER_BYTES = 2**20
_PACKED_BYTES = 2**14  # unpacked at once; text shrinks no more than some tenfold


class Input(NamedTuple):
    """A file (its path), or a data set of the hub (hub:NAME[@REVISION][:CONFIG[:SPLIT]])."""

    name: str
    kind: Literal["lines", "text", "parquet", "arrow", "hub"]
    bytes: int  # on disk, packed as it is; 0 for the hub
    modified_ns: int


def find_inputs(patterns: Iterable[str | Path]) -> list[Input]:
    """The inputs that paths, globs and hub: names stand for; each glob's files in order of name.

    Raises DataError for what is not there, and for a file that stands there twice.
    """
    names: list[str] = []
    missing = []
    for pattern in map(str, patterns):
        found = [pattern] if pattern.startswith(HUB) or Path(pattern).is_file() else []
        found = found or sorted(p for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        names += found
        missing += [] if found else [pattern]
    if missing or not names:
        raise DataError(
            f"{', '.join(missing) or 'no input'}: not there; inputs are files, globs of files, or "
            "data sets hub:OWNER/NAME; check the paths"
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(
            f"{', '.join(twice)}: stands there twice; its documents would be read twice; name it "
            "once, or set apart the globs that meet"
        )
    return [_input(name) for name in names]


def _input(name: str) -> Input:
    if name.startswith(HUB):
        return Input(name, "hub", 0, 0)
    plain = name.removesuffix(".gz").removesuffix(".zst")
    kind = {".jsonl": "lines", ".parquet": "parquet", ".arrow": "arrow"}.get(
        Path(plain).suffix, "text"
    )
    stat = Path(name).stat()
    return Input(name, kind, stat.st_size, stat.st_mtime_ns)


def read_documents(
    patterns: Iterable[str | Path],
    field: str = "text",
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    """The documents of all inputs in order; see `read`. Raises the first DataError."""
    for source in find_inputs(patterns):
        for document in read(source, field, lambda content: progress(len(content))):
            if isinstance(document, DataError):
                raise document
            yield document


def read(
    source: Input,
    field: str = "text",
    used: Callable[[bytes | memoryview], object] = lambda content: None,
    skip: int = 0,
) -> Iterator[str | DataError]:
    """The documents of one input from number `skip` on: `field` of lines and rows, else a file.

    A line or row that is no document comes as the DataError that names it, for the caller to raise
    or count. Blank lines are passed over. A further .gz or .zst is unpacked. `used` is given the
    bytes of the file as they are read, in order. Raises DataError for a file that cannot be read.
    """
    try:
        if source.kind == "hub":
            yield from _rows(source.name, _hub(source.name), field, skip)
        elif source.kind in ("parquet", "arrow"):
            yield from _rows(source.name, _table_file(source), field, skip)
            with open(source.name, "rb") as file:
                while content := file.read(_BUFFER_BYTES):
                    used(content)
        else:
            with open(source.name, "rb") as file:
                stream = _unpacked(source.name, _Watched(file, used))
                if source.kind == "lines":
                    yield from _lines(source.name, stream, field, skip)
                elif skip == 0:
                    yield _whole(source.name, stream)
                while stream.read(_BUFFER_BYTES):
                    pass  # so that all of the file is seen by `used`
    except DataError:
        raise
    except Exception as error:  # what `datasets`, gzip and zstandard raise has no common class
        known = (OSError, EOFError, zlib.error)
        if not isinstance(error, known) and not _is_library_error(error):
            raise
        first_line = str(error).partition("\n")[0]
        raise DataError(
            f"{source.name}: cannot be read ({first_line}); inputs are readable files; check the "
            "path, or copy the file again if it is cut short"
        ) from None


def _is_library_error(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in (
        "datasets",
        "pyarrow",
        "zstandard",
        "huggingface_hub",
    ) or isinstance(error, ValueError)


class _Watched(io.RawIOBase):
    """A file that shows what is read from it to a callback."""

    def __init__(self, file: BinaryIO, used: Callable[[memoryview], object]) -> None:
        self._file, self._used = file, used

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._used(memoryview(buffer)[:count])
        return count


def _unpacked(name: str, raw: io.RawIOBase) -> BinaryIO:
    packed = io.BufferedReader(raw, _BUFFER_BYTES)
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=packed), _BUFFER_BYTES)
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(packed), _BUFFER_BYTES)
    return packed


class _Zstandard(io.RawIOBase):
    """A file of one or more frames. The library's own reader ends silently where a file is cut."""

    def __init__(self, packed: BinaryIO) -> None:
        from zstandard import ZstdDecompressor

        self._packed, self._library, self._frame = packed, ZstdDecompressor(), None
        self._rest = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._rest or self._packed.read(_PACKED_BYTES)
            if not content:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.decompressobj()
            self._ready = self._frame.decompress(content)
            self._rest = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _whole(name: str, stream: BinaryIO) -> str | DataError:
    content = stream.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _no_document(name, f"line {line} is not UTF-8 ({error.reason})")


def _lines(name: str, stream: BinaryIO, field: str, skip: int) -> Iterator[str | DataError]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        if skip > 0:
            skip -= 1
            continue
        yield _parse(name, number, line, field)


def _parse(name: str, number: int, line: bytes, field: str) -> str | DataError:
    try:
        record = json.loads(line.decode())
        document = record[field] if isinstance(record, dict) else None
        if isinstance(document, str):
            document.encode()  # JSON can spell half a surrogate pair, which is no text
            return document
        found = f"has no text in the field '{field}'"
    except UnicodeError as error:
        found = f"is not UTF-8 ({error.reason})"
    except KeyError:
        found = f"has no field '{field}'"
    except (ValueError, RecursionError) as error:
        found = f"is not JSON ({error})"
    return _no_document(name, f"line {number} {found}")


def _table_file(source: Input) -> Any:
    from datasets import load_dataset

    return load_dataset(source.kind, data_files=[source.name], split="train", streaming=True)


def _hub(name: str) -> Any:
    from datasets import load_dataset

    path, *rest = name.removeprefix(HUB).split(":")
    path, _, revision = path.partition("@")
    config, split = [*rest, "", ""][:2]
    return load_dataset(
        path, config or None, split=split or "train", streaming=True, revision=revision or None
    )


def _rows(name: str, dataset: Any, field: str, skip: int) -> Iterator[str | DataError]:
    """The text column of a streaming data set of `datasets`."""
    import pyarrow

    if dataset.column_names is not None and field not in dataset.column_names:
        raise DataError(
            f"{name}: has no field '{field}'; a document is a row with a field of text; name one "
            f"of {', '.join(dataset.column_names)}"
        )
    first = 0
    for table in dataset.select_columns([field]).with_format("arrow").iter(_TABLE_ROWS):
        begin, first = first, first + table.num_rows
        if first <= skip:
            continue
        column = table.column(field)
        text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        values = column.to_pylist() if text else [None] * table.num_rows
        for row, value in enumerate(values[max(skip - begin, 0) :], max(skip, begin)):
            if isinstance(value, str):
                yield value
            else:
                yield _no_document(name, f"row {row} has no text in the field '{field}'")


def _no_document(name: str, found: str) -> DataError:
    return DataError(
        f"{name}: {found}; a document is a line of JSON or a row with a field of text, or a "
        "file of text, in UTF-8; mend or remove it, name another field, or pass over such lines "
        "with --on-error skip"
    )
