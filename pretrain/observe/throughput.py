"""Speed: tokens a second, and how much of the machine's matrix-product speed the model uses."""

import time

import torch

from pretrain.config import BloomModel, HfModel
from pretrain.sizes import model_flops_per_token


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOPs a second of a square matrix product on one device, the best of several tries."""
    size = 4096 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best, deadline = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def flops_per_token(model: BloomModel | HfModel, parameters: int, sequence_length: int) -> float:
    """FLOPs of forward and backward a token: exact for BLOOM, 6 N for other architectures."""
    if isinstance(model, BloomModel):
        return model_flops_per_token(model, sequence_length)
    return 6.0 * parameters
