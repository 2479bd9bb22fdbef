"""A run that is asked to make way: by SIGUSR1 or SIGTERM it saves a checkpoint after the step under
way and ends with code 75, so that whoever started it knows that it is to be started again.

Slurm sends the signal some minutes before a job's limit, or when the job is preempted; torchrun,
docker and schedulers of other kinds send SIGTERM.
"""

import signal
import time

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
_AGAIN_SECONDS = 5.0
_asked_at: dict[str, float] = {}


def listen() -> None:
    """From now on remember these signals, rather than die of them; to be called before anything
    that takes time. A second SIGTERM, some seconds later, ends the process."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _remember)


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
