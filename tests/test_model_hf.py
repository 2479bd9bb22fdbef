"""The border to transformers: its models as ours, export and import."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from pretrain.config import HfModel
from pretrain.errors import CheckpointError, ConfigError, UserError
from pretrain.model import Bloom, build_model
from pretrain.model import hf as hf_module
from pretrain.model.hf import HfCausalLM, bloom_hf_config, export_hf, import_hf
from tests.test_model import VOCABULARY, randomised, sample, tiny

TINY_LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


# --- transformers' models ------------------------------------------------------------------------


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_llama_trains(activation_checkpointing):
    torch.manual_seed(0)
    config = HfModel(family="hf", vocab_size=VOCABULARY, config=TINY_LLAMA)
    model = build_model(config, activation_checkpointing)
    assert isinstance(model, HfCausalLM)
    assert model.model.is_activation_checkpointing == activation_checkpointing
    tokens_bt, targets_bt = sample(20)
    logits_btv = model.logits(tokens_bt)
    first = model(tokens_bt, targets_bt)
    torch.testing.assert_close(
        first, F.cross_entropy(logits_btv.mT, targets_bt, reduction="sum"), rtol=1e-6, atol=0
    )
    first.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model(tokens_bt, targets_bt) < first


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (TINY_LLAMA | {"model_type": "lama"}, "did you mean .*llama"),
        (TINY_LLAMA | {"hiden_size": 64}, "hiden_size(.|\n)*did you mean .*hidden_size"),
        (TINY_LLAMA | {"hidden_size": "big"}, "hidden_size"),
        (TINY_LLAMA | {"hidden_size": 30}, "not a multiple"),
        ({"model_type": "vit"}, "ViTConfig"),
    ],
)
def test_a_wrong_hf_config_is_explained(config, says):
    with pytest.raises(ConfigError, match=says):
        build_model(HfModel(family="hf", vocab_size=VOCABULARY, config=config))


# --- export and import ---------------------------------------------------------------------------


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "a": 4, "flower": 5, "opens": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_export_loads_in_transformers_and_comes_back(tmp_path, tokenizer_folder):
    config = tiny()
    model = randomised(config)
    folder = tmp_path / "deep" / "export"
    export_hf(model, config, folder, tokenizer_folder, sequence_length=128)
    assert model.training
    assert [entry.name for entry in folder.parent.iterdir()] == ["export"]
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(peer, transformers.BloomForCausalLM)
    assert peer.config.seq_length == 128
    assert (peer.config.eos_token_id, peer.generation_config.pad_token_id) == (2, 3)
    tokens_bt, _ = sample(40)
    logits_btv = model.logits(tokens_bt)
    torch.testing.assert_close(peer(tokens_bt).logits, logits_btv, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a flower opens").input_ids == [4, 5, 6]
    imported, state = import_hf(folder)
    assert imported.model_dump(exclude={"init_std"}) == config.model_dump(exclude={"init_std"})
    again = Bloom(imported)
    again.load_state_dict(state)
    assert torch.equal(again.logits(tokens_bt), logits_btv)


def test_export_in_bf16_rounds_the_weights_once(tmp_path):
    config = tiny()
    model = randomised(config)
    export_hf(model, config, tmp_path / "export", dtype=torch.bfloat16)
    _, state = import_hf(tmp_path / "export")
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.bfloat16()), name


def test_export_of_a_transformers_model(tmp_path):
    config = HfModel(family="hf", vocab_size=VOCABULARY, config=TINY_LLAMA)
    model = build_model(config)
    export_hf(model, config, tmp_path / "export")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokens_bt, _ = sample(40)
    torch.testing.assert_close(peer(tokens_bt).logits, model.logits(tokens_bt))


def test_a_corrupt_export_is_refused_and_removed(tmp_path, monkeypatch):
    save = transformers.BloomForCausalLM.save_pretrained

    def damage_then_save(self, *args, **kwargs):
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        state["transformer.h.1.mlp.dense_4h_to_h.bias"][3] += 0.1
        save(self, *args, state_dict=state, **kwargs)

    monkeypatch.setattr(transformers.BloomForCausalLM, "save_pretrained", damage_then_save)
    with pytest.raises(CheckpointError, match=r"sample \d+, position \d+, token \d+"):
        export_hf(randomised(tiny()), tiny(), tmp_path / "export")
    assert not any(tmp_path.iterdir())


def test_export_of_weights_that_are_not_finite_is_refused(tmp_path):
    model = randomised(tiny())
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="finite"):
        export_hf(model, tiny(), tmp_path / "export")


def test_exports_that_cannot_be(tmp_path, tokenizer_folder):
    model = Bloom(tiny())
    with pytest.raises(UserError, match="another directory"):
        export_hf(model, tiny(), tokenizer_folder)
    with pytest.raises(UserError, match="residual = true"):
        export_hf(Bloom(tiny(residual=False)), tiny(residual=False), tmp_path / "export")
    with pytest.raises(UserError, match="cannot be loaded"):
        export_hf(model, tiny(), tmp_path / "export", tmp_path / "absent")
    small = tiny(vocab_size=6)
    with pytest.raises(UserError, match="7 tokens"):
        export_hf(Bloom(small), small, tmp_path / "export", tokenizer_folder)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "setting",
    [
        {"apply_residual_connection_post_layernorm": True},
        {"tie_word_embeddings": False},
        {"hidden_dropout": 0.1},
    ],
)
def test_import_refuses_what_bloom_cannot_be(tmp_path, setting):
    config = bloom_hf_config(tiny())
    for key, value in setting.items():
        setattr(config, key, value)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        import_hf(tmp_path)


def test_import_refuses_other_models_and_damaged_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        import_hf(tmp_path / "absent")
    llama = build_model(HfModel(family="hf", vocab_size=VOCABULARY, config=TINY_LLAMA))
    llama.model.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="llama"):
        import_hf(tmp_path / "llama")
    peer = transformers.BloomForCausalLM(bloom_hf_config(tiny()))
    state = peer.state_dict()
    del state["transformer.h.0.self_attention.dense.weight"]
    peer.save_pretrained(tmp_path / "partial", state_dict=state)
    with pytest.raises(CheckpointError, match=r"h\.0\.self_attention\.dense\.weight"):
        import_hf(tmp_path / "partial")


def test_bound_of_the_export_check_is_tight(tmp_path, monkeypatch):
    """fp32 exports are equal to a few units in the last place: the tolerance is not what passes."""
    monkeypatch.setattr(hf_module, "EXPORT_TOLERANCE", 1e-5)
    export_hf(randomised(tiny()), tiny(), tmp_path / "export")
