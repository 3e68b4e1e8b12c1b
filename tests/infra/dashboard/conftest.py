"""A browser and a dashboard for the tests of its pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Chromium, Served, axe_source, chromium, served
from inspected_world import inspected

from lodeset.infra.dashboard.data import opened


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The dashboard of a finished run with hostile names in it, behind a path."""
    made, found = inspected(tmp_path_factory.mktemp("inspected"))
    with opened(made.store, found) as data, served(made, base_path="/data/zoo", data=data) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as started:
        yield started


@pytest.fixture
def axe(pytestconfig: pytest.Config) -> str:
    assert pytestconfig.cache is not None
    return axe_source(pytestconfig.cache.mkdir("axe"))


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keeps the pictures of pages: LODESET_SCREENSHOTS, or one of pytest's."""
    given = os.environ.get("LODESET_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
