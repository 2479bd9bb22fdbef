"""In which precision matrix products run where the hardware has no bf16 arithmetic."""

from functools import cache

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` are computed: its own, except bf16 on a CPU that
    has no bf16 instructions. There fp32 products of the same numbers, rounded back to bf16, are
    several times faster than torch's emulation.
    """
    slow = x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _cpu_has_bf16()
    return torch.float32 if slow else x.dtype


@cache
def _cpu_has_bf16() -> bool:
    return any(present for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)
