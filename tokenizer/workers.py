"""Processes that turn chunks of text into token ids."""

import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from pretrain.errors import DataError
from tokenizer.folder import Loaded, load

T = TypeVar("T")
Encoded = tuple[np.ndarray, np.ndarray]  # ids of all texts, each ended; int32 lengths


class Workers:
    """`count` processes, each with the tokenizer of a folder; a context manager.

    A thread a process asks and waits. (A ProcessPoolExecutor of Python 3.11 waits for ever where a
    process dies while a large task is on its way to it.) When this process dies, so do they.
    """

    def __init__(self, count: int, tokenizer_dir: Path) -> None:
        self._count, self._tokenizer_dir = count, tokenizer_dir
        self._idle: SimpleQueue[Connection] = SimpleQueue()

    def __enter__(self) -> "Workers":
        context = get_context("spawn")  # a fork would copy locks that threads hold
        self._processes = []
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self._tokenizer_dir), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._processes.append(process)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def in_order(
        self, chunks: Iterator[tuple[list[str], T]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, T]]:
        """For each (texts, tag): (ids of all texts, each ended; int32 lengths; tag), in order.

        Four chunks a process are under way at most. Raises DataError if a process dies.
        """
        waiting: deque[tuple[Future[Encoded], T]] = deque()
        for texts, tag in chunks:
            waiting.append((self._threads.submit(self._ask, texts), tag))
            while len(waiting) > 4 * self._count or (waiting and waiting[0][0].done()):
                future, done = waiting.popleft()
                yield *future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield *future.result(), done

    def _ask(self, texts: list[str]) -> Encoded:
        worker = self._idle.get()
        try:
            worker.send(texts)
            return worker.recv()
        except (EOFError, OSError):
            raise DataError(
                "a worker process died, most likely for want of memory\n      rule: each worker "
                "needs memory for its largest document\n      cure: fewer with --workers; the "
                "same command goes on where it was"
            ) from None
        finally:
            self._idle.put(worker)


def _serve(parent: Connection, tokenizer_dir: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what to do
    loaded = load(tokenizer_dir)
    try:
        while True:
            parent.send(_encode(loaded, parent.recv()))
    except (EOFError, OSError):
        pass  # the parent is gone


def _encode(loaded: Loaded, texts: list[str]) -> Encoded:
    tokenizer: Any = loaded.tokenizer
    ids: list[int] = []
    ends = np.empty(len(texts), np.int64)
    for k, encoding in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
        ids += encoding.ids
        ids.append(loaded.end_of_text)
        ends[k] = len(ids)
    dtype = np.uint16 if loaded.vocab_size <= 2**16 else np.int32
    return np.array(ids, dtype), np.diff(ends, prepend=0).astype(np.int32)
