import os
import sys
import warnings

import pytest

from lodeset.infra.quiet import others_quiet


def test_nothing_of_others_is_seen_and_what_comes_after_is(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own standard error does not go by the descriptor; a command's does.
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", buffering=1, closefd=False))
    with others_quiet():
        os.write(2, b"native code\n")
        print("a logger", file=sys.stderr)
        warnings.warn("a warning", DeprecationWarning, stacklevel=1)
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"


def test_errors_are_raised(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), others_quiet():
        os.write(2, b"native code\n")
        raise ZeroDivisionError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
