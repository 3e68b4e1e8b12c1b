"""Who may ask the dashboard for something, what a browser may do with the answer, and how much a request may cost.

A page of any website can send requests to 127.0.0.1, and with a host name that it controls (DNS rebinding) it can even
read the answers. So a request needs a known `Host`, must not come from another site, and must know the token of this
start. Cookies are sent to every port of a host, so `SameSite` alone does not keep out a page from another local port:
`Origin` and `Sec-Fetch-Site` do.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from lodeset.infra.dashboard.site import Site
from lodeset.pipeline.dag.files import is_of_a_driver, unreachable

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
# (scope, status, sentence) -> the page that says it
Refusal = Callable[[Scope, int, str], Response]

TOKEN = "token"  # the parameter of the first address
STATIC = "/static/"  # what everybody may read: the scripts and styles that lodeset comes with
MAX_BODY_BYTES = 32 * 2**20
SILENCE_S = 30.0  # time until an answer begins, and between two pieces of it

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class _TooLarge(HTTPException):
    """The body of a request is larger than the limit. FastAPI passes this kind of error on while it reads a body."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            413, f"The request is larger than {limit / 2**20:g} MiB, which is the limit of this dashboard."
        )


class Safety:
    """ASGI middleware around the whole dashboard."""

    def __init__(
        self,
        app: App,
        site: Site,
        refusal: Refusal,
        max_body_bytes: int = MAX_BODY_BYTES,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.app = app
        self.site = site
        self.refusal = refusal
        self.max_body_bytes = max_body_bytes
        self.silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        place(scope, self.site.base_path)
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                _protect(message)
            clock.reschedule(asyncio.get_running_loop().time() + self.silence_s)
            await send(message)

        try:
            async with asyncio.timeout(self.silence_s) as clock:
                answer = self._refused(scope) or self._admitted(scope)
                await (answer or self.app)(scope, self._limited(receive), guarded)
                return
        except _TooLarge as error:
            status, told = error.status_code, error.detail
        except TimeoutError:
            status, told = 503, f"The answer took longer than {self.silence_s:g} s. Ask for less, or try again."
        except Exception as error:
            logging.getLogger("lodeset").exception("the dashboard could not answer %s", scope["path"])
            if is_of_a_driver(error):
                status, told = 503, unreachable("The store", error)
            else:
                status = 500
                told = "This is a defect in lodeset. The terminal with `lodeset inspect` shows the details."
        if begun:  # too late for a page: the server closes the connection, so that nobody takes this for the whole
            raise ConnectionError(told)

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                _protect(message)
            await send(message)

        await self.refusal(scope, status, told)(scope, receive, protected)

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which counts the body as it comes: a chunked one announces no length."""
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body_bytes:
                raise _TooLarge(self.max_body_bytes)
            return message

        return counted

    def _refused(self, scope: Scope) -> Response | None:
        """Why this request is not answered, whatever it knows."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._own(hosts[0]):
            return self.refusal(
                scope,
                421,
                "This address is not one of the dashboard's own. Open it at 127.0.0.1, or start it with `--allowed-host NAME` "
                "if a proxy gives it this name.",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body_bytes:
            raise _TooLarge(self.max_body_bytes)
        if _foreign(scope["method"], headers):
            return self.refusal(scope, 403, "The dashboard does not answer to pages of other sites.")
        return None

    def _own(self, host: str) -> bool:
        port = self.site.port
        local = ("127.0.0.1", "localhost", "[::1]")
        named = {f"{name}:{port}" for name in local} | (set(local) if port == 80 else set())
        given = {name.lower() for name in self.site.allowed_hosts}
        asked = host.lower()
        return asked in named or asked in given or _without_port(asked) in given

    def _admitted(self, scope: Scope) -> Response | None:
        """None if the request knows the token; what to answer otherwise. A token in the address moves into the cookie."""
        site, headers = self.site, Headers(scope=scope)
        path = scope["path"].removeprefix(site.base_path)
        if path.startswith(STATIC):
            return None
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in asked if name == TOKEN]
        if given and scope["method"] in ("GET", "HEAD") and all(self._knows(value) for value in given):
            rest = urlencode([(name, value) for name, value in asked if name != TOKEN])
            answer = RedirectResponse(f"{site.base_path}{_local(path)}{'?' if rest else ''}{rest}", status_code=303)
            answer.set_cookie(site.cookie, site.token, path=site.cookie_path, httponly=True, samesite="strict")
            return answer
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._knows(bearer.strip()):
            return None
        if any(self._knows(value) for value in _cookies(headers, site.cookie)):
            return None
        return self.refusal(
            scope,
            401,
            "Open the address that `lodeset inspect` printed in the terminal: it has the token, which this request lacks.",
        )

    def _knows(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.site.token.encode())


def place(scope: Scope, base_path: str) -> None:
    """Makes the path of a request begin with the base path, whether or not a proxy took that away."""
    path = scope["path"]
    bare = path[len(base_path) :] if path == base_path or path.startswith(f"{base_path}/") else path
    scope["path"] = f"{base_path}{bare or '/'}"
    scope["root_path"] = base_path


def _local(path: str) -> str:
    """A path that a browser cannot take for a host name: `//evil.example/` would lead there."""
    return "/" + path.lstrip("/\\")


def _foreign(method: str, headers: Headers) -> bool:
    """Whether a page of another site or of another port sent this.

    Browsers say so in `Sec-Fetch-Site`, which no page can change. A link on another site may lead here, since opening a
    page changes nothing and the cookie is not sent with it.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    reads = method in ("GET", "HEAD")
    if site is not None and site != "same-origin":
        opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if not (reads and (site == "none" or opened)):
            return True
    if origin is not None:
        # Without a referrer, a form of our own sends `null`.
        own = site == "same-origin" if origin == "null" else _host_of(origin) == headers["host"].lower()
        return not own
    return not reads and site is None and "authorization" not in headers


def _host_of(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _cookies(headers: Headers, name: str) -> list[str]:
    found = []
    for header in headers.getlist("cookie"):
        for pair in header.split(";"):
            if pair.strip().startswith(f"{name}="):
                try:
                    found += [morsel.value for morsel in SimpleCookie(pair.strip()).values()]
                except CookieError:
                    continue
    return found


def _protect(message: Message) -> None:
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Cache-Control", "private, no-store")
