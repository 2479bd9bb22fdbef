"""Weights, alpha sampling, caps, stages, epochs, and Megatron's order, through the corpus."""

import numpy as np
import pytest

from pretrain.config import Data, Mixture
from pretrain.config_file import load
from pretrain.data import Corpus
from pretrain.data.mixture import PERIOD, quantise
from pretrain.data.mixture import Mixture as Placement
from pretrain.errors import ConfigError
from pretrain.observe.metrics import read_metrics
from pretrain.train import train_run
from tests.ranks import run_ranks, run_worker
from tests.test_data import make_source
from tests.tiny import write_config

SIZES = {"large": 4000, "middle": 1000, "small": 250}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources; the tokens of each tell its name."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        make_source(folder, name, [50] * (tokens // 50), start=10_000 * k)
        for k, (name, tokens) in enumerate(SIZES.items())
    ]


def corpus_of(sources, split="train", samples=None, **changes):
    data = Data(**{"sequence_length": 7, "sources": sources, "validation_fraction": 0.1} | changes)
    return Corpus(data, 3, 100_000, split, samples)


def shares(corpus, first, count):
    names = [corpus.locate(n).source for n in range(first, first + count)]
    return {name: names.count(name) / count for name in SIZES}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("cap", [None, "500 tokens"])
def test_shares_follow_weight_times_size_to_the_alpha(sources, alpha, cap):
    weights = {"large": 1.0, "middle": 2.0, "small": 1.5}
    weighted = [s.model_copy(update={"weight": weights[s.name]}) for s in sources]
    corpus = corpus_of(weighted, mixture={"alpha": alpha, "cap": cap})
    # A cap is taken to whole samples: 500 tokens are 71 of 7.
    sizes = {name: min(size, 497) if cap else size for name, size in SIZES.items()}
    wanted = {name: weights[name] * sizes[name] ** alpha for name in SIZES}
    for row in corpus.summary(PERIOD):
        assert abs(row.share - wanted[row.source] / sum(wanted.values())) <= 1 / PERIOD


def test_nothing_is_read_again_before_all_of_its_source_was_read(sources):
    corpus = corpus_of(sources)
    rows = corpus.batch(0, 4000)
    for k, source in enumerate(sources):
        mine = rows[rows[:, 0] // 10_000 == k][:, 0]
        windows = (source_tokens(source) - 1) // 7
        assert len(mine) > 1.5 * windows
        for epoch in np.split(mine, range(windows, len(mine), windows)):
            assert len(set(epoch.tolist())) == len(epoch)


def source_tokens(source):
    return round(0.9 * (SIZES[source.name] // 50)) * 50


# --- stages --------------------------------------------------------------------------------------

STAGES = [
    {"begins": "1750 tokens", "weights": {"small": 1.0}},  # after 250 samples
    {"begins": "500 samples", "weights": {"large": 3.0, "middle": 1.0}},
]


def test_a_stage_changes_the_mixture_at_its_sample(sources):
    base = [s.model_copy(update={"weight": w}) for s, w in zip(sources, (0, 1, 0), strict=True)]
    corpus = corpus_of(base, mixture={"stages": STAGES})
    assert shares(corpus, 0, 250) == {"large": 0, "middle": 1, "small": 0}
    assert shares(corpus, 250, 250) == {"large": 0, "middle": 0, "small": 1}
    assert shares(corpus, 500, 1024) == {"large": 0.75, "middle": 0.25, "small": 0}


def test_stages_are_pure_and_a_source_goes_on_where_it_was(sources):
    base = [s.model_copy(update={"weight": w}) for s, w in zip(sources, (1, 1, 0), strict=True)]
    whole = corpus_of(base, mixture={"stages": STAGES}).batch(0, 1200)
    again = corpus_of(base, mixture={"stages": STAGES})
    for first, count in ((1190, 10), (495, 10), (240, 20), (0, 1)):
        assert np.array_equal(again.batch(first, count), whole[first : first + count])
    middle = whole[whole[:, 0] // 10_000 == 1][:, 0]
    windows = (900 - 1) // 7
    assert len(middle) > 2 * windows
    assert sorted(middle[:windows]) == sorted(middle[windows : 2 * windows])


def test_stages_before_a_change_are_untouched_by_it(sources):
    plain = corpus_of(sources).batch(0, 250)
    staged = corpus_of(sources, mixture={"stages": STAGES})
    assert np.array_equal(staged.batch(0, 250), plain)
    assert staged.fingerprint()["hash"] != corpus_of(sources).fingerprint()["hash"]


def test_a_run_may_be_given_a_stage_and_a_source_on_its_way(sources):
    begun = corpus_of(sources[:2])
    stages = [{"begins": "300 samples", "weights": {"small": 1.0}}]
    new = [s.model_copy(update={"weight": float(s.name != "small")}) for s in sources]
    changed = corpus_of([new[2], new[0], new[1]], mixture={"stages": stages})
    assert np.array_equal(changed.batch(0, 300), begun.batch(0, 300))
    assert (changed.batch(300, 5) // 10_000 == 2).all()
    for samples in (0, 1, 300):
        assert changed.fingerprint(samples) == begun.fingerprint(samples)
    for samples in (301, None):
        assert changed.fingerprint(samples) != begun.fingerprint(samples)


def test_validation_has_the_first_weights_throughout(sources):
    plain = corpus_of(sources, "validation").batch(0, 600)
    staged = corpus_of(sources, "validation", mixture={"stages": STAGES}).batch(0, 600)
    assert np.array_equal(plain, staged)


def test_counts_taken_are_exact_at_any_sample_of_any_stage():
    stages = [(0, quantise([5, 3, 0])), (70_001, quantise([1, 1, 1])),
              (1_200_000, quantise([0, 0, 1]))]  # fmt: skip
    mixture = Placement(stages, 9)
    sources, numbers = mixture.place(0, 1_300_000)
    for k in range(3):
        assert np.array_equal(numbers[sources == k], np.arange((sources == k).sum()))
    for samples in (0, 1, 70_000, 70_001, 70_002, 1_048_576 + 70_001, 1_200_000, 1_299_999):
        assert np.array_equal(mixture.taken(samples), np.bincount(sources[:samples], minlength=3))


# --- Megatron's order ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.0, 0.5, 0.5]])
def test_megatrons_order_through_the_corpus(sources, tmp_path, weights):
    # The blend of the published rule, step by step, and samples by the index of their source. One
    # of weight 0 has its turn where the others have had more than their due.
    base = [s.model_copy(update={"weight": w}) for s, w in zip(sources, weights, strict=True)]
    corpus = corpus_of(base, samples=600, order="megatron", index_directory=tmp_path)
    taken, expected = [0, 0, 0], []
    for i in range(600):
        errors = [w * max(i, 1) - t for w, t in zip(weights, taken, strict=True)]
        expected.append(errors.index(max(errors)))
        taken[expected[-1]] += 1
    rows = corpus.batch(0, 600)
    assert (rows[:, 0] // 10_000).tolist() == expected
    assert [row.samples for row in corpus.summary(600)] == taken
    assert weights[0] > 0 or taken[0] > 0
    for sample in (0, 17, 599):
        source, epoch, spans = corpus.locate(sample)
        assert epoch is None
        assert source == list(SIZES)[expected[sample]]
        base_token = 10_000 * expected[sample]
        tokens = [base_token + s.token_offset + k for s in spans for k in range(s.tokens)]
        assert rows[sample].tolist() == tokens
        assert all(span.document == span.token_offset // 50 for span in spans)
    # 0.9 of the documents of each source, as in the keyed order; none is held out and trained on.
    for k, (name, tokens) in enumerate(SIZES.items()):
        mine = rows[np.array(expected) == k]
        assert mine.max() - 10_000 * k < round(0.9 * (tokens // 50)) * 50, name
    again = corpus_of(base, samples=600, order="megatron", index_directory=tmp_path)
    assert np.array_equal(again.batch(100, 50), rows[100:150])


# --- config --------------------------------------------------------------------------------------


def test_problems_of_a_mixture_come_at_once(tmp_path):
    config = write_config(tmp_path)
    stages = (
        "data.mixture.stages=[{begins='10 steps', weights={a=1}}, {begins='0 tokens', "
        "weights={c=1}}, {begins='1T', weights={a=0.0}}]"
    )
    with pytest.raises(ConfigError) as error:
        load(config, [stages, "data.mixture.cap=0", "data.order=megatron",
                      "data.attention=document", "data.mixture.alpha=2"])  # fmt: skip
    assert "mixture.alpha" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(config, [stages, "data.mixture.cap='3 steps'", "data.order=megatron",
                      "data.attention=document"])  # fmt: skip
    text = str(error.value)
    for part in (
        "data.mixture.stages.0.begins", "data.mixture.stages.1.begins", "known here: a, b",
        "data.mixture.stages.2.begins", "data.mixture.stages.2.weights", "data.mixture.cap",
        "data.index_directory", "weights only", "data.end_of_text",
    ):  # fmt: skip
        assert part in text, part
    assert Mixture().epoch_limit == 4


def test_sources_come_from_a_file_and_lie_in_a_folder(tmp_path):
    config = write_config(tmp_path)
    mixture = tmp_path / "mixture.toml"
    mixture.write_text('sources = [{name = "x", weight = 0.6}, {name = "y", path = "/else/y"}]')
    loaded = load(config, [f"data.sources={mixture}", f"data.directory={tmp_path}/shards",
                           "data.sources.1.weight=0.4"])  # fmt: skip
    assert [(s.name, str(s.path), s.weight) for s in loaded.data.sources] == [
        ("x", f"{tmp_path}/shards/x", 0.6),
        ("y", "/else/y", 0.4),
    ]
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path"):
        load(config, [f"data.sources={mixture}"])


def test_blooms_mixture_has_the_published_shares():
    sources = load("configs/bloom-176b.toml").data.sources
    assert len(sources) == 28
    assert abs(sum(source.weight for source in sources) - 1) < 1e-12
    shares = {source.name: round(100 * source.weight, 3) for source in sources}
    published = {"en": 22.171, "fr": 13.054, "code": 13.027, "zhs": 12.092, "es": 10.668,
                 "oscar-en": 8.137, "vi": 2.462, "indic-hi": 0.747, "indic-as": 0.011}  # fmt: skip
    assert {name: shares[name] for name in published} == published
    counts = quantise([source.weight for source in sources])
    assert (abs(counts / PERIOD - [source.weight for source in sources]) < 1e-6).all()


# --- whole runs ----------------------------------------------------------------------------------

_RUNS = {
    "stages": "data.mixture.stages=[{begins='60 samples', weights={b=1.0}}]",
    "megatron": "data.order=megatron",
    "document": "data.attention=document",
}


def _losses(world, path, *overrides):
    config = load(path, ["data.end_of_text=0", *overrides])
    train_run(config, world)
    rows = read_metrics(config.run_directory / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def test_too_many_epochs_are_told_before_the_run(tmp_path):
    code, output = run_worker([str(write_config(tmp_path)), "data.mixture.epoch_limit=0.1"])
    assert code == 0, output
    sources = {line.split()[1]: line for line in output.splitlines() if "source " in line}
    assert "over epoch_limit = 0.1" in sources["a:"]  # 0.14 epochs
    assert "over" not in sources["b:"]  # 0.06
    assert output.index("over epoch_limit") < output.index("before training")


@pytest.mark.parametrize("kind", _RUNS)
def test_a_run_is_the_same_on_other_ranks(tmp_path, kind):
    path = write_config(tmp_path)
    index = f"data.index_directory={tmp_path}/index"
    [plain] = run_ranks(1, _losses, path, "name=plain", index)
    [single] = run_ranks(1, _losses, path, "name=one", index, _RUNS[kind])
    double = run_ranks(2, _losses, path, "name=two", index, _RUNS[kind])[0]
    assert len(single) == len(plain) == 23
    alike = 12 if kind == "stages" else 0  # 60 samples are 12 steps
    assert single[:alike] == plain[:alike]
    assert max(abs(a - b) for a, b in zip(single[alike:], plain[alike:], strict=True)) > 1e-3
    np.testing.assert_allclose(double, single, atol=1e-4)
