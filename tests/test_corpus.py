"""Mixture and corpus: exact shares, epochs, splits and fingerprints."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Source
from pretrain.data import Corpus, Shard
from pretrain.data.mixture import BLOCK, PERIOD, Mixture, quantise
from pretrain.errors import DataError
from tests.test_data import make_data, make_source, write_by_hand, write_shard

BLOOM_WEIGHTS = [22.171, 13.054, 13.027, 12.092, 10.668, 8.137, 5.529, 4.954, 3.307, 0.747, 0.011]

# --- mixture -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda w: sum(w) > 0))
def test_quantised_weights_are_within_one_of_their_share(weights):
    counts, total = quantise(weights), sum(weights)
    assert counts.sum() == PERIOD
    for weight, count in zip(weights, counts, strict=True):
        assert (count >= 1) == (weight > 0)
        # One for rounding; further ones pay for the at most len(weights) raised from 0 to 1.
        assert count == 1 or abs(count - weight / total * PERIOD) < 1 + len(weights)
    largest = max(range(len(weights)), key=weights.__getitem__)
    assert abs(counts[largest] - weights[largest] / total * PERIOD) <= len(weights)


def test_quantised_weights_of_known_cases():
    assert quantise([1, 1]).tolist() == [PERIOD // 2] * 2
    assert quantise([1, 1, 1]).tolist() == [349526, 349525, 349525]
    assert quantise([1, 0, 1e-12]).tolist() == [PERIOD - 1, 0, 1]
    assert np.array_equal(quantise(BLOOM_WEIGHTS), quantise([8 * w for w in BLOOM_WEIGHTS]))


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -0.5]])
def test_weights_that_make_no_mixture_are_refused(weights):
    with pytest.raises(ValueError, match="above 0"):
        quantise(weights)


@pytest.fixture(scope="module")
def two_periods():
    counts = quantise(BLOOM_WEIGHTS)
    return counts, *Mixture([(0, counts)], 42).place(0, 2 * PERIOD)


def test_each_period_holds_the_exact_counts(two_periods):
    counts, sources, _ = two_periods
    for period in sources.reshape(2, PERIOD):
        assert np.array_equal(np.bincount(period, minlength=len(counts)), counts)


def test_each_block_holds_each_source_within_one_of_its_share(two_periods):
    counts, sources, _ = two_periods
    for k, count in enumerate(counts):
        held = (sources.reshape(-1, BLOCK) == k).sum(axis=1)
        assert np.abs(held - count * BLOCK / PERIOD).max() < 1


def test_numbers_of_a_source_count_up_in_the_order_of_the_run(two_periods):
    counts, sources, numbers = two_periods
    for k, count in enumerate(counts):
        assert np.array_equal(numbers[sources == k], np.arange(2 * count))


def test_order_differs_between_blocks_periods_and_seeds(two_periods):
    counts, sources, _ = two_periods
    blocks = sources.reshape(-1, BLOCK)
    assert len(np.unique(blocks[:200], axis=0)) == 200
    assert not np.array_equal(blocks[0], blocks[PERIOD // BLOCK])
    assert not np.array_equal(blocks[0], Mixture([(0, counts)], 43).place(0, BLOCK)[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**50), st.integers(0, 3000), st.integers(0, 3000))
def test_any_slice_equals_the_whole(first, before, count):
    stages = [(0, quantise([3, 2, 1])), (2**49 + 77, quantise([1, 0, 4]))]
    whole = Mixture(stages, 7).place(first, before + count)
    part = Mixture(stages, 7).place(first + before, count)
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[before:], b)


# --- corpus --------------------------------------------------------------------------------------


@pytest.fixture
def two_sources(tmp_path):
    """Source a: tokens 0 .. 999 in 100 documents; b: 10,000 .. 10,299 in 20."""
    a = make_source(tmp_path, "a", [10] * 100, weight=3.0)
    return a, make_source(tmp_path, "b", [15] * 20, start=10_000)


def test_a_batch_is_the_same_however_it_is_cut(two_sources):
    corpus = Corpus(make_data(*two_sources), 42, 10**6, "train")
    whole = corpus.batch(1000, 96)
    assert whole.shape == (96, 5)
    assert whole.dtype == np.int64
    for ranks in (1, 2, 3, 8, 96):
        rows = 96 // ranks
        again = Corpus(make_data(*two_sources), 42, 10**6, "train")
        slices = [again.batch(1000 + rank * rows, rows) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(slices), whole)
    assert corpus.batch(5, 0).shape == (0, 5)


def test_samples_are_runs_of_the_stream_that_share_one_token(two_sources):
    rows = Corpus(make_data(*two_sources), 42, 10**6, "train").batch(0, 400)
    assert np.array_equal(rows, rows[:, :1] + np.arange(5))  # tokens count up, so do the rows
    assert set(rows[:, 0] % 10_000 % 4) == {0}


@pytest.mark.parametrize(("split", "first", "end"), [("train", 0, 950), ("validation", 950, 1000)])
def test_each_epoch_covers_every_sample_once_in_its_own_order(tmp_path, split, first, end):
    # A length that divides the tokens: the last one is a label only, and begins no sample.
    data = make_data(make_source(tmp_path, "a", [10] * 100), length=5)
    corpus = Corpus(data, 42, 10**6, split)
    per_epoch = (end - first - 1) // 5
    starts = corpus.batch(0, 3 * per_epoch)[:, 0].tolist()
    epochs = [starts[e * per_epoch : (e + 1) * per_epoch] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == (first + 5 * np.arange(per_epoch)).tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_no_token_is_in_both_splits(two_sources):
    seen = {}
    for split in ("train", "validation"):
        seen[split] = set(Corpus(make_data(*two_sources), 1, 10**6, split).batch(0, 1500).ravel())
    assert not seen["train"] & seen["validation"]
    # BLOOM's border: round(0.95 * documents), 95 of 100 and 19 of 20.
    assert max(t for t in seen["train"] if t < 10_000) <= 949
    assert min(seen["validation"]) == 950
    assert max(seen["train"]) <= 10_284
    assert min(t for t in seen["validation"] if t >= 10_000) == 10_285


def test_the_border_is_rounded_like_megatron(tmp_path):
    # 0.95 * 10 = 9.5 and 0.95 * 30 = 28.5 both round to the even number.
    for documents, border in [(10, 10), (30, 28), (11, 10), (50, 48)]:
        source = make_source(tmp_path, f"d{documents}", [10] * documents)
        summary = Corpus(make_data(source), 1, 10**6, "train").summary(1)
        assert summary[0].available_tokens == 10 * border


def test_locate_names_the_place_of_each_sample(two_sources):
    corpus = Corpus(make_data(*two_sources), 42, 10**6, "train")
    for sample in (0, 7, 5000):
        row, place_of = corpus.batch(sample, 1)[0], corpus.locate(sample)
        base, document = (0, 10) if place_of.source == "a" else (10_000, 15)
        assert row[0] == base + place_of.spans[0].token_offset
        assert sum(span.tokens for span in place_of.spans) == 5
        for span, after in pairwise([*place_of.spans, None]):
            assert span.document == span.token_offset // document
            assert after is None or after.token_offset == span.token_offset + span.tokens
        assert corpus.locate(sample) == place_of
    assert corpus.locate(5000).epoch > 0


def test_weights_are_kept_and_zero_ones_not_opened(tmp_path, two_sources):
    absent = Source(name="gone", path=tmp_path / "gone", weight=0.0)
    corpus = Corpus(make_data(absent, *two_sources), 42, 10**6, "train")
    share_of_b = (corpus.batch(0, 4096)[:, 0] >= 10_000).mean()
    assert share_of_b == 0.25
    assert np.array_equal(
        corpus.batch(0, 64), Corpus(make_data(*two_sources), 42, 10**6, "train").batch(0, 64)
    )


def test_summary_counts_what_a_run_takes(two_sources):
    corpus = Corpus(make_data(*two_sources), 42, 10**6, "train")
    samples = 2345
    taken_b = int((corpus.batch(0, samples)[:, 0] >= 10_000).sum())
    a, b = corpus.summary(samples)
    assert (a.source, a.available_tokens, b.available_tokens) == ("a", 950, 285)
    assert (b.samples, a.samples) == (taken_b, samples - taken_b)
    assert b.tokens == 4 * taken_b
    assert b.share == taken_b / samples
    assert b.epochs == taken_b / 71
    full = corpus.summary(3 * PERIOD)
    assert [row.share for row in full] == [0.75, 0.25]


def test_fingerprint_follows_content_and_not_place(tmp_path, two_sources):
    def fingerprint(sources=two_sources, seed=42, split="train", **changes):
        found = Corpus(make_data(*sources, **changes), seed, 10**6, split).fingerprint()
        assert json.loads(json.dumps(found)) == found
        return found

    original = fingerprint()
    a, b = two_sources
    moved = tmp_path / "moved"
    moved.mkdir()
    for suffix in ("bin", "idx"):
        (moved / f"x.{suffix}").write_bytes(Path(f"{a.path}.{suffix}").read_bytes())
    assert fingerprint((a.model_copy(update={"path": moved / "x"}), b)) == original
    heavier = [source.model_copy(update={"weight": 2 * source.weight}) for source in (a, b)]
    assert fingerprint(heavier) == original

    changed = [
        fingerprint(seed=43),
        fingerprint(split="validation"),
        fingerprint(length=5),
        fingerprint(fraction=0.1),
        fingerprint((a.model_copy(update={"weight": 2.0}), b)),
        fingerprint((a.model_copy(update={"name": "c"}), b)),
        fingerprint((b, a)),
    ]
    write_shard(b.path, [[1] * 15] * 20, 10**6)
    changed.append(fingerprint())
    assert len({original["hash"], *(found["hash"] for found in changed)}) == 1 + len(changed)


def test_fingerprint_of_a_large_shard_sees_its_ends_and_its_size(tmp_path):
    make_source(tmp_path, "a", [1000] * 1000)
    before = Shard.open(tmp_path / "a").fingerprint()
    for at in (0, 4 * 10**6 - 1):
        content = bytearray((tmp_path / "a.bin").read_bytes())
        content[at] ^= 1
        (tmp_path / "a.bin").write_bytes(content)
        after = Shard.open(tmp_path / "a").fingerprint()
        assert after != before
        before = after


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    write_by_hand(tmp_path / "a", [[1] * 10, [1] * 7 + [500] + [1] * 2, [1] * 10])
    data = make_data(Source(name="web", path=tmp_path / "a"), fraction=0.0)
    message = r"a\.bin: source 'web', document 1, token offset 17: id 500 is .*vocab_size = 500"
    with pytest.raises(DataError, match=message):
        Corpus(data, 1, 500, "train").batch(0, 50)
    assert Corpus(data, 1, 501, "train").batch(0, 50).max() == 500
    write_by_hand(tmp_path / "a", [[1] * 29 + [-3]])
    with pytest.raises(DataError, match="offset 29: id -3"):
        Corpus(make_data(data.sources[0], length=29, fraction=0.0), 1, 500, "train").batch(0, 1)


def test_a_source_too_small_for_one_sample_is_refused(tmp_path):
    source = make_source(tmp_path, "tiny", [2, 2, 2])
    Corpus(make_data(source, length=5, fraction=0.0), 1, 10**6, "train")
    with pytest.raises(DataError, match=r"'tiny' has 6 tokens .* needs 7; .*weight 0"):
        Corpus(make_data(source, length=6, fraction=0.0), 1, 10**6, "train")
    with pytest.raises(DataError, match="0 tokens in 0 documents to use for validation"):
        Corpus(make_data(source, length=5), 1, 10**6, "validation")


def test_validation_needs_a_validation_fraction(two_sources):
    with pytest.raises(DataError, match="validation_fraction = 0"):
        Corpus(make_data(*two_sources, fraction=0.0), 1, 10**6, "validation")


def test_golden_batch(two_sources):
    rows = Corpus(make_data(*two_sources), 42, 10**6, "train").batch(123_456, 8)
    assert rows[:, 0].tolist() == [680, 836, 244, 10012, 10124, 856, 640, 792]


def test_the_data_room_needs_no_torch():
    code = "import sys, pretrain.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
