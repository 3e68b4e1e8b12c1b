"""Other libraries' warnings, kept from people who can do nothing about them."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def others_quiet() -> Iterator[None]:
    """Drops what is written to standard error while the block runs, native code's lines too; errors are raised as ever."""
    with contextlib.ExitStack() as given_back, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (OSError, ValueError):  # there is no standard error
            kept = None
        if kept is not None:
            sink = given_back.enter_context(tempfile.TemporaryFile())
            given_back.callback(os.close, kept)
            given_back.callback(os.dup2, kept, 2)
            given_back.callback(sys.stderr.flush)
            os.dup2(sink.fileno(), 2)
        yield
