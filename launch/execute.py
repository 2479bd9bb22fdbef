"""Carrying out a launch: all its commands at once, ended together."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from launch.job import Job
from launch.node import GRACE_SECONDS
from launch.script import LOCAL_ONLY, Command, Script, on_host
from pretrain.errors import UserError
from pretrain.stopping import STOPPED

# What those that are left have for a last report of who is missing, once one command has failed.
_FAREWELL_SECONDS = 20.0
_AGAIN_SECONDS = 3.0


def execute(script: Script, job: Job) -> int:
    """Write the files and run the commands; returns the exit code of the one that failed first, or
    0. Where one fails the others are ended, unless the script can do without it.

    SIGTERM, SIGUSR1 and Ctrl-C ask the ranks to save and make way: then the code is 75. A second
    one, some seconds later, ends them.
    """
    for path, content in script.files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}")  # other nodes may read it now
            aside.write_text(content, encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror}\n"
                "  cure: free space, fix the permissions, or set directory=... to another place"
            ) from None
    running = [_Running(command, job) for command in script.commands]
    asked = _Asked(running)
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.signal(number, asked.receive) for number in signals}
    try:
        code = _wait(running, script.least or len(running))
        # Launchers in between make 1 of a rank's 75, or are ended once their ranks are.
        made_way = asked.at is not None and (code in (STOPPED, 1) or code >= 128)
        return STOPPED if made_way else code
    finally:
        _end(running)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Running:
    """A command that has been started, here or on its host: in either case below `launch.node`,
    which hears from this process by its input."""

    def __init__(self, command: Command, job: Job) -> None:
        self.host = command.host
        environment = {name: os.environ[name] for name in LOCAL_ONLY if name in os.environ}
        if self.host is None:
            line = [sys.executable, *command.guarded]
            environment |= command.environment
        else:
            line = on_host(job, command)
        try:
            self.process = subprocess.Popen(
                line,
                env=environment,
                cwd=command.directory if self.host is None else None,
                stdin=subprocess.PIPE,
                stderr=None if self.host is None else subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the launch alone
            )
        except OSError as error:
            raise UserError(
                f"{error.filename or line[0]}: {error.strerror}\n"
                "  cure: install ssh, or check launch.directory of the profile"
            ) from None
        self._last_words = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        if self.host is not None:
            self._reader.start()

    def ask(self) -> None:
        """Ask its ranks to save and make way, wherever they run."""
        with suppress(OSError, ValueError):
            self.process.stdin.write(b"stop\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """The command is to end, wherever it runs; returns at once."""
        with suppress(OSError, ValueError):
            self.process.stdin.close()

    def code(self) -> int | None:
        """Its exit code, 128 + N where signal N ended it; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def report(self, code: int) -> None:
        """Say which command failed, where there are several."""
        if self.host is None or code == STOPPED:
            return
        text = f"error: {self.host}: ended with exit code {code}"
        if code == 255:  # ssh's own
            self._reader.join(2)
            text = (
                f"error: {self.host}: ssh: {self._last_words or 'no answer'}\n"
                "  rule: every host is reached by ssh without a password, and stays reachable\n"
                f"  cure: try `ssh {self.host} true`; without this host: --exclude {self.host}; "
                "where ssh is not allowed: --node-rank on each node, or slurm"
            )
        print(text, file=sys.stderr, flush=True)

    def _read(self) -> None:
        for line in self.process.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            self._last_words = line.decode(errors="replace").strip() or self._last_words


class _Asked:
    """What happens to signals."""

    def __init__(self, running: list[_Running]) -> None:
        self._running = running
        self.at: float | None = None

    def receive(self, number: int, _: object) -> None:
        """Pass it on; end everything at a second one."""
        now = time.monotonic()
        if self.at is None:
            self.at = now
            if number == signal.SIGINT:
                text = "stopping after this step; Ctrl-C again, in some seconds, ends it at once"
                print(text, file=sys.stderr, flush=True)
            for one in self._running:
                one.ask()
        elif now > self.at + _AGAIN_SECONDS:
            for one in self._running:
                one.end()


def _wait(running: list[_Running], least: int) -> int:
    """Until all commands have ended; the first code other than 0 that left fewer than `least`."""
    first, ended_well, deadline = 0, 0, None
    left = list(running)
    while left:
        time.sleep(0.05)
        for one in [one for one in left if one.code() is not None]:
            left.remove(one)
            if code := one.code():
                one.report(code)
                if ended_well + len(left) < least:
                    first = first or code
                    deadline = deadline or time.monotonic() + _FAREWELL_SECONDS
            else:
                ended_well += 1
        if left and deadline and time.monotonic() > deadline:
            _end(left)
    return first


def _end(running: list[_Running]) -> None:
    """All commands gone, on all hosts at the same time."""
    for one in running:
        one.end()
    deadline = time.monotonic() + GRACE_SECONDS + 5
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
