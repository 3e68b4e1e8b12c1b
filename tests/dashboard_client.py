"""A client of a dashboard's pages, without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi.testclient import TestClient
from inspected_world import inspected

from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import Opened

TOKEN = "a-token-of-the-tests"


@contextmanager
def browsing(opened: Opened, data: Data | None = None) -> Iterator[TestClient]:
    site = Site(opened=opened, token=TOKEN, port=8000, data=data)
    host = f"http://127.0.0.1:{site.port}"
    with TestClient(create_app(site), base_url=host, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client


@contextmanager
def shown(folder: Path) -> Iterator[tuple[TestClient, Data]]:
    """A client of the dashboard of `inspected_world` in a folder, and what its pages read."""
    made, found = inspected(folder)
    with opened(made.store, found) as data, browsing(made, data) as client:
        client.follow_redirects = False
        client.headers["Accept"] = "text/html"
        yield client, data
