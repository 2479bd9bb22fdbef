"""Training tokenizers: BLOOM's pieces, the shares of sources, what is written and refused."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import ConfigError, DataError
from tokenizer.config import TokenizerConfig, load_tokenizer_config
from tokenizer.folder import load
from tokenizer.sampling import allocate, draw_text, each_file, find_sources, measure
from tokenizer.train import save, train, train_bpe

ROOT = Path(__file__).parents[1]
TEXTS = [
    "The flower opens in the morning; the flower closes in the evening.",
    "def open(flower):\n\treturn flower.petals  # five\r\n",
    "La fleur s'ouvre le matin… Les fleurs, s'ouvrent-elles ?",
    "花は朝に開く。花、夕方に閉じる。",
    "फूल सुबह खिलता है। तुम؟ کیا، پھول۔",
] * 20
CODE = [path.read_text("utf-8") for path in sorted(ROOT.glob("pretrain/**/*.py"))]
FAMILIES = ["byte-bpe", "sentencepiece-bpe", "sentencepiece-unigram"]
anything = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(TEXTS), 400)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return str(path)


def config_of(**settings):
    return TokenizerConfig(**({"output": "out", "vocab_size": 500, "inputs": ["x"]} | settings))


# --- byte-level BPE ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("foo(bar)|baz...  qux", ["foo", "(", "bar", ")|", "baz", "... ", " qux"]),
        ("a, b", ["a", ",", " b"]),
        ("it's  1+1\n\n x", ["it's", " ", " 1+1", "\n\n", " x"]),
        ("花は。開く、x", ["花は", "。", "開く", "、", "x"]),
        ("है। کیا، پھول۔ y…z", ["है", "।", " کیا", "،", " پھول", "۔", " y", "…", "z"]),
    ],
)
def test_pieces_are_those_of_bloom(tokenizer, text, pieces):
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


def test_special_tokens_and_bytes_are_always_there(tokenizer):
    assert [tokenizer.id_to_token(k) for k in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.get_vocab_size() == 400
    bare = train_bpe(iter(["a"]), 260)
    assert bare.get_vocab_size() == 260
    assert len(bare.encode("花").ids) == 3


def test_merges_are_learned_from_the_text_and_the_same_each_time(tokenizer):
    assert len(tokenizer.encode(" flower").ids) == 1
    assert train_bpe(iter(TEXTS), 400).to_str() == tokenizer.to_str()


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(DataError, match="at least 260"):
        train_bpe(iter(TEXTS), 259)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_loads_the_folder_and_agrees(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:5], "  two  spaces , and a comma ."]:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer.encode(text).ids
        assert loaded.decode(ids) == text
    tokens = (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    assert tokens == (0, 1, 2, 3)
    assert loaded.padding_side == "left"
    assert loaded.clean_up_tokenization_spaces is False
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows too


# --- config --------------------------------------------------------------------------------------


def test_blooms_sizes_and_the_published_configs():
    bloom = load_tokenizer_config(ROOT / "configs/tokenizer/bloom.toml")
    assert (bloom.rows, bloom.tokens, bloom.alpha) == (250_880, 250_680, 0.3)
    demo = load_tokenizer_config(ROOT / "configs/tokenizer/demo.toml", ["sample=2MB", "seed=7"])
    assert (demo.rows, demo.tokens, demo.sample, demo.seed) == (4096, 4096, 2_000_000, 7)
    assert [source.name for source in demo.sources] == ["code", "docs"]


def test_all_problems_of_a_config_are_reported_at_once(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        'output = "x"\nvocab_size = 1000\nreserved = 900\nalpha = 1.5\nsample = "lots"\n'
        'vocab = 3\nnormalization = "nfkc"\nbyte_fallback = false\ninputs = ["a"]\n'
        'sources = [{ name = "a", inputs = ["b"] }, { name = "a", inputs = ["b"] }]\n'
    )
    with pytest.raises(ConfigError) as error:
        load_tokenizer_config(path)
    keys = [problem.key for problem in error.value.problems]
    assert sorted(keys) == sorted(
        ["alpha", "sample", "vocab", "inputs", "sources", "vocab_size", "normalization",
         "byte_fallback"]
    )  # fmt: skip
    assert "did you mean 'vocab_size'" in str(error.value)
    assert "leaves 100 tokens; 256 bytes and 4 special tokens need 260" in str(error.value)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('output = "x"\nvocab_size = 300', ["inputs"]),
        ('vocab_size = 300\ninputs = ["a"]', ["output"]),
        ('output = "x"\nvocab_size = 300\nmultiple_of = 0\ninputs = ["a"]', ["multiple_of"]),
        ('output = "x"\nvocab_size = 300\n[[sources]]\nname = "a"\ninputs = []', None),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, keys):
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_tokenizer_config(path)
    found = [problem.key for problem in error.value.problems]
    assert found == (keys or ["sources.0.inputs"])


# --- shares of the sources -----------------------------------------------------------------------


def test_shares_follow_bytes_to_the_alpha():
    shares, quotas = allocate([1_000_000, 8_000_000], 1 / 3, 300_000)
    assert shares == pytest.approx([1 / 3, 2 / 3])
    assert quotas == pytest.approx([100_000, 200_000])


def test_what_a_source_cannot_give_goes_to_the_others_in_proportion():
    shares, quotas = allocate([10, 1000, 4000], 0.5, 1000)
    assert quotas[0] == 10  # its share would have been 33
    assert quotas[2] / quotas[1] == pytest.approx(2) == pytest.approx(shares[2] / shares[1])
    # Giving away can fill another source in turn.
    assert allocate([10, 320, 2000], 0, 900)[1] == pytest.approx([10, 320, 570])


@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=20),
    st.floats(0, 1),
    st.integers(1, 10**12),
)
def test_quotas_fill_the_sample_and_no_source_gives_more_than_it_has(sizes, alpha, sample):
    shares, quotas = allocate(sizes, alpha, sample)
    assert sum(quotas) == pytest.approx(min(sample, sum(sizes)))
    assert all(0 < quota <= size for quota, size in zip(quotas, sizes, strict=True))
    open_ = [q / s for q, s, size in zip(quotas, shares, sizes, strict=True) if q < size]
    assert open_ == pytest.approx([open_[0]] * len(open_) if open_ else [])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Sources of 20 kB, 200 kB and 2 MB in documents of 40 bytes."""
    path = tmp_path_factory.mktemp("three")
    for name, count in (("small", 500), ("middle", 5000), ("large", 50_000)):
        write_jsonl(path / f"{name}.jsonl", [f"{name:>8} {k:031}" for k in range(count)])
    return path


def drawn(sources, alpha, sample, seed=1):
    draws = measure(sources, "text")
    shares, quotas = allocate([d.bytes for d in draws], alpha, sample)
    for draw, share, quota in zip(draws, shares, quotas, strict=True):
        draw.share, draw.quota = share, quota
    return list(draw_text(sources, draws, "text", seed)), {d.name: d for d in draws}


def test_the_text_drawn_has_the_shares_of_the_formula(three):
    texts, draws = drawn(each_file([three / "*.jsonl"]), 0.3, 100_000)
    sizes = {"small": 20_000, "middle": 200_000, "large": 2_000_000}
    assert {name: draw.bytes for name, draw in draws.items()} == sizes
    assert draws["large"].documents == 50_000
    whole = sum(size**0.3 for size in sizes.values())
    for name, size in sizes.items():
        expected = 100_000 * size**0.3 / whole
        assert draws[name].share == pytest.approx(expected / 100_000)
        # Four standard deviations of a draw of documents of 40 bytes.
        assert draws[name].taken == pytest.approx(expected, abs=4 * (expected * 40) ** 0.5)
        assert draws[name].taken == 40 * sum(text.startswith(f"{name:>8}") for text in texts)
    assert not any(draw.whole for draw in draws.values())


def test_a_source_used_whole_is_used_to_the_last_document(three):
    _, draws = drawn(each_file([three / "*.jsonl"]), 0.3, 300_000)
    assert draws["small"].whole
    assert draws["small"].taken == 20_000
    assert not draws["large"].whole
    total = draws["middle"].taken + draws["large"].taken
    assert total == pytest.approx(280_000, abs=4 * (280_000 * 40) ** 0.5)
    assert draws["large"].taken / draws["middle"].taken == pytest.approx(10**0.3, rel=0.1)


def test_the_draw_depends_on_seed_and_source_alone(three):
    all_three = each_file([three / "*.jsonl"])
    first, _ = drawn(all_three, 0, 30_000)
    assert drawn(all_three, 0, 30_000)[0] == first
    assert drawn(all_three, 0, 30_000, seed=2)[0] != first
    # Without the others, and at the same rate of 10,000 of 2,000,000 bytes.
    alone, _ = drawn({"large": all_three["large"]}, 0, 10_000)
    assert alone == [text for text in first if "large" in text]


def test_a_huge_document_is_drawn_in_parts(tmp_path):
    text = "".join(f"{k:07}é" for k in range(200_000))
    (tmp_path / "huge.txt").write_text(text, "utf-8")
    texts, draws = drawn(each_file([tmp_path / "huge.txt"]), 0.3, 180_000)
    assert draws["huge"].taken == pytest.approx(180_000, rel=0.6)
    assert 20 < len(texts) < 70
    assert all(part in text for part in texts)
    whole, _ = drawn(each_file([tmp_path / "huge.txt"]), 0.3, 10**9)
    assert "".join(whole) == text


def test_sources_are_named_after_their_files(tmp_path):
    for name in ("en.jsonl.gz", "code.v1.txt", "pt_BR.jsonl", "zh.parquet.zst"):
        (tmp_path / name).write_bytes(b"x")
    assert list(each_file([tmp_path / "*"])) == ["code.v1", "en", "pt_BR", "zh"]
    (tmp_path / "en.txt").write_bytes(b"x")
    with pytest.raises(DataError, match="is named 'en' too"):
        each_file([tmp_path / "*"])
    (tmp_path / "nothing.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"source 'nothing' .*has no text"):
        measure(each_file([tmp_path / "nothing.txt"]), "text")
    named = [{"name": "b", "inputs": [str(tmp_path / "en*")]}]
    found = find_sources(config_of(inputs=[], sources=named))
    assert [Path(i.name).name for i in found["b"]] == ["en.jsonl.gz", "en.txt"]


# --- a whole training ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_training_gives_the_same_bytes(tmp_path, family):
    texts = [*TEXTS, Path(__file__).read_text("utf-8")]
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", texts) for name in "ab"]
    files = {}
    for name in ("one", "two"):
        report = train(config_of(family=family, output=tmp_path / name, vocab_size=600,
                                 multiple_of=16, reserved=8, inputs=inputs))  # fmt: skip
        files[name] = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    assert files["one"] == files["two"]
    sentencepiece = {"sentencepiece.model"} if family in FAMILIES[1:] else set()
    assert files["one"].keys() == sentencepiece | {
        "tokenizer.json", "tokenizer_config.json", "training.json"
    }  # fmt: skip
    assert load(tmp_path / "one").vocab_size == report.tokens == 600
    assert "model.vocab_size = 608" in str(report)
    record = json.loads(files["one"]["training.json"])
    size = sum(len(text.encode()) for text in texts)
    assert record["settings"]["vocab_size"] == 600
    assert record["settings"]["seed"] == 42
    assert record["model_vocab_size"] == 608
    assert record["versions"].keys() == {"anthesis", "tokenizers", "sentencepiece"}
    assert record["sources"][1] == {
        "name": "b", "inputs": [inputs[1]], "documents": 101, "bytes": size, "share_wanted": 0.5,
        "sampled_bytes": size, "whole": True,
    }  # fmt: skip


def test_the_report_says_what_happened(tmp_path, three):
    out = tmp_path / "out"
    report = train(config_of(output=out, vocab_size=10_000, sample=300_000,
                             inputs=[str(three / "*.jsonl")]))  # fmt: skip
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"small +20.0KB +\d+\.\d+% +20.0KB .*whole", text)
    assert "1 of 3 sources are used whole" in text
    assert f"tokens trained: {report.tokens} of 10000: the text has no more" in text
    assert 260 < report.tokens < 10_000
    assert "model.vocab_size = 10000" in text


def test_an_output_in_use_is_refused_before_any_text_is_read(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    config = config_of(output=out, inputs=[write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    train(config)
    before = (out / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match=r"output = .*there already; .*remove the folder"):
        train(config.model_copy(update={"inputs": ("absent",)}))
    assert (out / "tokenizer.json").read_bytes() == before


def test_a_failed_training_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 2"):
        train(config_of(output=tmp_path / "out", inputs=[str(path)]))
    write_jsonl(path, TEXTS)
    with pytest.raises(DataError, match="sample = 1: no text was drawn"):
        train(config_of(output=tmp_path / "out", inputs=[str(path)], sample=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        train(config_of(output=tmp_path / "file" / "out", inputs=[str(path)]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenizer.train.save", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left"):
        train(config_of(output=tmp_path / "out", inputs=[str(path)]))
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "file"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_ids_of_our_path_on_all_sources(tmp_path, slices, family):
    from transformers import AutoTokenizer

    text = write_jsonl(tmp_path / "a.jsonl", [t[:2000] for t in slices])
    train(config_of(family=family, output=tmp_path / "out", vocab_size=3000, inputs=[text]))
    ours = load(tmp_path / "out").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.is_fast
    rows = [e.ids for e in ours.encode_batch_fast(slices, add_special_tokens=False)]
    ids = theirs(slices, add_special_tokens=False)["input_ids"]
    assert [k for k, row in enumerate(rows) if row != ids[k]] == []
    back = [text if "▁" not in text else None for text in slices]
    for k, text in enumerate(theirs.batch_decode(ids)):
        assert back[k] in (None, text), slices[k][:60]
