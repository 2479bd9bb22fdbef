"""Processes that turn chunks of text into token ids."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pretrain.errors import DataError
from tokenizer.folder import Loaded, load

_worker: Loaded
T = TypeVar("T")


def start_pool(workers: int, tokenizer_dir: Path) -> ProcessPoolExecutor:
    """`workers` processes, each with the tokenizer; for `in_order`."""
    # A fork would copy locks that threads hold. The folder goes over, not the tokenizer: Python
    # waits for ever to hand more than a pipe holds to a process that dies as it starts.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer_dir,))


def in_order(
    pool: ProcessPoolExecutor, chunks: Iterator[tuple[list[str], T]], ahead: int
) -> Iterator[tuple[np.ndarray, np.ndarray, T]]:
    """For each (texts, tag): (ids of all texts, each ended; int32 lengths; tag), in order.

    At most `ahead` chunks are under way. Raises DataError if a worker dies.
    """
    waiting: deque[tuple[Future[Any], T]] = deque()
    try:
        for texts, tag in chunks:
            waiting.append((pool.submit(_encode, texts), tag))
            while len(waiting) > ahead or (waiting and waiting[0][0].done()):
                future, done = waiting.popleft()
                yield *future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield *future.result(), done
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, most likely for want of memory\n      rule: each worker needs "
            "memory for its largest document\n      cure: fewer with --workers; the same command "
            "goes on where it was"
        ) from None


def _start_worker(tokenizer_dir: Path) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what to do
    _worker = load(tokenizer_dir)
    # A worker waits for tasks on a pipe whose other end it holds too, so that a killed parent would
    # go unnoticed.
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    tokenizer, end_of_text, _, vocab_size = _worker
    ids: list[int] = []
    ends = np.empty(len(texts), np.int64)
    for k, encoding in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
        ids += encoding.ids
        ids.append(end_of_text)
        ends[k] = len(ids)
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    return np.array(ids, dtype), np.diff(ends, prepend=0).astype(np.int32)
