"""Element-wise rules in one pass over memory.

A rule is written once, for single numbers: `def rule(xp)` returns a function of one element of each
tensor and of scalars, in terms of the module `xp`. On a CPU numba compiles it (no compiler needed,
half a second once a process); elsewhere torch computes it block by block. Rules have no literals,
which would make 32-bit arithmetic 64-bit.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rule = Callable[[Any], Callable[..., Any]]
_SERIAL_ELEMENTS = 2**15  # below this a thread costs more than it saves
_BLOCK_ELEMENTS = 2**24  # bounds the temporaries where torch computes


def apply(
    rule: Rule, tensors: Sequence[Tensor], scalars: Sequence[float | Tensor], writes: Sequence[int]
) -> None:
    """Compute `rule` for each element of the 1-D `tensors`, which are alike in length and type.

    Its results are written to the tensors with the numbers `writes`. A scalar may be a tensor of
    one element, which is not waited for on an accelerator.
    """
    if tensors[0].device.type == "cpu":
        _apply_on_cpu(rule, tensors, scalars, tuple(writes))
        return
    function = _of_torch(rule)
    for blocks in zip(*(tensor.split(_BLOCK_ELEMENTS) for tensor in tensors), strict=True):
        results = function(*blocks, *scalars)
        for number, result in zip(writes, results, strict=True):
            blocks[number].copy_(result)


def _apply_on_cpu(
    rule: Rule,
    tensors: Sequence[Tensor],
    scalars: Sequence[float | Tensor],
    writes: tuple[int, ...],
) -> None:
    arrays = [tensor.detach().numpy() for tensor in tensors]
    number = arrays[0].dtype.type
    values = [number(float(scalar)) for scalar in scalars]
    kernel = _compiled(rule, len(arrays), len(values), writes)
    length, threads = len(arrays[0]), torch.get_num_threads()
    if length < _SERIAL_ELEMENTS or threads == 1:
        kernel(*arrays, *values)
        return
    # A multiple of 16 elements, so that no two threads write to one cache line.
    share = -(-length // (16 * threads)) * 16

    def work(first: int) -> None:
        kernel(*(array[first : first + share] for array in arrays), *values)

    list(_threads(threads, os.getpid()).map(work, range(0, length, share)))


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of the one it was forked from are not there."""
    return ThreadPoolExecutor(count, thread_name_prefix="rule")


@cache
def _of_torch(rule: Rule) -> Callable[..., Any]:
    return rule(torch)


@cache
def _compiled(rule: Rule, tensors: int, scalars: int, writes: tuple[int, ...]) -> Any:
    """The loop over elements, compiled at its first call; it runs without Python's lock."""
    import numba  # takes a fifth of a second

    arrays = [f"tensor{number}" for number in range(tensors)]
    values = [f"scalar{number}" for number in range(scalars)]
    results = "".join(f"{arrays[number]}[i], " for number in writes)
    source = (
        f"def loop({', '.join(arrays + values)}):\n"
        "    for i in range(tensor0.shape[0]):\n"
        f"        {results} = rule({', '.join([f'{a}[i]' for a in arrays] + values)})\n"
    )
    # numba has no loop over a varying number of arrays, so the loop is written out as text.
    namespace: dict[str, Any] = {"rule": numba.njit(rule(np))}
    exec(source, namespace)
    # No fastmath: it gains nothing where memory is the limit, and plain IEEE arithmetic gives the
    # same bits on every machine and in every cut of a tensor.
    return numba.njit(namespace["loop"], nogil=True)
