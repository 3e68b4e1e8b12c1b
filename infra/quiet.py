"""Suppress warnings of other libraries about which users can do nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def others_quiet() -> Iterator[None]:
    """Drop what is written to standard error while the block runs, including lines from native code; errors are raised
    as usual.
    """
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
