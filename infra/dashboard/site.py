"""What a dashboard shows, and how it is reached."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from lodeset.infra.dashboard.data import Data
from lodeset.infra.session import Opened
from lodeset.pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Site:
    """One dashboard: a configuration with its store, and the address under which the browser sees it.

    Attributes:
        opened: the configuration with its graph and its store. The dashboard reads both and writes neither.
        run: the run that pages show if their address names none; None for the last finished one.
        base_path: what precedes every path, e.g. `/lodeset`; empty, or with a leading slash and without a trailing one.
        token: the secret that every request must know.
        port: where the server listens, on 127.0.0.1.
        allowed_hosts: further values of the header `Host`, of proxies.
        data: what was made of a run to be looked at; None if no run has ingested the pool.
    """

    opened: Opened
    token: str = field(repr=False)
    port: int
    run: int | None = None
    base_path: str = ""
    allowed_hosts: tuple[str, ...] = ()
    data: Data | None = None

    @property
    def number(self) -> int | None:
        """The number of the run that pages show if their address names none; None for the last finished one."""
        return self.run or (number_of(self.data) if self.data is not None else None)

    @property
    def cookie(self) -> str:
        """The name of the cookie with the token. Cookies ignore ports, so two dashboards need two names."""
        return f"lodeset_{self.port}"

    @property
    def cookie_path(self) -> str:
        return self.base_path or "/"


def number_of(data: Data) -> int | None:
    """The number of the run of these data; None in stores that record none."""
    run = data.inspected.held.run
    return run.number if run is not None else None


def base_path_of(given: str) -> str:
    """The base path as `Site` keeps it.

    Raises:
        ConfigError: it has characters that a path cannot have.
    """
    path = "/" + given.strip("/") if given.strip("/") else ""
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path) or any(part in (".", "..") for part in path.split("/")):
        raise ConfigError(
            f"--base-path {given}: give a path of letters, digits, `.`, `_`, `~` and `-`, for example /lodeset"
        )
    return path


def site_of(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


# The type of a parameter of a route that needs the site.
TheSite = Annotated[Site, Depends(site_of)]
