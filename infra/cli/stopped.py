"""The message of a command that was stopped; imports nothing that takes time."""

from __future__ import annotations

import contextlib
import json
import sys

from lodeset.pipeline.errors import Terminated


def tell(stop: KeyboardInterrupt) -> int:
    """Print the message on standard error (with `--json`, also on standard output) and return the exit status: 128 and
    the signal.
    """
    code = 143 if isinstance(stop, Terminated) else 130
    message = "stopped; run the same command again to continue from what is finished"
    with contextlib.suppress(OSError):
        if "--json" in sys.argv:
            print(json.dumps({"error": message, "exit_code": code}), flush=True)
        print(message, file=sys.stderr, flush=True)
    return code
