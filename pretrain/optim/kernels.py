"""Element-wise rules in one pass over memory.

A rule is written once, for single numbers: `def rule(xp)` returns a function of one element of each
tensor and of scalars, in terms of the module `xp`. On a CPU numba compiles it (no compiler needed,
half a second once a process); elsewhere torch computes it block by block. Rules have no literals,
which would make 32-bit arithmetic 64-bit.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rule = Callable[[Any], Callable[..., Any]]
_PIECE_ELEMENTS = 2**18  # of a kernel's call: large against the cost of calling it
_BLOCK_ELEMENTS = 2**24  # bounds the temporaries where torch computes


Job = tuple[Sequence[Tensor], Sequence[float | Tensor]]  # tensors and scalars of a rule


def apply(
    rule: Rule, tensors: Sequence[Tensor], scalars: Sequence[float | Tensor], writes: Sequence[int]
) -> None:
    """Compute `rule` for each element of the 1-D `tensors`, which are alike in length and type.

    Its results are written to the tensors with the numbers `writes`. A scalar may be a tensor of
    one element, which is not waited for on an accelerator.
    """
    apply_to_all(rule, [(tensors, scalars)], writes)


def apply_to_all(
    rule: Rule, jobs: Sequence[Job], writes: Sequence[int], squares: Sequence[int] = ()
) -> Tensor:
    """`apply` for each of `jobs`; returns the sums of squares, after it, of the tensors with the
    numbers `squares`: float64 of shape (jobs, squares), whatever the number of threads."""
    if not jobs:
        return torch.zeros(0, len(squares), dtype=torch.float64)
    compute = _on_cpu if jobs[0][0][0].device.type == "cpu" else _by_torch
    return compute(rule, jobs, tuple(writes), tuple(squares))


def _by_torch(
    rule: Rule, jobs: Sequence[Job], writes: tuple[int, ...], squares: tuple[int, ...]
) -> Tensor:
    function, found = rule(torch), []
    for tensors, scalars in jobs:
        for blocks in zip(*(tensor.split(_BLOCK_ELEMENTS) for tensor in tensors), strict=True):
            results = function(*blocks, *scalars)
            for number, result in zip(writes, results, strict=True):
                blocks[number].copy_(result)
        found += [tensors[number].norm().double().square() for number in squares]
    if not found:
        return torch.zeros(len(jobs), 0, dtype=torch.float64, device=jobs[0][0][0].device)
    return torch.stack(found).view(len(jobs), len(squares))


def _on_cpu(
    rule: Rule, jobs: Sequence[Job], writes: tuple[int, ...], squares: tuple[int, ...]
) -> Tensor:
    number = jobs[0][0][0].detach().numpy().dtype.type
    work = [
        ([tensor.detach().numpy() for tensor in tensors], [number(float(s)) for s in scalars])
        for tensors, scalars in jobs
    ]
    kernel = _compiled(rule, len(work[0][0]), len(work[0][1]), writes, squares)
    pieces = [
        (job, first)
        for job, (arrays, _) in enumerate(work)
        for first in range(0, len(arrays[0]), _PIECE_ELEMENTS)
    ]
    sums = np.zeros((len(pieces), len(squares)))

    def run(todo: Iterator[int]) -> None:
        for piece in todo:  # shared by the threads: each takes the next
            job, first = pieces[piece]
            arrays, values = work[job]
            found = kernel(*(a[first : first + _PIECE_ELEMENTS] for a in arrays), *values)
            if squares:
                sums[piece] = found

    threads, todo = min(torch.get_num_threads(), len(pieces)), iter(range(len(pieces)))
    if threads < 2:
        run(todo)
    else:
        list(_threads(threads, os.getpid()).map(run, [todo] * threads))
    totals = torch.zeros(len(jobs), len(squares), dtype=torch.float64)
    if squares:
        owners = torch.tensor([job for job, _ in pieces])
        totals.index_add_(0, owners, torch.from_numpy(sums))
    return totals


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of the one it was forked from are not there."""
    return ThreadPoolExecutor(count, thread_name_prefix="rule")


@cache
def _compiled(
    rule: Rule, tensors: int, scalars: int, writes: tuple[int, ...], squares: tuple[int, ...]
) -> Any:
    """The loop over elements, compiled at its first call; it runs without Python's lock."""
    import numba  # takes a fifth of a second

    arrays = [f"tensor{number}" for number in range(tensors)]
    values = [f"scalar{number}" for number in range(scalars)]
    lines = [f"def loop({', '.join(arrays + values)}):"]
    lines += [f"    square{number} = 0.0" for number in squares]
    lines += ["    for i in range(tensor0.shape[0]):"]
    results = "".join(f"{arrays[number]}[i], " for number in writes)
    call = f"rule({', '.join([f'{array}[i]' for array in arrays] + values)})"
    lines += [f"        {results} = {call}" if writes else "        pass"]
    for number in squares:
        lines += [f"        wide = float64({arrays[number]}[i])"]
        lines += [f"        square{number} += wide * wide"]
    lines += [f"    return {''.join(f'square{number}, ' for number in squares)}" if squares else ""]
    # numba has no loop over a varying number of arrays, so the loop is written out as text. To use
    # wide registers, division is the hardware's and sums of squares may be reordered; the rule
    # itself is computed strictly.
    strict = numba.njit(rule(np), error_model="numpy")
    namespace: dict[str, Any] = {"rule": strict, "float64": np.float64}
    exec("\n".join(lines), namespace)
    return numba.njit(namespace["loop"], nogil=True, error_model="numpy", fastmath={"reassoc"})
