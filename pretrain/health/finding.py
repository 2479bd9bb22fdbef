"""A finding: what was looked at, what was found, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One result of a check. `found` says the rule too where it is not plain; `cure` is empty where
    all is well; no `hosts` means that it is about the run and not about some of them."""

    check: str
    level: Literal["ok", "warning", "error"]
    found: str
    cure: str = ""
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{listed(self.hosts)}: " if self.hosts else ""
        return f"{self.check}: {where}{self.found}" + (f"\n  cure: {self.cure}" * bool(self.cure))


def listed(names: Sequence[object]) -> str:
    """Names in a line, however many they are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(str(name) for name in names[:_SHOWN]) + more
