"""A client of a dashboard's pages, without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.testclient import TestClient

from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import Opened

TOKEN = "a-token-of-the-tests"


@contextmanager
def browsing(opened: Opened, data: Data | None = None) -> Iterator[TestClient]:
    site = Site(opened=opened, token=TOKEN, port=8000, data=data)
    host = f"http://127.0.0.1:{site.port}"
    with TestClient(create_app(site), base_url=host, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client
