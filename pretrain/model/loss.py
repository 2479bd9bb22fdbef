"""Negative log likelihood of the next token without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.memory import ACCELERATOR_SLICE_BYTES, CPU_SLICE_BYTES
from pretrain.model.precision import matmul_dtype


def nll_sum(hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor) -> Tensor:
    """Sum over n of -log softmax(hidden weight^T)[n, targets_n]: an fp32 scalar.

    The gradients are computed slice by slice in the forward pass, while the logits are there, and
    only scaled in the backward pass; neither logits nor `weight_vh` are kept for it (under ZeRO-3
    the weight is gone by then). Logits under bf16 are raised to fp32 before the softmax.
    """
    return _NllSum.apply(hidden_nh, weight_vh, targets_n, torch.is_grad_enabled())


class _NllSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, with_gradients: bool
    ) -> Tensor:
        dtype = matmul_dtype(hidden_nh)
        hidden, weight = hidden_nh.to(dtype), weight_vh.to(dtype)
        ctx.dtypes = hidden_nh.dtype, weight_vh.dtype
        ctx.hidden_grad = ctx.weight_grad = None
        if with_gradients and ctx.needs_input_grad[0]:
            ctx.hidden_grad = torch.empty_like(hidden, dtype=torch.float32)
        if with_gradients and ctx.needs_input_grad[1]:
            ctx.weight_grad = torch.zeros_like(weight, dtype=torch.float32)

        on_cpu = hidden.device.type == "cpu"
        slice_bytes = CPU_SLICE_BYTES if on_cpu else ACCELERATOR_SLICE_BYTES
        rows = min(len(hidden), max(1, slice_bytes // (4 * len(weight))))
        buffer = hidden.new_empty(rows, len(weight))
        nll = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            nll += _slice_nll(
                hidden[part],
                weight,
                targets_n[part],
                buffer[: len(hidden[part])],
                None if ctx.hidden_grad is None else ctx.hidden_grad[part],
                ctx.weight_grad,
            )
        return nll.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dtypes is None:
            raise RuntimeError("the gradients of nll_sum were used up by an earlier backward pass")
        grads = [
            None if grad is None else grad.mul_(grad_output).to(dtype)
            for grad, dtype in zip((ctx.hidden_grad, ctx.weight_grad), ctx.dtypes, strict=True)
        ]
        ctx.hidden_grad = ctx.weight_grad = ctx.dtypes = None
        return *grads, None, None


def _slice_nll(
    hidden_rh: Tensor,
    weight_vh: Tensor,
    targets_r: Tensor,
    buffer_rv: Tensor,
    hidden_grad_rh: Tensor | None,
    weight_grad_vh: Tensor | None,
) -> Tensor:
    """Summed nll of r rows; writes the gradient of the rows and adds to that of the weight.

    d nll / d logits = softmax - onehot. The one-hot part is taken from and added to single rows,
    and the softmax's denominator is applied to r x h, not r x v numbers.
    """
    scores_rv = torch.mm(hidden_rh, weight_vh.t(), out=buffer_rv).float()
    largest_r1 = scores_rv.amax(1, keepdim=True)
    target_r1 = scores_rv.gather(1, targets_r[:, None])
    scores_rv.sub_(largest_r1).exp_()
    total_r1 = scores_rv.sum(1, keepdim=True)
    nll_r1 = total_r1.log() + largest_r1 - target_r1
    scores_rv = scores_rv.to(weight_vh.dtype)
    if hidden_grad_rh is not None:
        hidden_grad_rh.copy_(scores_rv @ weight_vh).div_(total_r1).sub_(weight_vh[targets_r])
    if weight_grad_vh is not None:
        scaled_rh = (hidden_rh / total_r1).to(weight_vh.dtype)
        if weight_vh.dtype is torch.float32:
            weight_grad_vh.addmm_(scores_rv.t(), scaled_rh)
        else:
            weight_grad_vh.add_(scores_rv.t() @ scaled_rh)
        weight_grad_vh.index_add_(0, targets_r, hidden_rh.float(), alpha=-1)
    return nll_r1.sum(dtype=torch.float64)
