"""A user's own optimizer, which has to be element-wise: ZeRO hands it shards, not parameters."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.config_optim import OwnOptimizer
from pretrain.errors import UserError
from pretrain.optim.shards import Shards

_ELEMENTS, _CUT, _STEPS, _RATE = 96, 40, 3, 1e-2


def build_own(shards: Shards, config: OwnOptimizer) -> torch.optim.Optimizer:
    """The optimizer that `config.name` names, on the masters."""
    return _maker(config)(shards.groups())


def check_own(config: OwnOptimizer) -> None:
    """Raise UserError where the optimizer cannot be made, or is not element-wise: some steps on the
    parts of a tensor have to give what they give on the whole, bit by bit but for rounding."""
    make = _maker(config)
    generator = torch.Generator().manual_seed(0)
    # Parts of very different size, so that a norm or mean over the whole would show.
    scale = torch.ones(_ELEMENTS)
    scale[_CUT:] = 100.0
    weights = torch.randn(_ELEMENTS, generator=generator) * scale
    gradients = [torch.randn(_ELEMENTS, generator=generator) * scale for _ in range(_STEPS)]
    whole = _stepped(config, make, weights, gradients)
    parts = [
        _stepped(config, make, weights[span], [gradient[span] for gradient in gradients])
        for span in (slice(None, _CUT), slice(_CUT, None))
    ]
    difference = (torch.cat(parts) - whole).abs() / scale
    if not difference.max() <= 1e-6:
        raise UserError(
            f"optimizer.name = {config.name!r}: a step on a part of a tensor differs from one on "
            f"the whole by {difference.max():.2g}\n"
            "  rule: under ZeRO an optimizer sees shards, so it has to treat each element by "
            "itself (no norms, means or matrices of a parameter), and in the same way each time\n"
            "  cure: use one of the optimizers that come with this program for such methods, or "
            "write it on `pretrain.optim.base.ShardedOptimizer`"
        )


def _stepped(
    config: OwnOptimizer,
    make: Callable[[Any], torch.optim.Optimizer],
    weights: Tensor,
    gradients: list[Tensor],
) -> Tensor:
    """`weights` after a step with each of the gradients."""
    parameter = weights.clone()
    optimizer = make([{"params": [parameter], "role": "matrix"}])
    for group in optimizer.param_groups:
        group["lr"] = _RATE
    with torch.no_grad():
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    for key, value in optimizer.state[parameter].items():
        if torch.is_tensor(value) and value.numel() > 1 and value.shape != parameter.shape:
            raise UserError(
                f"optimizer.name = {config.name!r}: its state {key!r} has shape "
                f"{list(value.shape)}\n"
                f"  rule: states have the shape of the parameter ({list(parameter.shape)} here) or "
                "are one number, so that a checkpoint can be read by other ranks\n"
                "  cure: use an optimizer without such a state"
            )
    return parameter


def _maker(config: OwnOptimizer) -> Callable[[Any], torch.optim.Optimizer]:
    """Makes the optimizer of parameter groups; UserError where it cannot be found or made."""
    module_name, _, class_name = config.name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` would
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optimizer.name = {config.name!r}: {error}\n"
            '  rule: "module:Class", the module found from the working directory or installed\n'
            "  cure: check both names, or set PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(
            f"optimizer.name = {config.name!r} is no torch.optim.Optimizer\n"
            "  rule: a class derived from it\n  cure: derive it"
        )

    def make(groups: Any) -> torch.optim.Optimizer:
        try:
            optimizer = found(groups, **config.options)
            if hasattr(optimizer, "train"):  # Schedule-Free ones begin in neither mode
                optimizer.train()
            return optimizer
        except (TypeError, ValueError) as error:
            raise UserError(
                f"optimizer.name = {config.name!r}: {error}\n"
                "  rule: it is called with parameter groups and optimizer.options\n"
                "  cure: mend optimizer.options"
            ) from None

    return make
