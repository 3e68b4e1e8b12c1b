"""One token for every Ray that a test session starts: Ray reads it once a process, and forgets nothing. And an end that Ray cannot spoil."""

import atexit
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read once a process, too

# As in the processes of a run: two threads on each of two cores only wait for one another.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

STATUS = pytest.StashKey[int]()

# Slow files whose tests share a run, so that one process makes it once.
TOGETHER = {
    "test_demo": "whole",
    "test_kill": "whole",
    "test_cluster": "whole",
    "test_dashboard": "whole",
    "test_curation": "world",
    "test_growth": "world",
}
# What takes longest starts first, so that two processes end at about the same time.
LONGEST = (
    "test_cluster",
    "test_kill",
    "test_demo",
    "test_dashboard",
    "test_prune",
    "test_takedown",
    "test_object_store",
    "test_loop",
    "test_train",
    "test_curation",
    "test_tutorial",
    "test_embedders",
    "test_images",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)) if item.get_closest_marker("slow") else len(rank))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadgroup` by `TOGETHER`, other files each by itself: xdist 3.8 forgets the groups of its marker under pytest 9.2, and
    both processes made every shared run.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return TOGETHER.get(Path(path).stem, path) if path.startswith("tests/slow/") else path

    config.option.loadscopereorder = False  # in the order of `LONGEST`
    return Together(config, log)


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
