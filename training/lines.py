"""Read the progress of a run or a job from outside; loads no torch."""

import contextlib
import json
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"  # current progress of a job that runs by itself; removed when it ends


def last_line(metrics: Path) -> dict[str, Any] | None:
    """The last complete line, or None; the file may be written to at the same time."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            int(values["step"])
            return dict(values)
    return None
