"""A run that is asked to make way by SIGUSR1, SIGTERM or Ctrl-C: it saves a checkpoint after the
step under way and ends with code 75, so that whoever started it knows to start it again.

Slurm sends the signal some minutes before a job's limit, or when the job is preempted; torchrun,
docker and schedulers of other kinds send SIGTERM.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
_AGAIN_SECONDS = {signal.SIGTERM: 5.0, signal.SIGINT: 1.0}
_asked_at: dict[str, float] = {}


class StopAsked(Exception):
    """Asked to make way before there was anything to save."""


@contextmanager
def listening() -> Iterator[None]:
    """Remember these signals inside, rather than die of them; to be entered before anything that
    takes time. A second SIGTERM or Ctrl-C, some seconds later, ends the process.

    From its end on they do nothing: one that came while Python shuts down, or that Slurm sends
    because another rank has ended already, would end it with the code of a failure.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _remember)
    try:
        yield
    finally:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # which holds longer than a handler of ours
        signal.signal(signal.SIGINT, signal.default_int_handler)


def asked_by() -> str | None:
    """The signal that has asked this process to stop, if one has."""
    return next(iter(_asked_at), None)


def _remember(number: int, _: object) -> None:
    now, name = time.monotonic(), signal.Signals(number).name
    first = _asked_at.setdefault(name, now)
    # A launcher and a scheduler may both pass on the same one.
    if number in _AGAIN_SECONDS and now > first + _AGAIN_SECONDS[signal.Signals(number)]:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
        signal.raise_signal(number)
    elif number == signal.SIGINT and now == first and sys.stderr.isatty():
        print("stopping after this step; Ctrl-C again ends it at once", file=sys.stderr, flush=True)
