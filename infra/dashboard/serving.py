"""The server of a dashboard, on this machine alone."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.site import Site
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:
    import uvicorn

CLOSE_S = 3  # time that requests have to end when the dashboard does


def listening(port: int) -> socket.socket:
    """A socket on 127.0.0.1, which no other machine can reach; 0 takes a free port.

    Raises:
        LodesetError: the port is taken, or not allowed.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A port whose last connections are not quite closed can be used again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise LodesetError(
            f"the dashboard cannot listen on 127.0.0.1:{port} ({error.strerror}): choose another --port, or leave it out "
            "for a free one"
        ) from error
    return listener


def server(site: Site) -> uvicorn.Server:
    """A server of the site, to be run on the sockets of `listening`."""
    import uvicorn

    config = uvicorn.Config(
        create_app(site),
        log_level="warning",
        access_log=False,  # addresses hold what users search for
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_S,
    )
    return uvicorn.Server(config)
