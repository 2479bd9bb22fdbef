"""Real ranks for tests: processes with a gloo group between them.

They are forked from a server that has imported torch and DeepSpeed once, so a rank starts at once.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before the server imports DeepSpeed
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["deepspeed", "deepspeed.runtime.zero.muon.original_muon", "pretrain.train", "tests.warm"]
)
TIMEOUT_SECONDS = 240


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on each of `world_size` ranks; their results by rank."""
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank_main, args=(rank, world_size, port, sender, function, arguments)
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results, failures = [None] * world_size, []
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(TIMEOUT_SECONDS):
                raise EOFError("no answer in time")
            fine, results[rank] = pipe.recv()
            if not fine:
                failures.append(f"rank {rank}:\n{results[rank]}")
        except EOFError as error:
            failures.append(f"rank {rank} died: {error}")
        if failures:
            break
    for process in processes:
        if failures:
            process.kill()
        process.join(TIMEOUT_SECONDS)
    assert not failures, "\n".join(failures)
    assert [process.exitcode for process in processes] == [0] * world_size
    return results


def run_worker(
    arguments: list[str], module: str = "pretrain.train", folder: str | None = None
) -> tuple[int, str]:
    """`main(ARGUMENTS)` of a module as one process, in `folder`: (exit code, all it printed)."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = start_single(_worker_main, sender, arguments, module, folder)
    sender.close()
    assert receiver.poll(TIMEOUT_SECONDS), "no answer in time"
    answer = receiver.recv()
    process.join(TIMEOUT_SECONDS)
    return answer


def start_single(function: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """`function(*arguments)` in a process of its own, to be killed by the test."""
    process = _CONTEXT.Process(target=_single_main, args=(function, arguments))
    process.start()
    return process


def _rank_main(rank, world_size, port, pipe, function, arguments):
    import torch

    from pretrain.engine.world import join_world

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        with join_world(120) as world:
            result = function(world, *arguments)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _single_main(function, arguments):
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def _worker_main(pipe, arguments, module, folder):
    main = importlib.import_module(module).main
    if folder:
        os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(arguments)
        except BaseException:
            code = 1
            traceback.print_exc()
    pipe.send((code, output.getvalue()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
