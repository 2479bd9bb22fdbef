"""BLOOM (arXiv 2211.05100): ALiBi, LayerNorm after the embedding, fused QKV, tanh GELU, tied head.

Parameters are named and laid out as in transformers.BloomForCausalLM, so a state dict loads both
ways. Shape suffixes: b batch, t token, h hidden, v vocabulary, n head, d head dimension, e head
dimension with ALiBi and document columns, s query/key/value, m bit of a document's number.

A module touches parameters only inside its own forward: ZeRO-3 gathers them by hooks on modules.
"""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.config import BloomModel
from pretrain.memory import POSITION_PARTS, SLOPE_PARTS
from pretrain.model.loss import nll_sum
from pretrain.model.precision import matmul_dtype

POSITION_LIMIT = 2**16
# What takes keys of other documents out, before the scale: far more than scores ever differ by. No
# larger, because kernels may subtract such scores from each other, whose rounding (here about 1)
# must not overflow exp.
DOCUMENT_WALL = 2.0**20


class Bloom(nn.Module):
    """A BLOOM language model. `activation_checkpointing` keeps only the inputs of the blocks.

    With `end_of_text`, the id of the token that ends a document and belongs to it, a token attends
    only to its own document. The loss remains BLOOM's: where a document ends, the target is the
    first token of the next, one such target a document. ValueError if the vocabulary has no such
    id.
    """

    def __init__(
        self,
        config: BloomModel,
        activation_checkpointing: bool = False,
        end_of_text: int | None = None,
    ) -> None:
        super().__init__()
        self.transformer = Trunk(config, activation_checkpointing, end_of_text)
        self.lm_head = Head(self.transformer.word_embeddings)

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """Sum over all tokens of the negative log likelihood of `targets_bt` (fp32 scalar); the
        logits_btv without targets."""
        return self.lm_head(self.transformer(tokens_bt), targets_bt)

    def logits(self, tokens_bt: Tensor) -> Tensor:
        """logits_btv, for inference."""
        return self(tokens_bt)


class Trunk(nn.Module):
    """All but the head: tokens_bt -> hidden_bth."""

    def __init__(
        self, config: BloomModel, activation_checkpointing: bool, end_of_text: int | None
    ) -> None:
        super().__init__()
        if end_of_text is not None and not 0 <= end_of_text < config.vocab_size:
            raise ValueError(f"end_of_text = {end_of_text}: ids end at {config.vocab_size - 1}")
        hidden, epsilon = config.hidden_size, config.layernorm_epsilon
        std = config.init_std or math.sqrt(1 / (3 * hidden))
        self.heads, self.head_dim = config.heads, hidden // config.heads
        self.activation_checkpointing = activation_checkpointing
        self.end_of_text = end_of_text
        self.dropout = config.dropout
        self.word_embeddings = Embedding(config.vocab_size, hidden, std)
        self.word_embeddings_layernorm = nn.LayerNorm(hidden, epsilon)
        self.h = nn.ModuleList(Block(config, std) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(hidden, epsilon)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x_bth = self.word_embeddings_layernorm(self.word_embeddings(tokens_bt))
        # BLOOM's training drops here too; its released model code no longer does.
        x_bth = F.dropout(x_bth, self.dropout, self.training)
        # Made here and not kept as a buffer: DeepSpeed would cast a buffer to bf16.
        columns_btnse = attention_columns(
            tokens_bt, self.heads, self.head_dim, matmul_dtype(x_bth), self.end_of_text
        )
        for block in self.h:
            if self.activation_checkpointing and self.training:
                x_bth = checkpoint(block, x_bth, columns_btnse, use_reentrant=False)
            else:
                x_bth = block(x_bth, columns_btnse)
        return self.ln_f(x_bth)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and, with `residual`, around a skip connection."""

    def __init__(self, config: BloomModel, std: float) -> None:
        super().__init__()
        hidden, epsilon = config.hidden_size, config.layernorm_epsilon
        self.residual = config.residual
        out_std = std / math.sqrt(2 * config.layers)
        self.input_layernorm = nn.LayerNorm(hidden, epsilon)
        self.self_attention = Attention(config, std, out_std)
        self.post_attention_layernorm = nn.LayerNorm(hidden, epsilon)
        self.mlp = Mlp(config, std, out_std)

    def forward(self, x_bth: Tensor, columns_btnse: Tensor) -> Tensor:
        attended_bth = self.self_attention(self.input_layernorm(x_bth), columns_btnse)
        x_bth = x_bth + attended_bth if self.residual else attended_bth
        mlp_bth = self.mlp(self.post_attention_layernorm(x_bth))
        return x_bth + mlp_bth if self.residual else mlp_bth


class Attention(nn.Module):
    """Causal attention; query, key and value of a head lie side by side in the fused product."""

    def __init__(self, config: BloomModel, std: float, out_std: float) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.hidden_size // config.heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size, std)
        self.dense = Linear(config.hidden_size, config.hidden_size, out_std)
        self.dropout = config.dropout

    def forward(self, x_bth: Tensor, columns_btnse: Tensor) -> Tensor:
        batch, length, hidden = x_bth.shape
        qkv_btnsd = self.query_key_value(x_bth).view(batch, length, self.heads, 3, self.head_dim)
        # The columns may be fp32 where the model is bf16 (see matmul_dtype): cat then promotes.
        qkv_btnse = torch.cat([qkv_btnsd, columns_btnse], dim=-1)
        query_bnte, key_bnte, value_bnte = qkv_btnse.transpose(1, 2).unbind(3)
        mixed_bnte = F.scaled_dot_product_attention(
            query_bnte,
            key_bnte,
            value_bnte,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.head_dim**-0.5,
        )
        mixed_btnd = mixed_bnte[..., : self.head_dim].transpose(1, 2)
        mixed_bth = mixed_btnd.to(x_bth.dtype).reshape(batch, length, hidden)
        return F.dropout(self.dense(mixed_bth), self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, config: BloomModel, std: float, out_std: float) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 4 * config.hidden_size, std)
        self.dense_4h_to_h = Linear(4 * config.hidden_size, config.hidden_size, out_std)
        self.dropout = config.dropout

    def forward(self, x_bth: Tensor) -> Tensor:
        inner = F.gelu(self.dense_h_to_4h(x_bth), approximate="tanh")
        return F.dropout(self.dense_4h_to_h(inner), self.dropout, self.training)


class Head(nn.Module):
    """The tied head: holds the embedding's parameter as its own, so that ZeRO-3 gathers it here."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, hidden_bth: Tensor, targets_bt: Tensor | None) -> Tensor:
        if targets_bt is None:
            return linear(hidden_bth, self.weight, None)
        return nll_sum(hidden_bth.flatten(0, 1), self.weight, targets_bt.flatten())


class Embedding(nn.Embedding):
    """An embedding drawn from N(0, std)."""

    def __init__(self, rows: int, columns: int, std: float) -> None:
        self.std = std
        super().__init__(rows, columns)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std)


class Linear(nn.Linear):
    """A linear map drawn from N(0, std), with bias 0."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _draw(weight: Tensor, std: float) -> None:
    """Fill with N(0, std), drawn in fp32: a model that `zero.Init` makes in bf16 starts from the
    rounded weights of the fp32 one, whatever the stage."""
    with torch.no_grad():
        weight.copy_(torch.normal(0.0, std, weight.shape, device=weight.device))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, by way of fp32 where `matmul_dtype` says so."""
    if matmul_dtype(x) is x.dtype:
        return F.linear(x, weight, bias)
    return _LinearThroughFp32.apply(x, weight, bias)


class _LinearThroughFp32(torch.autograd.Function):
    """Keeps the narrow input and the parameter itself, not fp32 copies: half the memory, and under
    ZeRO-3 the parameter is empty until its module's backward hook gathers it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad_output.float()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(x.dtype) if needs_x else None,
            (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None,
            rows.sum(0).to(weight.dtype) if needs_bias else None,
        )


def alibi_slopes(heads: int) -> list[float]:
    """Slope of each head (arXiv 2108.12409, section 3); if `heads` is no power of two, those of
    the power below, then every second one of the power above."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def attention_columns(
    tokens_bt: Tensor, heads: int, head_dim: int, dtype: torch.dtype, end_of_text: int | None
) -> Tensor:
    """Columns columns_btnse for q, k, v: those of ALiBi and, with `end_of_text`, some that keep
    attention inside each document.

    Documents of a window are numbered in binary, with a column for each bit: query columns hold
    -DOCUMENT_WALL * bit, key columns 1 - bit. Inside a document each of these products is exactly
    0; an earlier document, whose number is smaller, lacks at least one bit of the query's, and its
    weight underflows to exactly 0. Later ones are left to the kernels' causality. So the kernels
    without a mask serve here too, and the position of a document changes nothing else.
    """
    batch, length = tokens_bt.shape
    bits = 0 if end_of_text is None else max(1, (length - 1).bit_length())
    columns_tnse = alibi_columns(length, heads, head_dim, tokens_bt.device, spare=bits).to(dtype)
    columns_btnse = columns_tnse.expand(batch, *columns_tnse.shape)
    if end_of_text is None:
        return columns_btnse
    ends_bt = (tokens_bt == end_of_text).long()
    document_bt = ends_bt.cumsum(1) - ends_bt
    bit_m = torch.arange(bits, device=tokens_bt.device)
    bits_btnm = (document_bt[:, :, None, None] >> bit_m & 1).to(dtype)
    columns_btnse = columns_btnse.clone()
    columns_btnse[:, :, :, 0, -bits:] = -DOCUMENT_WALL * bits_btnm
    columns_btnse[:, :, :, 1, -bits:] = 1 - bits_btnm
    return columns_btnse


def alibi_columns(
    length: int, heads: int, head_dim: int, device: torch.device, spare: int = 0
) -> Tensor:
    """Columns columns_tnse for q, k, v that make q . k / sqrt(head_dim) include slope * position.

    Softmax ignores what all keys of a query share, so this equals ALiBi, without a t x t mask and
    with the kernels' own causality. Slope and position enter as sums of bf16 numbers, one column
    per pair, so that bf16 (or TF32) products are exact. Zeros fill up to a multiple of 8, as the
    kernels want, also for the values: kernels need one head dimension for all three. The last
    `spare` columns (or more) are zeros, for the caller.
    """
    if length > POSITION_LIMIT:
        raise ValueError(f"{length} positions; ALiBi columns are exact up to {POSITION_LIMIT}")
    slopes = torch.tensor(alibi_slopes(heads), device=device) * math.sqrt(head_dim)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    pairs = list(product(_bf16_parts(slopes, SLOPE_PARTS), _bf16_parts(positions, POSITION_PARTS)))
    width = len(pairs) + spare
    width += -(head_dim + width) % 8
    columns_tnse = torch.zeros(length, heads, 3, width, device=device)
    for column, (slope_n, position_t) in enumerate(pairs):
        columns_tnse[:, :, 0, column] = slope_n
        columns_tnse[:, :, 1, column] = position_t[:, None]
    return columns_tnse


def _bf16_parts(x: Tensor, count: int) -> list[Tensor]:
    """fp32 tensors of bf16 numbers that sum to x: three hold any fp32, two an integer < 2^16."""
    parts = []
    for _ in range(count):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts
