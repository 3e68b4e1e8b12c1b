"""What `metrics.jsonl` says, for those who watch a run from outside; loads no torch."""

import contextlib
import json
from pathlib import Path
from typing import Any


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
