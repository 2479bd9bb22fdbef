"""Text that several tests share."""

from pathlib import Path

import pytest

from tokenizer.documents import read_documents

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus"


@pytest.fixture(scope="session")
def slices():
    """The first documents of all 30 sources."""
    if not CORPUS.exists():
        pytest.skip(f"the text for tests and benchmarks is not here: {CORPUS}")
    sources = {p.name.split(".")[0]: read_documents([p]) for p in sorted(CORPUS.glob("*.gz"))}
    assert len(sources) == 30
    return [text for docs in sources.values() for text, _ in zip(docs, range(12), strict=False)]
