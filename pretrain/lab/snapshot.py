"""Experiments with a live engine that leave no trace: all that a step changes is put back."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.engine.zero import ZeroEngine


@contextmanager
def left_as_it_was(engine: ZeroEngine) -> Iterator[None]:
    """Steps of `engine` inside this context are undone at its end, bit by bit: masters, weights,
    optimizer states (also that there were none), settings of the parameter groups, random numbers.

    The copies lie in host memory: 12 bytes a parameter, shared among the ranks. Collective; so if
    an exception leaves the context on one of several ranks, nothing is put back: the others may be
    waiting in another collective, and all that is left to do is to end.
    """
    snapshot, fine = _Snapshot(engine), False
    try:
        yield
        fine = True
    finally:
        if fine or engine.world.size == 1:
            snapshot.restore()


class _Snapshot:
    """All that a step of `engine` changes."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._training = engine.module.training
        self._masters = [_to_host(fragment.master) for fragment in engine.fragments()]
        self._states = {
            master: {key: _to_host(value) for key, value in state.items()}
            for master, state in self._optimizer.state.items()
        }
        self._settings = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        self._random = _random_states()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; collective, since the weights are gathered from the masters."""
        self._engine.discard()
        for fragment, master in zip(self._engine.fragments(), self._masters, strict=True):
            fragment.master.copy_(master)
        self._engine.loaded({})
        self._restore_optimizer()
        self._engine.module.train(self._training)
        _restore_random_states(self._random)

    def _restore_optimizer(self) -> None:
        live = self._optimizer.state
        for master in list(live):
            if master not in self._states:
                del live[master]
        for master, saved in self._states.items():
            state = live[master]
            for key in state.keys() - saved.keys():
                del state[key]
            for key, value in saved.items():
                # In place, for DeepSpeed keeps views of the states.
                if torch.is_tensor(value) and torch.is_tensor(state.get(key)):
                    state[key].copy_(value)
                else:
                    state[key] = value
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(settings, params=parameters)


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
