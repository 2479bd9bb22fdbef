"""Which text a tokenizer is trained on: share of a source ~ bytes^alpha, drawn by a keyed hash.

Alpha below 1 gives small languages more than their part (BLOOM: 0.3). Nothing is held but counts.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pretrain.errors import DataError
from tokenizer.config import TokenizerConfig
from tokenizer.documents import Input, find_inputs, read_documents

# Longer documents are drawn in parts of this size: a few huge ones would put the shares far off.
_PART_CHARACTERS = 2**12
_PACKINGS = (".gz", ".zst")

Sources = Mapping[str, Sequence[Input]]


@dataclass
class Draw:
    """What one source has and gives; text is counted in bytes of UTF-8."""

    name: str
    files: list[str]
    documents: int  # in all of the source
    bytes: int
    share: float = 0.0  # bytes^alpha over the sum of all
    quota: float = 0.0  # bytes to be taken
    taken: int = 0  # bytes that were taken

    @property
    def whole(self) -> bool:
        """All of it is taken, since its share would need more than it has."""
        return self.quota >= self.bytes


def find_sources(config: TokenizerConfig) -> dict[str, list[Input]]:
    """The files of each source, by its name. Raises DataError for what is not there."""
    if config.inputs:
        return each_file(config.inputs)
    return {source.name: find_inputs(source.inputs) for source in config.sources}


def each_file(patterns: Iterable[str | Path]) -> dict[str, list[Input]]:
    """Each file as a source, named after it: en of corpus/en.jsonl.gz.

    Raises DataError for what is not there, and where two files would get the same name.
    """
    sources: dict[str, list[Input]] = {}
    for found in find_inputs(patterns):
        path = Path(found.name)
        name = Path(path.stem).stem if path.suffix in _PACKINGS else path.stem
        if name in sources:
            raise DataError(
                f"{found.name}: {sources[name][0].name} is named {name!r} too; each file of inputs "
                "is a source with a name of its own; rename one, or write [[sources]]"
            )
        sources[name] = [found]
    return sources


def measure(sources: Sources, field: str) -> list[Draw]:
    """Read all text once to count it. Raises DataError for what cannot be read or is empty."""
    draws = []
    with _bar(sources, "counting") as bar:
        for name, inputs in sources.items():
            draw = Draw(name, [found.name for found in inputs], 0, 0)
            for document in read_documents(draw.files, field, bar.update):
                draw.documents += 1
                draw.bytes += len(document.encode())
            if draw.bytes == 0:
                raise DataError(
                    f"source {name!r} ({', '.join(draw.files)}): has no text; every source has "
                    "some; remove it from sources, or mend its inputs"
                )
            draws.append(draw)
    return draws


def allocate(sizes: Sequence[int], alpha: float, sample: int) -> tuple[list[float], list[float]]:
    """(share, bytes to take) of each source; the bytes sum to `sample`, or to all there are.

    A source gives its share of the sample, but no more than it has; what it cannot give is spread
    over the others in proportion to their shares.
    """
    powers = [size**alpha for size in sizes]
    shares = [power / sum(powers) for power in powers]
    quotas = [float(size) for size in sizes]  # of those used whole; the rest is set below
    rest, open_ = float(min(sample, sum(sizes))), list(range(len(sizes)))
    while open_:
        scale = rest / sum(shares[k] for k in open_)
        full = [k for k in open_ if shares[k] * scale >= sizes[k]]
        if not full:
            for k in open_:
                quotas[k] = shares[k] * scale
            break
        rest -= sum(sizes[k] for k in full)
        open_ = [k for k in open_ if k not in full]
    return shares, quotas


def draw_text(sources: Sources, draws: Sequence[Draw], field: str, seed: int) -> Iterator[str]:
    """The documents that are trained on, counted into `draws`.

    Whether one is taken depends on the seed, the name of its source and its number in it alone, so
    other sources do not matter. Documents of over 4,096 characters are taken in parts.
    """
    with _bar(sources, "sampling") as bar:
        for draw in draws:
            key = hashlib.blake2b(f"{seed}/{draw.name}".encode(), digest_size=32).digest()
            limit = int(draw.quota / draw.bytes * 2**64)
            for number, part in enumerate(_parts(read_documents(draw.files, field, bar.update))):
                digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=key)
                if int.from_bytes(digest.digest(), "little") < limit:
                    draw.taken += len(part.encode())
                    yield part


def _parts(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for start in range(0, len(document), _PART_CHARACTERS):
            yield document[start : start + _PART_CHARACTERS]


def _bar(sources: Sources, title: str) -> tqdm:
    total = sum(found.bytes for inputs in sources.values() for found in inputs)
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None)
