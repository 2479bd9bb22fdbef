"""Opening and sampling a corpus of 10^9 documents and 10^12 tokens, on sparse synthetic files.

    python benchmarks/corpus_index.py [--sources 28] [--folder DIR]

One source has 10^9 documents of 1000 tokens; its index (20 GB) and tokens (2 TB) are sparse files:
only the ends of the tables, which opening checks, and what a search looks at are written. Printed
are the seconds to the first sample, resident memory, and samples a second of index work alone
(source and token offset, windows of 2048) with a BLOOM-like mixture of 28 sources.
"""

import argparse
import os
import resource
import shutil
import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from pretrain.config import Data, Source
from pretrain.data import Corpus, ShardWriter
from pretrain.data.mixture import Mixture, quantise
from pretrain.data.streams import KeyedStream

DOCUMENTS, TOKENS_EACH, ITEM = 10**9, 1000, 2
LENGTH = 2048


def write_sparse(prefix: Path) -> None:
    """A shard of 10^9 documents, with as much of its tables as split and search need."""
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(DOCUMENTS * TOKENS_EACH * ITEM)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, DOCUMENTS, DOCUMENTS + 1))
        file.truncate(34 + 20 * DOCUMENTS + 8)
        # Where a search by halves looks for the first documents and the border of validation.
        border = round(0.95 * DOCUMENTS)
        looked_at = {DOCUMENTS - 1, border, border - 1, *range(2000)}
        for target in (0, border, DOCUMENTS - 1):
            low, high = 0, DOCUMENTS
            while low < high:
                middle = (low + high) // 2
                looked_at.add(middle)
                low, high = (middle + 1, high) if middle <= target else (low, middle)
        for document in sorted(looked_at):
            file.seek(34 + 4 * document)
            file.write(struct.pack("<i", TOKENS_EACH))
            file.seek(34 + 4 * DOCUMENTS + 8 * document)
            file.write(struct.pack("<q", document * TOKENS_EACH * ITEM))
            file.seek(34 + 12 * DOCUMENTS + 8 * document)
            file.write(struct.pack("<q", document))
        file.seek(34 + 20 * DOCUMENTS)
        file.write(struct.pack("<q", DOCUMENTS))


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=28)
    parser.add_argument("--folder", type=Path, default=Path("."))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        write_sparse(folder / "giant")
        with ShardWriter(folder / "small", 100) as writer:
            for _ in range(100):
                writer.append(np.arange(90))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        data = Data(
            sequence_length=LENGTH,
            sources=[Source(name="giant", path=folder / "giant")],
        )
        corpus = Corpus(data, 42, 100, "train")
        corpus.batch(0, 1)
        print(f"first sample of 10^9 documents, 10^12 tokens: {time.perf_counter() - begin:.3f} s")
        for sample in range(1000):
            corpus.batch(sample * 10**5, 1)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"resident after 1001 samples all over it: {after / 1024:.0f} MB "
              f"({(after - before) / 1024:.0f} MB more than before)")  # fmt: skip
        index_speed(options.sources, corpus)
    finally:
        shutil.rmtree(folder)


def index_speed(sources: int, corpus: Corpus) -> None:
    """Samples a second on one core, in batches of 2048 and of 16."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    weights = 0.8 ** np.arange(sources)
    mixture = Mixture([(0, quantise(weights.tolist()))], 42)
    [giant] = corpus._streams
    streams = [
        KeyedStream(f"s{k}", giant.shard, 0, giant.tokens >> k // 2, LENGTH, 42, "train")
        for k in range(sources)
    ]
    for batch in (2048, 16):
        begin, samples = time.perf_counter(), 0
        while time.perf_counter() - begin < 3:
            placed, numbers = mixture.place(samples, batch)
            for k in np.unique(placed).tolist():
                streams[k].offsets(numbers[placed == k])
            samples += batch
        rate = samples / (time.perf_counter() - begin)
        print(f"index work, {sources} sources, batches of {batch}: {rate:,.0f} samples/s a core")


if __name__ == "__main__":
    main()
