"""metrics.jsonl: one row a step, the record from which all curves are drawn."""

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Rows appended to a file; after a resume, rows of steps that will be repeated are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step and resume_step > 0]
        self.last_step = kept[-1]["step"] if kept else 0
        aside = path.with_suffix(".new")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.rename(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it survives the death of the process."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; a last line cut short by a crash is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    rows.append(json.loads(line))
    return rows
