"""How well tokenizers fit text: size of tokens, fertility, unknown characters, round trips.

A word is a run of letters, marks and digits; where a script is written without spaces (Han,
Hiragana, Katakana, Thai, Lao, Khmer, Burmese) each character with its marks counts as one.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import regex
from tokenizers import Tokenizer
from tqdm import tqdm

from tokenizer.documents import read_documents
from tokenizer.folder import load

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+",
    regex.V1,
)
_BYTE = regex.compile(r"<0x[0-9A-F]{2}>")
_SHOWN = 5  # failed round trips printed
_CHUNK = 64  # documents encoded at once, spread over the cores


@dataclass
class Count:
    """What one tokenizer makes of one source."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    unknown: int = 0  # tokens for unknown characters, or for single bytes of them
    normalised: int = 0  # documents that come back as another text of the same normal form
    failed: int = 0  # documents that come back as any other text

    @property
    def fertility(self) -> float:
        """Tokens a word."""
        return self.tokens / max(self.words, 1)

    def row(self) -> str:
        """Its numbers as a line of the table."""
        tokens = max(self.tokens, 1)
        return (
            f"{self.words:>11,}{self.bytes / tokens:>10.2f}{self.characters / tokens:>10.2f}"
            f"{self.fertility:>10.3f}{self.unknown / tokens:>10.3%}{self.failed:>8}"
        )


@dataclass(frozen=True)
class Failure:
    """A document that does not come back."""

    tokenizer: str
    source: str
    document: int  # its number in the source, from 0
    place: int  # first differing character
    text: str  # around that place
    decoded: str


@dataclass
class Inspection:
    """Counts by source of each tokenizer, in the order asked for."""

    counts: dict[str, dict[str, Count]]  # tokenizer -> source -> count
    failures: list[Failure] = dataclasses.field(default_factory=list)


def inspect_tokenizers(
    folders: Sequence[Path],
    sources: Mapping[str, Iterable[str | Path]],
    documents: int = 1000,
    field: str = "text",
) -> Inspection:
    """Measure each tokenizer on the first `documents` documents of every source.

    `sources` gives the files and globs of each source by its name. Raises DataError for a folder
    without tokenizer and for text that cannot be read.
    """
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    unique = len({path.name for path in paths}) == len(paths)
    tokenizers = {path.name if unique else str(path): load(path).tokenizer for path in paths}
    unknown = {name: _unknown_ids(tokenizer) for name, tokenizer in tokenizers.items()}
    report = Inspection({name: {} for name in tokenizers})
    for source, inputs in tqdm(sources.items(), "inspecting", disable=None):
        reading = islice(read_documents(inputs, field), documents)
        totals = {name: Count() for name in tokenizers}
        while texts := list(islice(reading, _CHUNK)):
            size = (
                sum(len(_WORD.findall(text)) for text in texts),
                sum(len(text.encode()) for text in texts),
                sum(map(len, texts)),
            )
            for name, tokenizer in tokenizers.items():
                total = totals[name]
                rows = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
                _check_round_trips(report, name, source, total, tokenizer, texts, rows)
                total.documents += len(texts)
                total.words += size[0]
                total.bytes += size[1]
                total.characters += size[2]
                total.tokens += sum(map(len, rows))
                total.unknown += sum(1 for ids in rows for k in ids if k in unknown[name])
        for name, total in totals.items():
            report.counts[name][source] = total
    return report


def _unknown_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that stand for characters outside of the vocabulary: <unk> and fallback to bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    ids = {tokenizer.token_to_id(model["unk_token"])} if model.get("unk_token") else set()
    if model.get("unk_id") is not None:
        ids = {model["unk_id"]}
    if model.get("byte_fallback"):
        ids |= {k for token, k in tokenizer.get_vocab().items() if _BYTE.fullmatch(token)}
    return ids - {None}


def _check_round_trips(
    report: Inspection,
    name: str,
    source: str,
    total: Count,
    tokenizer: Tokenizer,
    texts: list[str],
    rows: list[list[int]],
) -> None:
    decoded = tokenizer.decode_batch(rows, skip_special_tokens=False)
    for number, (text, back) in enumerate(zip(texts, decoded, strict=True), total.documents):
        if text == back:
            continue
        normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        if normalise(text) == normalise(back):
            total.normalised += 1
            continue
        total.failed += 1
        pairs = zip(text, back, strict=False)
        shorter = min(len(text), len(back))
        place = next((k for k, (a, b) in enumerate(pairs) if a != b), shorter)
        around = slice(max(place - 10, 0), place + 10)
        report.failures.append(Failure(name, source, number, place, text[around], back[around]))


def table(report: Inspection) -> str:
    """The report as text: a block for each tokenizer, then their fertilities side by side."""
    lines: list[str] = []
    for name, counts in report.counts.items():
        lines += [
            name,
            f"{'source':<20}{'words':>11}{'bytes/tok':>10}{'chars/tok':>10}{'tok/word':>10}"
            f"{'unknown':>10}{'failed':>8}",
            *(f"{source[:19]:<20}{count.row()}" for source, count in counts.items()),
            f"{'all':<20}{_sum(counts.values()).row()}",
        ]
        if normalised := sum(count.normalised for count in counts.values()):
            lines.append(f"{normalised} documents come back in their normal form, which differs")
        lines.append("")
    if len(report.counts) > 1:
        lines += [*_side_by_side(report), ""]
    for failure in report.failures[:_SHOWN]:
        lines += [
            f"{failure.tokenizer}: document {failure.document} of {failure.source} does not come "
            f"back; character {failure.place}:",
            f"  text    {failure.text!r}",
            f"  decoded {failure.decoded!r}",
        ]
    if (more := len(report.failures) - _SHOWN) > 0:
        lines.append(f"and {more} more")
    return "\n".join(lines).rstrip("\n")


def _side_by_side(report: Inspection) -> list[str]:
    """Fertility of each tokenizer, with its ratio to that of the first."""
    names = list(report.counts)
    first, *others = (counts | {"all": _sum(counts.values())} for counts in report.counts.values())
    lines = [f"{chr(65 + k)} = {name}" for k, name in enumerate(names)]
    head = "".join(f"{chr(66 + k):>10}{f'{chr(66 + k)}/A':>8}" for k in range(len(others)))
    lines.append(f"{'tokens / word':<20}{'A':>10}{head}")
    for source, count in first.items():
        cells = "".join(
            f"{other[source].fertility:>10.3f}"
            f"{other[source].tokens / max(count.tokens, 1):>8.3f}"  # the words are the same
            for other in others
        )
        lines.append(f"{source[:19]:<20}{count.fertility:>10.3f}{cells}")
    return lines


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        for name, value in vars(count).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def plot(report: Inspection, path: Path) -> None:
    """Draw the fertility of each source to a PNG, a bar for each tokenizer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(report.counts.values()))
    sources = sorted(first, key=lambda source: -first[source].fertility)
    thick = 0.8 / len(report.counts)
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(sources) * max(1, len(report.counts) / 2)))
    axes = figure.add_subplot()
    for k, (name, counts) in enumerate(report.counts.items()):
        places = [row - 0.4 + (k + 0.5) * thick for row in range(len(sources))]
        bars = axes.barh(places, [counts[s].fertility for s in sources], thick, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks(range(len(sources)), sources)
    axes.set_ylim(len(sources) - 0.5, -0.5)  # in reading order
    axes.margins(x=0.08)
    axes.set_xlabel("tokens a word (fewer is better)")
    axes.legend(loc="lower right" if len(sources) == 1 else "best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
