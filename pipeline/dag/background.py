"""Something done again and again beside the work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeating(step: Callable[[], float | None], first: float) -> Iterator[threading.Event]:
    """Calls `step` from a thread while the block runs, `first` seconds after its start.

    `step` returns the seconds until its next call, or None to be called no more. The event that is given is set when the
    block ends; leaving the block waits for a call that is under way.
    """
    ended = threading.Event()

    def loop() -> None:
        pause: float | None = first
        while pause is not None and not ended.wait(pause):
            pause = step()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        ended.set()
        thread.join()
