"""Imported once by the server that ranks are forked from: the optimizers' kernels are compiled
there, so that not each rank has to."""

import torch

from pretrain import config_optim as sections
from tests.whole import WholeOptimizer

EVERY_OPTIMIZER = [
    sections.AdamW(),
    sections.Adam(weight_decay=0.01),
    sections.Sgd(momentum=0.0),
    sections.Sgd(weight_decay=0.01),
    sections.Sgd(nesterov=True),
    sections.Sgdw(weight_decay=0.1),
    sections.Sgdw(nesterov=True),
    sections.Adagrad(),
    sections.Adadelta(),
    sections.RmsProp(),
    sections.RmsProp(momentum=0.9),
    sections.Lion(),
    sections.AdEmaMix(warmup_steps=10),
    sections.ScheduleFreeAdamW(),
    sections.ScheduleFreeSgd(),
    sections.Lars(),
    sections.Lars(clip=True, nesterov=True),
    sections.Lamb(),
    sections.Lamb(ratio_limit=1.0, always_adapt=True),
    sections.Adafactor(),
    # SOAP's basis is arbitrary where a gradient has no rank, and there rounding is blown up to the
    # size of the rate; with these options nothing of that is left.
    sections.Soap(every_steps=3, largest_side=18, epsilon=1e-3),
    sections.Muon(precision="fp32"),
    sections.Muon(precision="fp32", nesterov=False, scale="spectral", adamw_rate=0.5),
]


def label(section: sections.OptimizerSection) -> str:
    """The name of an optimizer with the options that are not the default ones."""
    changes = section.model_dump(exclude_defaults=True)
    return ",".join([section.name, *(f"{key}={value}" for key, value in changes.items())])


def _compile_kernels() -> None:
    for section in EVERY_OPTIMIZER:
        parameters = {"matrix": torch.ones(2, 2), "vector": torch.ones(2)}
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        WholeOptimizer(section, parameters).step(0.1)


_compile_kernels()
