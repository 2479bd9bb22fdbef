"""Errors that a user can cause and mend: shown as text with a cure, never as a traceback."""

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One finding about a config: where, what was found, which rule it breaks, what to do."""

    key: str
    found: object
    rule: str
    cure: str

    def __str__(self) -> str:
        found = repr(self.found)
        if len(found) > 80:
            found = found[:77] + "..."
        return f"  {self.key} = {found}\n      rule: {self.rule}\n      cure: {self.cure}"


class UserError(Exception):
    """Base of all errors that end a command with exit code 2 and no traceback."""


def exit_code(work: Callable[[], int | None], interrupted: str) -> int:
    """What a command returns: that of `work` (None is 0), 2 for what the user can mend, 130 for
    Ctrl-C, each said on standard error."""
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


class ConfigError(UserError):
    """All problems of one config, reported together."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{source}: {count}\n" + "\n".join(str(p) for p in problems))


class DataError(UserError):
    """A corpus file that is absent, damaged or does not fit the run."""


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or belongs to other data."""


class DivergenceError(UserError):
    """Training produced numbers that are not finite more often than the guard allows."""
