"""BLOOM against transformers, its loss, precision and switches."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F

from pretrain import sizes
from pretrain.config import BloomModel
from pretrain.model import Bloom
from pretrain.model import bloom as bloom_module
from pretrain.model import loss as loss_module
from pretrain.model.hf import bloom_hf_config
from pretrain.model.loss import nll_sum
from pretrain.model.precision import matmul_dtype

VOCABULARY = 211


def tiny(**changes) -> BloomModel:
    return BloomModel(**{"vocab_size": VOCABULARY, "hidden_size": 48, "layers": 2, "heads": 6}
                      | changes)  # fmt: skip


def randomised(config: BloomModel, **kwargs) -> Bloom:
    """A model none of whose parameters are 0 or 1, so that each takes part in the logits."""
    torch.manual_seed(1)
    model = Bloom(config, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return model


def peer_of(model: Bloom, config: BloomModel) -> transformers.BloomForCausalLM:
    peer = transformers.BloomForCausalLM(bloom_hf_config(config))
    peer.load_state_dict(model.state_dict())
    return peer


def sample(length: int, samples: int = 2, vocabulary: int = VOCABULARY):
    generator = torch.Generator().manual_seed(length)
    stream_bt = torch.randint(vocabulary, (samples, length + 1), generator=generator)
    return stream_bt[:, :-1], stream_bt[:, 1:]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close_relative(found, expected, tolerance):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 64, 300])
@pytest.mark.parametrize(("heads", "hidden"), [(4, 32), (6, 48), (3, 30)])
def test_logits_loss_and_every_gradient_equal_transformers(heads, hidden, length):
    config = tiny(heads=heads, hidden_size=hidden)
    model = randomised(config)
    peer = peer_of(model, config)
    tokens_bt, targets_bt = sample(length)
    peer_logits_btv = peer(tokens_bt).logits
    torch.testing.assert_close(model.logits(tokens_bt), peer_logits_btv, atol=1e-5, rtol=0)
    loss = model(tokens_bt, targets_bt)
    peer_loss = F.cross_entropy(peer_logits_btv.mT, targets_bt, reduction="sum")
    assert loss.dtype == torch.float32
    assert_close_relative(loss, peer_loss, 1e-5)
    loss.backward()
    peer_loss.backward()
    expected = gradients(peer)
    assert set(gradients(model)) == set(expected)
    for name, gradient in gradients(model).items():
        assert gradient.any() or length == 1, name
        assert_close_relative(gradient, expected[name], 1e-4 if expected[name].any() else 0)


def test_slopes_are_those_of_transformers():
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    for heads in (1, 2, 3, 6, 16, 32, 100, 112):
        expected = _get_alibi_slopes(heads, torch.device("cpu"))
        torch.testing.assert_close(
            torch.tensor(bloom_module.alibi_slopes(heads)), expected, rtol=2e-6, atol=0
        )


def test_alibi_columns_are_bf16_numbers_with_exact_products():
    length, heads, head_dim = 65_536, 6, 80
    columns_tnse = bloom_module.alibi_columns(length, heads, head_dim, torch.device("cpu"))
    assert (head_dim + columns_tnse.shape[-1]) % 8 == 0
    assert torch.equal(columns_tnse, columns_tnse.bfloat16().float())
    assert not columns_tnse[:, :, 2].any()
    keys = torch.tensor([0, 1, 255, 257, 32_769, 65_535])
    found_nk = torch.einsum(
        "nc,knc->nk", columns_tnse[5, :, 0].double(), columns_tnse[keys, :, 1].double()
    )
    slopes = torch.tensor(bloom_module.alibi_slopes(heads)) * head_dim**0.5
    assert torch.equal(found_nk, slopes.double()[:, None] * keys)
    with pytest.raises(ValueError, match="65536"):
        bloom_module.alibi_columns(length + 1, heads, head_dim, torch.device("cpu"))


def test_attention_is_causal():
    model = randomised(tiny()).eval()
    tokens_bt, _ = sample(20)
    changed_bt = tokens_bt.clone()
    changed_bt[:, 12] = (changed_bt[:, 12] + 1) % VOCABULARY
    before, after = model.logits(tokens_bt), model.logits(changed_bt)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(-1).all()


# --- sizes and initialisation --------------------------------------------------------------------

# layers, hidden size, heads, parameters (shared facts: the BLOOM recipes)
PUBLISHED = {
    "560m": (24, 1024, 16, 559_214_592),
    "1b1": (24, 1536, 16, 1_065_314_304),
    "1b7": (24, 2048, 16, 1_722_408_960),
    "3b": (30, 2560, 32, 3_002_557_440),
    "7b1": (30, 4096, 32, 7_069_016_064),
    "176b": (70, 14_336, 112, 176_247_271_424),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    layers, hidden, heads, expected = PUBLISHED[name]
    config = BloomModel(vocab_size=250_880, layers=layers, hidden_size=hidden, heads=heads)
    assert sizes.parameters(config) == expected
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Bloom(config).parameters()) == expected


def test_initialisation_depends_on_the_seed_not_the_dtype_and_has_the_stated_spread():
    config = tiny(hidden_size=96, layers=8)
    torch.manual_seed(3)
    model = Bloom(config)
    std = (1 / (3 * 96)) ** 0.5
    for name, parameter in model.named_parameters():
        if "layernorm" in name or "ln_f" in name:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight")))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            into_residual = "self_attention.dense." in name or "4h_to_h" in name
            expected = std / 4 if into_residual else std
            assert abs(parameter.std().item() / expected - 1) < 0.03, name
            assert abs(parameter.mean().item()) < 0.05 * expected, name
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        narrow = Bloom(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(model.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), other)
    stated = Bloom(tiny(hidden_size=96, init_std=0.0048)).lm_head.weight
    assert abs(stated.std().item() / 0.0048 - 1) < 0.03


def test_head_and_embedding_are_one_parameter():
    model = Bloom(tiny())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert {"lm_head.weight", "transformer.word_embeddings.weight"} <= set(model.state_dict())


# --- loss ----------------------------------------------------------------------------------------


def loss_case(rows=50, hidden=24):
    generator = torch.Generator().manual_seed(5)
    hidden_nh = torch.randn(rows, hidden, generator=generator, requires_grad=True)
    weight_vh = torch.randn(VOCABULARY, hidden, generator=generator, requires_grad=True)
    return hidden_nh, weight_vh, torch.randint(VOCABULARY, (rows,), generator=generator)


@pytest.mark.parametrize("rows_a_slice", [0, 7, 50, 1000])
def test_loss_and_gradients_in_slices(monkeypatch, rows_a_slice):
    monkeypatch.setattr(loss_module, "CPU_SLICE_BYTES", 4 * VOCABULARY * rows_a_slice)
    hidden_nh, weight_vh, targets_n = loss_case()
    (3 * nll_sum(hidden_nh, weight_vh, targets_n)).backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden_nh, weight_vh)]
    expected = 3 * F.cross_entropy(wide[0] @ wide[1].t(), targets_n, reduction="sum")
    expected.backward()
    assert_close_relative(3 * nll_sum(hidden_nh, weight_vh, targets_n), expected, 1e-6)
    assert_close_relative(hidden_nh.grad, wide[0].grad, 1e-5)
    assert_close_relative(weight_vh.grad, wide[1].grad, 1e-5)


def test_loss_survives_large_logits():
    hidden_nh, weight_vh, targets_n = loss_case()
    nll = nll_sum(hidden_nh * 1000, weight_vh, targets_n)
    nll.backward()
    assert nll.isfinite()
    assert hidden_nh.grad.isfinite().all()


def test_loss_computes_only_the_gradients_asked_for(monkeypatch):
    seen = []
    original = loss_module._slice_nll
    monkeypatch.setattr(
        loss_module,
        "_slice_nll",
        lambda *a: seen.append([g is None for g in a[4:]]) or original(*a),
    )
    hidden_nh, weight_vh, targets_n = loss_case()
    with torch.no_grad():
        without = nll_sum(hidden_nh, weight_vh, targets_n)
    assert torch.equal(without, nll_sum(hidden_nh, weight_vh.detach(), targets_n))
    assert seen == [[True, True], [False, True]]


def test_loss_is_used_up_by_its_backward_pass():
    nll = nll_sum(*loss_case())
    nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        nll.backward()


MEMORY_SCRIPT = """
import re, torch
from pathlib import Path
from pretrain.model.loss import nll_sum

def peak_bytes():  # getrusage would begin with the peak of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
hidden = torch.randn(4096, 16, requires_grad=True)
weight = torch.randn(250_880, 16, requires_grad=True)
targets = torch.randint(250_880, (4096,))
before = peak_bytes()
nll_sum(hidden, weight, targets).backward()
print(peak_bytes() - before)
"""


def test_loss_never_holds_all_logits():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True
    )
    all_logits_bytes = 4096 * 250_880 * 4
    assert 10e6 < int(run.stdout) < all_logits_bytes / 8


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu_has_bf16", [False, True])
def test_bf16_is_close_to_fp32(monkeypatch, cpu_has_bf16):
    monkeypatch.setattr("pretrain.model.precision._cpu_has_bf16", lambda: cpu_has_bf16)
    config = tiny()
    model = randomised(config)
    tokens_bt, targets_bt = sample(300)
    loss = model(tokens_bt, targets_bt)
    loss.backward()
    narrow = randomised(config).bfloat16()
    narrow_loss = narrow(tokens_bt, targets_bt)
    narrow_loss.backward()
    assert narrow.logits(tokens_bt).dtype == torch.bfloat16
    assert narrow_loss.dtype == torch.float32
    assert_close_relative(narrow_loss, loss, 2e-3)
    for name, gradient in gradients(narrow).items():
        assert gradient.dtype == torch.bfloat16
        cosine = F.cosine_similarity(
            gradient.float().flatten(), gradients(model)[name].flatten(), 0
        )
        assert cosine > 0.99, name


def test_only_bf16_on_a_cpu_without_bf16_is_widened(monkeypatch):
    capabilities = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    has_bf16 = bloom_module.matmul_dtype.__globals__["_cpu_has_bf16"]
    has_bf16.cache_clear()
    narrow = torch.zeros(1, dtype=torch.bfloat16)
    assert matmul_dtype(narrow) == torch.float32
    assert matmul_dtype(narrow.to("meta")) == torch.bfloat16
    assert matmul_dtype(narrow.double()) == torch.float64
    capabilities["avx512_bf16"] = True
    has_bf16.cache_clear()
    assert matmul_dtype(narrow) == torch.bfloat16
    has_bf16.cache_clear()


# --- switches ------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model = randomised(tiny(dropout=0.2))
    plain = randomised(tiny())
    tokens_bt, targets_bt = sample(30)

    def loss(seed):
        torch.manual_seed(seed)
        return model(tokens_bt, targets_bt)

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    model.eval()
    assert torch.equal(loss(1), loss(2))
    torch.testing.assert_close(loss(1), plain(tokens_bt, targets_bt), rtol=1e-6, atol=0)


def test_dropout_stands_where_transformers_has_it_and_after_the_embedding():
    """The spread under dropout tells attention, its output, MLP and embedding apart. BLOOM was
    trained with dropout after the embedding's LayerNorm too, which transformers leaves out."""
    config = tiny(dropout=0.3)
    model = randomised(config)
    peer = peer_of(model, config).train()
    peer.transformer.word_embeddings_layernorm.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, config.dropout)
    )
    tokens_bt, _ = sample(16, samples=256)
    torch.manual_seed(0)
    with torch.no_grad():
        ours = torch.stack([model.logits(tokens_bt) for _ in range(4)])
        theirs = torch.stack([peer(tokens_bt).logits for _ in range(4)])
    spread = theirs.var(0).mean().sqrt()
    assert spread > 0.1
    assert abs(ours.var(0).mean().sqrt() / spread - 1) < 0.02
    assert (ours.mean() - theirs.mean()).abs() < 0.02 * spread


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_nothing(dropout, monkeypatch):
    tokens_bt, targets_bt = sample(30)
    calls = []
    original = bloom_module.checkpoint
    monkeypatch.setattr(
        bloom_module, "checkpoint", lambda *a, **k: calls.append(a) or original(*a, **k)
    )
    results = []
    for activation_checkpointing in (False, True):
        model = randomised(tiny(dropout=dropout), activation_checkpointing=activation_checkpointing)
        torch.manual_seed(9)
        loss = model(tokens_bt, targets_bt)
        loss.backward()
        results.append((loss, gradients(model)))
    assert len(calls) == 2
    (loss, expected), (found_loss, found) = results
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_residual_nothing_skips_a_block():
    model = randomised(tiny(residual=False, layers=1))
    tokens_bt, _ = sample(10)
    assert not torch.allclose(
        model.logits(tokens_bt), randomised(tiny(layers=1)).logits(tokens_bt), atol=0.1
    )
    with torch.no_grad():
        model.transformer.h[0].mlp.dense_4h_to_h.weight.zero_()
        model.transformer.h[0].mlp.dense_4h_to_h.bias.zero_()
    hidden_bth = model.transformer(tokens_bt)
    assert torch.equal(hidden_bth, model.transformer.ln_f.bias.expand_as(hidden_bth))
    model = randomised(tiny(residual=False, layers=1))
    with torch.no_grad():
        model.transformer.h[0].self_attention.dense.weight.zero_()
    hidden_bth = model.transformer(tokens_bt)
    torch.testing.assert_close(hidden_bth, hidden_bth[:1, :1].expand_as(hidden_bth))
