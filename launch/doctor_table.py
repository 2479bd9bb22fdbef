"""The findings of `anthesis doctor` in words, at most 100 columns wide."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.health.finding import Finding, listed

if TYPE_CHECKING:
    from launch.job import Job

_WIDTH, _MARGIN = 100, 20
_MARKS = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}


def table(found: Sequence[Finding]) -> str:
    """A line for each check that is fine, what was found and the cure for the others."""
    lines = []
    for one in found:
        where = f"{listed(one.hosts)}: " if one.hosts else ""
        head = f"{_MARKS[one.level]:<9}{one.check:<{_MARGIN - 9}}"
        lines += _wrapped(f"{where}{one.found}", head)
        if one.cure:
            lines += _wrapped(f"cure: {one.cure}", " " * _MARGIN)
    return "\n".join(lines)


def summary(job: "Job", found: Sequence[Finding]) -> str:
    """All in one line."""
    levels = [one.level for one in found]
    errors, warnings = levels.count("error"), levels.count("warning")
    hosts = f"{len(job.hosts)} host(s)" if job.hosts else "this machine"
    counts = ((errors, "error"), (warnings, "warning"))
    verdict = ", ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in counts if n)
    verdict = verdict or "nothing stands in its way"
    return f"{job.config.name} with {job.ranks} rank(s), {hosts}: {verdict}"


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * _MARGIN,
        break_on_hyphens=False,
        break_long_words=False,
    )
