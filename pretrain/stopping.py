"""A run that is asked to make way: by SIGUSR1 or SIGTERM it saves a checkpoint after the step under
way and ends with code 75, so that whoever started it knows that it is to be started again.

Slurm sends the signal some minutes before a job's limit, or when the job is preempted; torchrun,
docker and schedulers of other kinds send SIGTERM.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
_AGAIN_SECONDS = 5.0
_asked_at: dict[str, float] = {}


@contextmanager
def listening() -> Iterator[None]:
    """Remember these signals inside, rather than die of them; to be entered before anything that
    takes time. A second SIGTERM, some seconds later, ends the process.

    From its end on they do nothing: one that came while Python shuts down, or that Slurm sends
    because another rank has ended already, would end it with the code of a failure.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _remember)
    try:
        yield
    finally:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # which holds longer than a handler of ours


def asked_by() -> str | None:
    """The signal that has asked this process to stop, if one has."""
    return next(iter(_asked_at), None)


def _remember(number: int, _: object) -> None:
    now = time.monotonic()
    _asked_at.setdefault(signal.Signals(number).name, now)
    # A launcher and a scheduler may both pass on the same one.
    if number == signal.SIGTERM and now > _asked_at["SIGTERM"] + _AGAIN_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
