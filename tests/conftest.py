"""One token for every Ray that a test session starts: Ray reads it once a process, and forgets nothing. And an end that Ray cannot spoil."""

import atexit
import os
import secrets
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read once a process, too

# As in the processes of a run: two threads on each of two cores only wait for one another.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """`ray.shutdown` leaves threads behind (2.60), one of which crashed while the process took its C++ objects down, all tests passed:
    leave as stages do, without that."""
    if "ray" in sys.modules and STATUS in config.stash:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])


@pytest.fixture
def one_process() -> Iterator[None]:
    """Commands run stages in this process, without an engine."""
    from inline import in_one_process

    with in_one_process():
        yield
