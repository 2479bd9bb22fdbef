"""Attention kept inside each document of a window."""

import math

import pytest
import torch
from torch.nn import functional as F

from pretrain.config import BloomModel, HfModel
from pretrain.model import Bloom, build_model
from pretrain.model import bloom as bloom_module

VOCABULARY, END = 211, 3

# Lengths of the documents of a window, end tokens included; the last may go on beyond the window.
# A window that begins inside a document looks like one whose first document is short.
LAYOUTS = {
    "all end": ([90, 1, 300, 17, 292], True),
    "last goes on": ([33, 400, 130], False),
    "empty documents": ([1, 1, 40, 1, 1, 1, 60, 1, 1], True),
    "two tokens": ([1, 1], False),
    "one token": ([1], True),
}


def tiny(**changes) -> BloomModel:
    return BloomModel(
        **{"vocab_size": VOCABULARY, "hidden_size": 64, "layers": 2, "heads": 4} | changes
    )


def randomised(config: BloomModel | None = None, end_of_text: int | None = END, **kwargs) -> Bloom:
    """A model whose attention is far from uniform."""
    torch.manual_seed(1)
    model = Bloom(config or tiny(), end_of_text=end_of_text, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def window(layout: str, seed: int = 0) -> tuple[torch.Tensor, list[slice]]:
    """One window, tokens_1t, and where its documents lie."""
    lengths, closed = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    tokens_1t = torch.randint(END + 1, VOCABULARY, (1, sum(lengths)), generator=generator)
    stops = torch.tensor(lengths).cumsum(0).tolist()
    tokens_1t[0, [stop - 1 for stop in stops[: None if closed else -1]]] = END
    slices = [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]
    return tokens_1t, slices


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --- a document does not notice its neighbours ---------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 0.03)],
)
def test_a_document_alone_and_among_others_has_the_same_logits(dtype, tolerance, layout):
    model = randomised().to(dtype).eval()
    tokens_1t, documents = window(layout)
    with torch.no_grad():
        logits_1tv = model.logits(tokens_1t)
        crossing_1tv = randomised(end_of_text=None).to(dtype).eval().logits(tokens_1t)
        alone_1tv = torch.cat([model.logits(tokens_1t[:, document]) for document in documents], 1)
    assert relative_error(logits_1tv, alone_1tv) <= tolerance
    if len(documents) > 1:  # the test can tell
        assert relative_error(crossing_1tv, alone_1tv) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_without_an_end_has_default_attention(dtype):
    tokens_bt = torch.randint(
        END + 1, VOCABULARY, (2, 700), generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        expected_btv = randomised(end_of_text=None).to(dtype).logits(tokens_bt)
        found_btv = randomised().to(dtype).logits(tokens_bt)
    assert relative_error(found_btv, expected_btv) <= (1e-5 if dtype is torch.float32 else 0.02)


def logits_and_gradients(model: Bloom, tokens_1t: torch.Tensor, document: slice):
    """Logits of a document, and their gradients with respect to the embeddings of all tokens."""
    embedded = []
    handle = model.transformer.word_embeddings.register_forward_hook(
        lambda module, arguments, output: output.retain_grad() or embedded.append(output)
    )
    torch.manual_seed(5)
    logits_tv = model.logits(tokens_1t)[0, document]
    handle.remove()
    logits_tv.backward(torch.randn_like(logits_tv))
    return logits_tv.detach(), embedded[0].grad[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])  # torch's CPU kernels: fused, and not
@pytest.mark.parametrize("sharpness", [1, 30])
def test_other_documents_change_no_bit_of_logits_and_gradients(dtype, dropout, sharpness):
    tokens_1t, documents = window("all end")
    document = documents[2]
    changed_1t = tokens_1t.clone()
    changed_1t[0, [5, 50, documents[3].start]] = torch.tensor([100, 101, 102])

    def results(end_of_text):
        model = randomised(tiny(dropout=dropout), end_of_text).to(dtype)
        with torch.no_grad():
            for (
                block
            ) in model.transformer.h:  # where it is 30, scores differ by 10 thousand and more
                block.self_attention.query_key_value.weight *= sharpness
        return [logits_and_gradients(model, t, document) for t in (tokens_1t, changed_1t)]

    (logits_tv, gradient_th), (changed_tv, changed_gradient_th) = results(END)
    assert torch.equal(logits_tv, changed_tv)
    assert torch.equal(gradient_th, changed_gradient_th)
    assert gradient_th.isfinite().all()
    assert gradient_th[document].any(-1).all()
    assert not gradient_th[: document.start].any()
    assert not gradient_th[document.stop :].any()

    (logits_tv, gradient_th), (changed_tv, changed_gradient_th) = results(None)
    assert not torch.equal(logits_tv, changed_tv)
    assert not torch.equal(gradient_th[document], changed_gradient_th[document])
    assert gradient_th[: document.start].any()


def test_samples_of_a_batch_have_their_own_documents():
    windows = [window(layout)[0][:, :97] for layout in ("all end", "empty documents")]
    model = randomised()
    with torch.no_grad():
        together_btv = model.logits(torch.cat(windows))
        for sample, tokens_1t in enumerate(windows):
            assert relative_error(together_btv[sample], model.logits(tokens_1t)[0]) <= 1e-6


# --- against a plain implementation --------------------------------------------------------------


def plain_logits(model: Bloom, tokens_bt: torch.Tensor, inside: bool) -> torch.Tensor:
    """BLOOM spelt out, with a mask and a bias of t x t."""
    trunk = model.transformer
    batch, length = tokens_bt.shape
    allowed_btt = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1)
    for b, t in (tokens_bt == END).nonzero().tolist() if inside else []:
        allowed_btt[b, t + 1 :, : t + 1] = False
    slopes_n = torch.tensor([2.0 ** (-8 * (n + 1) / trunk.heads) for n in range(trunk.heads)])
    position_t = torch.arange(length).double()
    bias_ntt = slopes_n[:, None, None] * (position_t - position_t[:, None])
    x_bth = trunk.word_embeddings_layernorm(trunk.word_embeddings(tokens_bt))
    for block in trunk.h:
        qkv_bth = block.self_attention.query_key_value(block.input_layernorm(x_bth))
        qkv_btnsd = qkv_bth.view(batch, length, trunk.heads, 3, trunk.head_dim)
        query, key, value = qkv_btnsd.transpose(1, 2).unbind(3)
        scores_bntt = query @ key.mT / math.sqrt(trunk.head_dim) + bias_ntt
        scores_bntt = scores_bntt.masked_fill(~allowed_btt[:, None], -math.inf)
        mixed_bth = (scores_bntt.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x_bth = x_bth + block.self_attention.dense(mixed_bth)
        x_bth = x_bth + block.mlp(block.post_attention_layernorm(x_bth))
    return trunk.ln_f(x_bth) @ model.lm_head.weight.t()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_every_gradient_equal_a_plain_implementation(layout):
    model = randomised().double()
    tokens_1t, _ = window(layout)
    expected_1tv = plain_logits(model, tokens_1t, inside=True)
    found_1tv = model.logits(tokens_1t)
    assert relative_error(found_1tv, expected_1tv) <= 1e-13
    if len(tokens_1t[0]) > 1:
        assert relative_error(plain_logits(model, tokens_1t, inside=False), expected_1tv) > 0.1
    weights_1tv = torch.randn_like(expected_1tv)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(expected_1tv, parameters, weights_1tv)
    found = torch.autograd.grad(found_1tv, parameters, weights_1tv)
    # The gradient of a key's bias is 0 but for rounding: measured against the largest gradient.
    largest = max(gradient.abs().max() for gradient in expected)
    for mine, plain in zip(found, expected, strict=True):
        assert (mine - plain).abs().max() <= 1e-13 * largest


def test_the_loss_counts_the_target_after_an_end_too():
    model = randomised()
    tokens_1t, _ = window("all end")
    tokens_bt, targets_bt = tokens_1t[:, :-1], tokens_1t[:, 1:]
    expected = F.cross_entropy(model.logits(tokens_bt).mT, targets_bt, reduction="sum")
    assert relative_error(model(tokens_bt, targets_bt), expected) <= 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 1000])
def test_columns_let_a_query_see_the_earlier_part_of_its_document_alone(length):
    """As many documents as tokens: the most that columns of a window must tell apart."""
    heads, head_dim = 2, 16
    ends_bt = torch.full((2, length), END)
    for dtype in (torch.bfloat16, torch.float64):
        columns, plain = (
            bloom_module.attention_columns(ends_bt, heads, head_dim, dtype, end)[1, :, 1]
            for end in (END, None)
        )
        assert (head_dim + columns.shape[-1]) % 8 == 0
        alibi = 6  # columns, before those of the documents
        assert torch.equal(columns[..., :alibi], plain[..., :alibi])
        assert not columns[:, 2].any()
        query_tm, key_tm = columns[:, :2, alibi:].double().unbind(1)
        products_ttm = query_tm[:, None] * key_tm
        assert not products_ttm.diagonal().any()
        earlier_tt = torch.ones(length, length, dtype=torch.bool).tril(-1)
        assert (products_ttm.sum(-1)[earlier_tt] <= -bloom_module.DOCUMENT_WALL).all()


# --- switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_nothing(dropout):
    tokens_1t, _ = window("all end")
    results = []
    for activation_checkpointing in (False, True):
        model = randomised(tiny(dropout=dropout), activation_checkpointing=activation_checkpointing)
        torch.manual_seed(9)
        loss = model(tokens_1t[:, :-1], tokens_1t[:, 1:])
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


def test_training_and_evaluation_agree():
    tokens_1t, _ = window("all end")
    model = randomised(activation_checkpointing=True)
    trained_1tv = model.train().logits(tokens_1t)
    assert torch.equal(model.eval().logits(tokens_1t), trained_1tv)
    with torch.no_grad():
        assert torch.equal(model.logits(tokens_1t), trained_1tv)


def test_build_model_keeps_the_weights_and_refuses_what_cannot_be():
    torch.manual_seed(4)
    default = build_model(tiny())
    torch.manual_seed(4)
    model = build_model(tiny(), end_of_text=END)
    assert model.transformer.end_of_text == END
    assert default.transformer.end_of_text is None
    for name, tensor in default.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="bloom"):
        build_model(HfModel(family="hf", vocab_size=9, config={"model_type": "?"}), False, END)
    for outside in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=str(VOCABULARY - 1)):
            build_model(tiny(), end_of_text=outside)
