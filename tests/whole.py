"""Optimizers on whole parameters in one process, without ZeRO: the reference that shards must meet,
and what parity with other libraries is measured on."""

import torch

from pretrain.engine.world import World
from pretrain.optim.groups import fused_matrices, parameter_roles
from pretrain.optim.registry import build_optimizer
from pretrain.optim.shards import Place, Shards

ALONE = World(0, 1, torch.device("cpu"))


class WholeOptimizer:
    """Our optimizer of `section` on named tensors, each of them whole in a buffer of its own.

    `roles` by name; default: matrix for two dimensions and more, else norm.
    """

    def __init__(self, section, parameters, roles=None, matrices=None):
        self.section, self.parameters = section, parameters
        roles = roles or {n: "matrix" if p.dim() > 1 else "norm" for n, p in parameters.items()}
        # Flat views: what is written to them is written to the parameters.
        masters = [parameter.detach().view(-1) for parameter in parameters.values()]
        places = [
            Place(name, parameter.shape, roles[name], 0, parameter.numel(), number, 0)
            for number, (name, parameter) in enumerate(parameters.items())
        ]
        names = list(parameters)
        self.shards = Shards(
            masters, [roles[name] for name in names], places, names, ALONE, matrices or {}
        )
        self.optimizer = build_optimizer(self.shards, section)

    def step(self, rate, weight_decay=None, betas=None):
        """A step with the gradients of the parameters, which are left as they are."""
        weight_decay = self.section.weight_decay if weight_decay is None else weight_decay
        for group in self.optimizer.param_groups:
            decayed = group["role"] in self.section.decayed_roles
            group.update(lr=rate, weight_decay=weight_decay if decayed else 0.0)
            if "betas" in group:
                group["betas"] = betas or self.section.momenta
        for master, parameter in zip(self.shards.masters, self.parameters.values(), strict=True):
            master.grad = parameter.grad.detach().clone().view(-1)
        self.optimizer.step()


def whole_optimizer_of(model, section):
    """The same on the parameters of a model."""
    return WholeOptimizer(
        section, dict(model.named_parameters()), parameter_roles(model), fused_matrices(model)
    )
