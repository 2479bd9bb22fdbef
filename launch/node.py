"""`python -m launch.node COMMAND ...`: a command whose life hangs on this process's standard input.

It runs on a node, under ssh or beside the launch. A line "stop" asks the ranks that the command has
started to save and make way; the end of the input (the launch is gone, or the network) ends all of
it. So nothing is left behind on a node, whatever ends first. `--after` is for what the command does
not take with it when it ends: containers of a daemon.
"""

import ctypes
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

GRACE_SECONDS = 30.0
_REPORT_SECONDS = 2.0  # for launchers to see by themselves that their ranks have ended
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code, 128 + N where signal N ended it."""
    command = sys.argv[1:] if arguments is None else arguments
    after: list[str] = []
    if command[:1] == ["--after"] and "--" in command:
        end = command.index("--")
        after, command = command[1:end], command[end + 1 :]
    if not command:
        print("error: python -m launch.node [--after COMMAND ... --] COMMAND ...", file=sys.stderr)
        return 2
    _adopt_orphans()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGUSR1, lambda *_: _aside(stop))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the launch decides
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _aside(_end_all))
    _aside(_listen)
    code = process.wait()
    for left in _descendants():
        with suppress(psutil.NoSuchProcess):
            left.kill()
    if after:
        subprocess.run(after, stdin=subprocess.DEVNULL, capture_output=True)
    return code if code >= 0 else 128 - code


def stop() -> None:
    """Ask the ranks among this process's descendants to save and make way, past launchers that
    would not wait for them, and then end those, or they might start the ranks again; where there
    are no ranks yet, ask all."""
    everyone = _descendants()
    ranks = [process for process in everyone if _is_rank(process)]
    for process in ranks or everyone:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1 if ranks else signal.SIGTERM)
    if ranks:
        _await_end(ranks)
        time.sleep(_REPORT_SECONDS)
        _end_all()


def _aside(work: Callable[[], None]) -> None:
    """`work` in a thread, since the main one waits for the command."""
    threading.Thread(target=work, daemon=True).start()


def _listen() -> None:
    for line in sys.stdin:
        if line.strip() == "stop":
            _aside(stop)
    _end_all()


def _end_all() -> None:
    """SIGTERM to all descendants, and SIGKILL to those that do not end."""
    everyone = _descendants()
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _await_end(everyone, GRACE_SECONDS)
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _await_end(processes: list[psutil.Process], seconds: float = math.inf) -> None:
    """Until they have ended. By looking: psutil would take the exit code of the command away."""
    deadline = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is_rank(process: psutil.Process) -> bool:
    """Whether a process is a worker, with a rank or alone; what launches it names it too."""
    try:
        line = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    try:
        return line[line.index("-m") + 1] == "pretrain"
    except (ValueError, IndexError):
        return False


def _adopt_orphans() -> None:
    """Processes whose parent dies become children of this one, so that none gets away."""
    with suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


if __name__ == "__main__":
    sys.exit(main())
