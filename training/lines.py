"""What those read who watch a run or a job from outside; loads no torch."""

import contextlib
import json
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"  # what a job by itself does now; gone when it has ended


def last_line(metrics: Path) -> dict[str, Any] | None:
    """The last whole line, or None where there is none yet; the file may be written to at the same time."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            int(told["step"])
            return dict(told)
    return None
