"""Roles of parameters, and how fused query, key and value come apart, in models of transformers
and ours."""

import pytest
import torch
import transformers

from pretrain.config import BloomModel
from pretrain.model import Bloom
from pretrain.optim.groups import Matrices, fused_matrices, parameter_groups, parameter_roles

HIDDEN, HEADS, VOCABULARY = 24, 4, 31
COMMON = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2,
          "num_attention_heads": HEADS, "intermediate_size": 40}  # fmt: skip
CONFIGS = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS},
    "gpt_neox": {**COMMON, "tie_word_embeddings": False},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS},
    "phi3": {**COMMON, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False},
    "llama": {**COMMON, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama-tied": {**COMMON, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
# Modules by the last part of their name; all other weights are hidden matrices.
EMBEDDINGS = {"wte", "wpe", "embed_in", "word_embeddings", "embed_tokens"}
HEADS_ = {"embed_out", "lm_head"}
NORMS = {"ln_1", "ln_2", "ln_f", "input_layernorm", "post_attention_layernorm", "final_layer_norm",
         "norm", "word_embeddings_layernorm"}  # fmt: skip
MATRICES = {"c_attn", "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h",
            "dense_4h_to_h", "qkv_proj", "o_proj", "q_proj", "k_proj", "v_proj", "gate_proj",
            "up_proj", "down_proj", "gate_up_proj"}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    if name == "ours":
        return Bloom(BloomModel(vocab_size=VOCABULARY, hidden_size=HIDDEN, layers=2, heads=HEADS))
    config = transformers.AutoConfig.for_model(name.partition("-")[0], **CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", [*CONFIGS, "ours"])
def test_roles(name):
    model = model_of(name)
    roles = parameter_roles(model)
    assert list(roles) == [n for n, _ in model.named_parameters()]
    found = set()
    for parameter, role in roles.items():
        module, kind = parameter.split(".")[-2:]
        by_module = (
            "embedding" if module in EMBEDDINGS else "head" if module in HEADS_
            else "norm" if module in NORMS else "matrix" if module in MATRICES else None
        )  # fmt: skip
        assert role == ("bias" if kind == "bias" else by_module), parameter
        found.add(role)
    untied = name in ("gpt_neox", "phi3", "llama")
    assert ("head" in found) == untied
    assert {"embedding", "matrix", "norm"} <= found
    grouped = [(g["role"], id(p)) for g in parameter_groups(model) for p in g["params"]]
    assert sorted(grouped) == sorted((roles[n], id(p)) for n, p in model.named_parameters())


# Sizes of the three parts of each fused parameter, as (rows, columns).
PARTS = {
    "gpt2": [(HIDDEN, HIDDEN)] * 3,
    "gpt_neox": [(HIDDEN, HIDDEN)] * 3,
    "bloom": [(HIDDEN, HIDDEN)] * 3,
    "ours": [(HIDDEN, HIDDEN)] * 3,
    "phi3": [(HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN), (HIDDEN // 2, HIDDEN)],
}


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_a_fused_parameter_are_query_key_and_value(name):
    """By what attention does without one: no query or no key, and it looks everywhere alike; no
    value, and nothing comes out."""
    model = model_of(name).eval()
    fused = fused_matrices(model)
    assert len(fused) == 2
    parameter_name = next(iter(fused))
    matrices, parameter = fused[parameter_name], model.get_parameter(parameter_name)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    whole = parameter.detach().clone()
    assert [tuple(m.shape) for m in matrices.split(whole)] == PARTS[name]
    attention = model.get_submodule(parameter_name.rsplit(".", 2)[0])
    (projection,) = (m for n, m in attention.named_children() if n in ("c_proj", "dense", "o_proj"))
    seen = []
    projection.register_forward_hook(lambda _module, _in, out: seen.append(out))
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])

    def output(without):
        split = matrices.split(whole)
        for number in without:
            split[number] = torch.zeros_like(split[number])
        with torch.no_grad():
            parameter.copy_(matrices.join(split, whole.shape))
            model(tokens, *([tokens] if name == "ours" else []))
        return seen.pop()

    usual, no_query, no_key = output([]), output([0]), output([1])
    torch.testing.assert_close(no_query, no_key)
    torch.testing.assert_close(no_query, output([0, 1]))
    assert (usual - no_query).norm() > 0.05 * usual.norm()
    assert output([2]).abs().max() == 0
    assert usual.abs().max() > 0


def test_separate_projections_are_left_alone():
    assert fused_matrices(model_of("llama")) == {}


@pytest.mark.parametrize(
    ("matrices", "shape", "count"),
    [
        (Matrices(), (6, 5), 1),
        (Matrices(), (4, 6, 5), 4),
        (Matrices(), (2, 3, 6, 5), 6),
        (Matrices(0, 4, (3, 3, 3)), (36, 5), 3),
        (Matrices(0, 1, (8, 2, 2)), (12, 5), 3),
        (Matrices(0, 2, (4, 1, 1)), (12, 5), 3),
        (Matrices(1, 1, (4, 4, 4)), (7, 12), 3),
        (Matrices(1, 3, (2, 1, 1)), (7, 12), 3),
    ],
)
def test_join_undoes_split(matrices, shape, count):
    whole = torch.randn(shape)
    split = matrices.split(whole)
    assert len(split) == count
    assert all(matrix.dim() == 2 for matrix in split)
    assert sum(matrix.numel() for matrix in split) == whole.numel()
    assert torch.equal(matrices.join(split, whole.shape), whole)
