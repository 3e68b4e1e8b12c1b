"""`lodeset`, before anything of it is imported: an interrupt at any moment ends in one sentence and an exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Runs a command, and leaves without taking native libraries down: one of their threads was seen to abort a demo that
    had done and told everything, and its exit status said that it had failed."""
    try:
        from lodeset.pipeline.errors import ends_like_an_interrupt

        with ends_like_an_interrupt():
            from lodeset.infra.cli.command import perform
            from lodeset.infra.cli.main import app

            code = perform(app)
    except KeyboardInterrupt as stop:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        from lodeset.infra.cli.stopped import tell

        code = tell(stop)
    with contextlib.suppress(OSError):  # whoever read this is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
