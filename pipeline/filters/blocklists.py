"""Lists of hosts and of starts of URLs that images must not come from. Both sides of a comparison are brought to one form."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from lodeset.pipeline.dag.files import reaching
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.filters.config import BLOCKED_DOMAIN, BLOCKED_URL
from lodeset.pipeline.remote.file_system import opened
from lodeset.pipeline.shown import shown

_SCHEME = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_OPAQUE = re.compile(r"^[a-z][a-z0-9+.-]*:(?!\d)", re.IGNORECASE)  # data:, mailto:; but host:8080 is a host
_DEFAULT_PORTS = (80, 443)  # of either scheme, because schemes are left out


@dataclass(frozen=True)
class Address:
    """Where a URL points, without scheme, user, default port and fragment: those change no host and no path."""

    host: str
    port: str  # "", or ":8080"
    path: str  # starts with a slash; with the query

    @property
    def text(self) -> str:
        return f"{self.host}{self.port}{self.path}"


def host_of(name: str) -> str:
    """One spelling of a host name: lower case, no percent signs, no trailing dot, punycode for other scripts (IDNA 2003).

    What no host can be (an empty label, one of more than 63 letters) is only lowered: it equals nothing but itself.
    """
    host = unquote(name).strip().rstrip(".\u3002\uff0e\uff61").lower()
    try:
        return host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        return host


def address_of(url: str) -> Address | None:
    """A URL, or a host and path without a scheme -> its address; None for what has no host (`data:`, free text, "").

    Never raises: crawled tables hold anything. Backslashes count as slashes, as browsers read them.
    """
    text = url.strip().replace("\\", "/")
    if not _SCHEME.match(text):
        if _OPAQUE.match(text):
            return None
        text = f"//{text}"
    try:
        parts = urlsplit(text)
        host, port = host_of(parts.hostname or ""), _port(parts.netloc)
    except ValueError:  # e.g. half an IPv6 address
        return None
    if not host or re.search(r"[\s/?#@]", host):
        return None
    query = f"?{parts.query}" if parts.query else ""
    return Address(host, port, f"{unquote(parts.path) or '/'}{query}")


def _port(netloc: str) -> str:
    written = re.search(r":(\d+)$", netloc)
    if written is None or int(written[1]) in _DEFAULT_PORTS:
        return ""
    return f":{int(written[1])}"


@dataclass(frozen=True)
class Blocklists:
    """Hosts and starts of URLs in the form of `Address`, sorted. No start is the start of another."""

    hosts: tuple[str, ...]
    starts: tuple[str, ...]

    def judge(self) -> Callable[[str], str | None]:
        """A function of a URL: the reason for which it is blocked, or None."""
        hosts, starts = frozenset(self.hosts), self.starts

        def reason(url: str) -> str | None:
            address = address_of(url)
            if address is None:
                return None
            if hosts and any(parent in hosts for parent in _parents(address.host)):
                return BLOCKED_DOMAIN
            # No start is the start of another, so only the last one that sorts before the URL can be its start.
            at = bisect_right(starts, address.text)
            return BLOCKED_URL if at and address.text.startswith(starts[at - 1]) else None

        return reason


def _parents(host: str) -> Iterable[str]:
    """a.b.c -> a.b.c, b.c, c."""
    labels = host.split(".")
    return (".".join(labels[at:]) for at in range(len(labels)))


def hosts(listed: str | tuple[str, ...]) -> tuple[str, ...]:
    """The hosts of `filter.blocked_domains`, normalized and sorted.

    Raises:
        LodesetError: a file is missing or cannot be read.
        ConfigError: an entry that is no host.
    """
    return tuple(sorted({_host_entry(entry, where) for entry, where in _entries(listed, "blocked_domains")}))


def starts(listed: str | tuple[str, ...]) -> tuple[str, ...]:
    """The starts of URLs of `filter.blocked_urls`, normalized and sorted; none is the start of another.

    Raises:
        LodesetError: a file is missing or cannot be read.
        ConfigError: an entry that is no URL.
    """
    found: list[str] = []
    for start in sorted({_url_entry(entry, where) for entry, where in _entries(listed, "blocked_urls")}):
        if not found or not start.startswith(found[-1]):
            found.append(start)
    return tuple(found)


def _entries(listed: str | tuple[str, ...], key: str) -> list[tuple[str, str]]:
    """(entry, where it stands)."""
    if not isinstance(listed, str):
        return [(entry, f"filter.{key}.{at}") for at, entry in enumerate(listed)]
    try:
        with reaching(f"filter.{key}: {shown(listed)}"), opened(listed) as file:
            lines = file.read().decode().splitlines()
    except FileNotFoundError:
        raise LodesetError(
            f"filter.{key}: no file {listed}: give a text file with one entry a line, or a list ([example.com])"
        ) from None
    except (OSError, ValueError) as error:
        raise LodesetError(f"filter.{key}: {listed} cannot be read as a text file ({error})") from error
    entries = [
        (re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip(), f"{listed}:{n}") for n, line in enumerate(lines, 1)
    ]
    return [(entry, where) for entry, where in entries if entry]


def _host_entry(entry: str, where: str) -> str:
    address = address_of(entry.removeprefix("*.").removeprefix("."))
    if address is None or _SCHEME.match(entry) or address.path != "/" or address.port:
        raise ConfigError(
            f"{where}: {entry!r} is not a host such as example.com (everything below it is blocked with it); "
            "starts of URLs go into filter.blocked_urls"
        )
    return address.host


def _url_entry(entry: str, where: str) -> str:
    address = address_of(entry)
    if address is None:
        raise ConfigError(f"{where}: {entry!r} is not the start of a URL such as https://example.com/private/")
    return address.text
