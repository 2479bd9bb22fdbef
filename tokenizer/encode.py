"""Text files -> a shard of token ids and its manifest, PREFIX.json."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from pretrain.data.shards import ShardWriter
from pretrain.errors import DataError
from tokenizer.documents import read_documents

_CHUNK_CHARACTERS = 2**20  # text encoded in one call, spread over the cores


def encode(
    inputs: list[Path], tokenizer_dir: Path, prefix: Path, field: str = "text"
) -> dict[str, Any]:
    """Encode `inputs` to PREFIX.bin, PREFIX.idx and PREFIX.json; returns the manifest.

    Each document ends with the tokenizer's end-of-text token (`</s>`); empty ones are counted and
    left out. A special token spelled out in a text is encoded as the characters it is, so text
    cannot fake the end of a document. Progress goes to stderr. Raises DataError for inputs that
    cannot be read (see `read_documents`), a folder without tokenizer, a full disk.
    """
    tokenizer, end_of_text, digest = _load(tokenizer_dir)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    sizes = _sizes(inputs)
    text_bytes = empty_documents = 0
    with (
        ShardWriter(prefix, vocab_size) as writer,
        tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=Path(prefix).name) as bar,
    ):
        for documents in _chunks(read_documents(inputs, field, bar.update)):
            encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
            for document, encoding in zip(documents, encodings, strict=True):
                if not document:
                    empty_documents += 1
                    continue
                writer.append([*encoding.ids, end_of_text])
                text_bytes += len(document.encode())
    manifest = {
        "documents": writer.documents,
        "empty_documents": empty_documents,
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "vocab_size": vocab_size,
        "end_of_text": end_of_text,
        "tokenizer_sha256": digest,
        "inputs": [
            {"path": str(path), "bytes": size} for path, size in zip(inputs, sizes, strict=True)
        ],
    }
    _write_aside(Path(f"{prefix}.json"), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _load(directory: Path) -> tuple[Tokenizer, int, str]:
    """(tokenizer, id of its end-of-text token, SHA-256 of tokenizer.json) of a saved folder."""
    path = Path(directory) / "tokenizer.json"
    try:
        content = path.read_bytes()
        config = json.loads((path.parent / "tokenizer_config.json").read_text("utf-8"))
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise DataError(
            f"{directory}: no tokenizer can be loaded ({error}); a tokenizer is a folder with "
            "tokenizer.json and tokenizer_config.json; train one, or save one from transformers"
        ) from None
    token = config.get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    end_of_text = tokenizer.token_to_id(token) if token else None
    if end_of_text is None:
        raise DataError(
            f"{directory}: eos_token = {token!r} is no token of tokenizer.json; every document "
            "ends with that token; set eos_token in tokenizer_config.json"
        )
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, end_of_text, hashlib.sha256(content).hexdigest()


def _sizes(inputs: list[Path]) -> list[int]:
    missing = [str(path) for path in inputs if not path.is_file()]
    if missing or not inputs:
        raise DataError(
            f"{', '.join(missing) or 'no input'}: not there; inputs are files of text; check the "
            "paths"
        )
    return [path.stat().st_size for path in inputs]


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about a chunk's characters, so that memory stays bounded."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _write_aside(path: Path, text: str) -> None:
    """Write a file under another name first, so that it is never seen half done."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
