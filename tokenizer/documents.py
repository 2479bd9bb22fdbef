"""Documents out of text files, one at a time: JSONL or plain text, either of them gzipped."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import DataError


def read_documents(
    paths: Iterable[Path],
    field: str = "text",
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    """The documents of `paths` in order: each line's `field` of .jsonl, else the file as a whole.

    A further .gz is unpacked. Blank lines are passed over. `progress` is told of bytes of input
    files as they are used up (of gzipped ones, the packed bytes). Raises DataError, with file and
    line, for what cannot be read: a file, broken JSON, no such field, no UTF-8.
    """
    for path in paths:
        name = path.name.removesuffix(".gz")
        seen = 0
        try:
            with path.open("rb") as packed:
                stream = gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed
                whole = not name.endswith(".jsonl")
                for document in _whole(path, stream) if whole else _lines(path, stream, field):
                    yield document
                    progress(packed.tell() - seen)
                    seen = packed.tell()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); inputs are readable files; check the path, or "
                "copy the file again if it is cut short"
            ) from None


def _whole(path: Path, stream: BinaryIO) -> Iterator[str]:
    content = stream.read()
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _bad_line(path, line, f"is not UTF-8 ({error.reason})") from None


def _lines(path: Path, stream: BinaryIO, field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            document = record[field] if isinstance(record, dict) else None
            if not isinstance(document, str):
                raise _bad_line(path, number, f"has no text in the field '{field}'")
            document.encode()  # JSON can spell half a surrogate pair, which is no text
        except UnicodeError as error:
            raise _bad_line(path, number, f"is not UTF-8 ({error.reason})") from None
        except KeyError:
            raise _bad_line(path, number, f"has no field '{field}'") from None
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, f"is not JSON ({error})") from None
        yield document


def _bad_line(path: Path, number: int, found: str) -> DataError:
    return DataError(
        f"{path}: line {number} {found}; a document is a line of JSON with a field of text, or a "
        "file of text, in UTF-8; mend or remove the line, or name another field"
    )
