"""Tokenizer folders: tokenizer.json and tokenizer_config.json, as `transformers` reads them."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pretrain.errors import DataError
from tokenizer.config import SPECIAL_TOKENS


class Loaded(NamedTuple):
    """A tokenizer ready to encode documents: special tokens in a text are plain characters."""

    tokenizer: Tokenizer
    end_of_text: int  # id of the token that ends a document
    fingerprint: str  # SHA-256 of tokenizer.json
    vocab_size: int  # highest id + 1


def load(directory: Path) -> Loaded:
    """The tokenizer of a folder. Raises DataError where there is none or it has no end of text."""
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
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return Loaded(tokenizer, end_of_text, hashlib.sha256(content).hexdigest(), vocab_size)


def save(tokenizer: Tokenizer, directory: Path, end_of_text: str | None = None) -> None:
    """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads without our code.

    The special tokens are BLOOM's; or `end_of_text` for all of them, as in GPT-2.
    """
    from transformers import PreTrainedTokenizerFast  # seconds to import, and only needed here

    unk, bos, eos, pad = SPECIAL_TOKENS if end_of_text is None else [end_of_text] * 4
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    # transformers 5 writes a class name that 4 does not know; both know the one from before.
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_absent(output: Path) -> None:
    """Raise DataError where something is at `output` already."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"output = {output}: is there already; a tokenizer is never overwritten, since shards "
            "and runs depend on it; choose another output, or remove the folder"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `output` once all is done, and vanishes on an error."""
    check_absent(output)
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by one that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except OSError as error:
        raise DataError(
            f"output = {output}: cannot be written ({error}); a folder on a disk with room; choose "
            "another output, or make room"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_bpe(vocab: Path, merges: Path, end_of_text: str, output: Path) -> Loaded:
    """Make a folder of a byte-level BPE in GPT-2's two files, with GPT-2's splitting of words.

    `vocab` is JSON of token -> id (encoder.json), `merges` has two tokens a line, the first merge
    first (vocab.bpe). Raises DataError for files that are no such thing, or an `output` in use.
    """
    check_absent(output)
    ids, pairs = _read_vocab(Path(vocab)), _read_merges(Path(merges))
    if end_of_text not in ids:
        raise DataError(
            f"{vocab}: has no token {end_of_text!r}; documents end with a token of the vocabulary; "
            "name it with --end-of-text"
        )
    for number, (left, right) in enumerate(pairs, start=1):
        strange = [token for token in (left, right, left + right) if token not in ids]
        if strange:
            raise DataError(
                f"{merges}: merge {number} needs {strange[0]!r}, which {vocab} has not; merges are "
                "made of tokens and yield tokens; give the two files of one tokenizer"
            )
    tokenizer = Tokenizer(models.BPE(ids, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    with new_folder(output) as folder:
        save(tokenizer, folder, end_of_text)
    return load(output)


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        ids = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _no_vocab(path, f"cannot be read ({error})") from None
    if not isinstance(ids, dict) or not all(
        type(number) is int and 0 <= number < 2**31 for number in ids.values()
    ):
        raise _no_vocab(path, "is no object of tokens and their ids")
    if len(set(ids.values())) < len(ids):
        raise _no_vocab(path, "gives two tokens the same id")
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys():
        raise _no_vocab(path, f"has no token for {len(missing)} of the 256 bytes")
    return ids


def _no_vocab(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: {found}; --vocab is JSON of token -> id of a byte-level BPE, such as GPT-2's "
        "encoder.json or vocab.json; check the path"
    )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    cure = "--merges has two tokens a line, such as GPT-2's vocab.bpe or merges.txt; check the path"
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {cure}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise DataError(f"{path}: line {number} is {line[:40]!r}; {cure}")
        pairs.append((left, right))
    return pairs
