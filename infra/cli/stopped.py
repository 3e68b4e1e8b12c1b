"""What a command says when it was told to stop; imports nothing that takes time."""

from __future__ import annotations

import contextlib
import json
import sys

from lodeset.pipeline.errors import Terminated


def tell(stop: KeyboardInterrupt) -> int:
    """Says it on standard error (with `--json`, on standard output too) and returns the exit status: 128 and the signal."""
    code = 143 if isinstance(stop, Terminated) else 130
    message = "stopped; the same command again goes on from what is finished"
    with contextlib.suppress(OSError):
        if "--json" in sys.argv:
            print(json.dumps({"error": message, "exit_code": code}), flush=True)
        print(message, file=sys.stderr, flush=True)
    return code
