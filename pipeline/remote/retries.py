"""Repeat what a remote file system refuses for the moment.

This is the only place that repeats requests: the retries that drivers bring are switched off where that is possible
(`file_system.py`), so every repeated request is counted, waits with backoff and full jitter, and shares one deadline.
What will not change by asking again (no such bucket, no such key, no permission) is never repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lodeset.pipeline.shown import shown

log = logging.getLogger("lodeset.remote")

Result = TypeVar("Result")

# Seconds for which a request is repeated, and seconds of silence after which it counts as failed.
PATIENCE, SILENCE = "LODESET_PATIENCE_S", "LODESET_SILENCE_S"
PATIENCE_S, SILENCE_S = 300.0, 30.0
# Until a file system has answered this process or one that started it, its address is more likely wrong than the
# server is busy, and whoever typed it is waiting.
FIRST_S = 15.0
ANSWERED = "LODESET_ANSWERED"
# The folder in which the processes of a run add up what they repeated.
REPEATS = "LODESET_REPEATS"

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 20.0
_TELL_EVERY_S = 30.0
# What is wrong so often is wrong where it is stored.
_WRONG_LOOKS = 8

_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentSHA256Mismatch",
    }
)
_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        getattr(errno, "EREMOTEIO", errno.ETIMEDOUT),
        errno.ETIMEDOUT,
    }
)
# By name, since the drivers need not be installed: botocore, aiohttp, urllib3, requests, azure-core, google-auth, fsspec.
_TYPES = frozenset(
    {
        "ChunkedEncodingError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "ConnectionError",
        "EndpointConnectionError",
        "FSTimeoutError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ProtocolError",
        "ReadTimeoutError",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
    }
)
_NEVER = frozenset({"SSLError", "ClientConnectorCertificateError", "SSLCertVerificationError", "InvalidURL"})


class WrongBytesError(OSError):
    """A file system answered with other bytes, or another number of them, than there are."""


@dataclass
class Repeated:
    """How many requests were repeated, and the seconds that it cost: of those that failed, and of the pauses."""

    requests: int = 0
    seconds: float = 0.0

    def __add__(self, other: Repeated) -> Repeated:
        return Repeated(self.requests + other.requests, self.seconds + other.seconds)

    def __str__(self) -> str:
        were = "request was" if self.requests == 1 else "requests were"
        return f"{self.requests:,} {were} repeated, {self.seconds:,.0f} s waited"


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed when it is made again."""
    seen: BaseException | None = error
    for _ in range(5):
        if seen is None:
            return False
        names = {kind.__name__ for kind in type(seen).__mro__}
        if isinstance(seen, _PERMANENT) or names & _NEVER:
            return False
        told = _by_response(seen)
        if told is not None:
            return told
        if _wrong(seen) or isinstance(seen, TimeoutError | ConnectionError) or names & _TYPES:
            return True
        if isinstance(seen, OSError) and seen.errno in _ERRNOS:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _wrong(error: BaseException) -> bool:
    """Whether an answer came that is not what is stored."""
    return isinstance(error, WrongBytesError) or type(error).__name__ == "FlexibleChecksumError"  # botocore's


def _by_response(error: BaseException) -> bool | None:
    """What the server's answer says; None where the error is no answer."""
    status, code = _answer(error)
    if code and not code.isdigit():
        return code in _CODES or status in (500, 502, 503, 504)
    return None if status is None else status in _STATUSES


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer that led to an error."""
    status, _ = _answer(error)
    return status if status is not None or error.__cause__ is None else status_of(error.__cause__)


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and code of the server's answer that an error is."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status, str(response.get("Error", {}).get("Code", ""))
    # aiohttp; azure; gcsfs; requests
    for holder, name in ((error, "status"), (error, "status_code"), (error, "code"), (response, "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) and not isinstance(status, bool) and 300 <= status < 600:
            return status, ""
    return None, ""


# -- what was repeated


class _Counted:
    """What this process repeated, and where it tells so."""

    def __init__(self) -> None:
        self.total = Repeated()
        self._lock = threading.Lock()
        self._told = 0.0

    def add(self, what: str, seconds: float, error: BaseException) -> None:
        with self._lock:
            self.total = self.total + Repeated(1, seconds)
            now = time.monotonic()
            if not self._told or now - self._told > _TELL_EVERY_S:
                self._told = now
                said = shown(" ".join(str(error).split())[:200]) or "no message"
                log.warning(
                    "%s: %s (%s); %s in this process so far", shown(what), type(error).__name__, said, self.total
                )
            folder = os.environ.get(REPEATS)
            if folder:
                # Another machine of a cluster does not have this folder; the repeats there are in its logs alone.
                with contextlib.suppress(OSError):
                    line = json.dumps([1, round(seconds, 3)]) + "\n"
                    with open(Path(folder, str(os.getpid())), "a", encoding="utf-8") as file:
                        file.write(line)


_counted = _Counted()


def repeated_in(folder: Path) -> Repeated:
    """What all processes wrote down in a folder (`REPEATS`) and in those below it."""
    total = Repeated()
    for path in folder.rglob("*"):
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    requests, seconds = json.loads(line)
                    total = total + Repeated(requests, seconds)
    return total


@contextlib.contextmanager
def summed_up() -> Iterator[None]:
    """Says in the end what this process repeated while the block ran, and those that it started on this machine."""
    with tempfile.TemporaryDirectory(prefix="lodeset-repeats-") as folder, _written_to(folder):
        try:
            yield
        finally:
            total = repeated_in(Path(folder))
            if total.requests:
                logging.getLogger("lodeset").warning("the store or a source was slow: %s", total)


@contextlib.contextmanager
def told_of(stage: str) -> Iterator[None]:
    """Says in the end what was repeated while the block ran, for a stage's log."""
    around = os.environ.get(REPEATS)
    if not around:
        yield
        return
    folder = Path(around, stage.replace("/", "-"))
    folder.mkdir(exist_ok=True)
    with _written_to(str(folder)):
        try:
            yield
        finally:
            total = repeated_in(folder)
            if total.requests:
                log.warning("%s: its store or a source was slow: %s", stage, total)


@contextlib.contextmanager
def _written_to(folder: str) -> Iterator[None]:
    before = os.environ.get(REPEATS)
    os.environ[REPEATS] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[REPEATS]
        else:
            os.environ[REPEATS] = before


def note_wrong(what: str, error: BaseException) -> None:
    """Counts a read that is repeated because of what came."""
    _counted.add(what, 0.0, error)


# -- repeating


@dataclass
class Attempts:
    """The attempts at one request."""

    what: str
    server: str
    repeats: int = 0
    _began: float = field(default_factory=lambda: time.monotonic())  # this attempt
    _failed: float | None = None  # the first one

    def pause(self, error: BaseException) -> float:
        """The seconds to wait before the next attempt; the error is raised again if there is none."""
        now = time.monotonic()
        if not transient(error):
            if isinstance(error, _PERMANENT):
                self.succeeded()  # that is an answer
            raise error
        self._failed = now if self._failed is None else self._failed
        left = self._failed + self._patience() - now
        if left <= 0 or (_wrong(error) and self.repeats >= _WRONG_LOOKS):
            error.__dict__["given_up"] = True  # for those who repeat what this is a part of
        if getattr(error, "given_up", False):
            raise error
        seconds = min(left, _drawn(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(self.repeats, 16))))
        self.repeats += 1
        _counted.add(self.what, now - self._began + seconds, error)
        self._began = now + seconds
        return seconds

    def succeeded(self) -> None:
        known = os.environ.get(ANSWERED, "").split()
        if self.server not in known:
            os.environ[ANSWERED] = " ".join([*known, self.server])

    def _patience(self) -> float:
        patience = float(os.environ.get(PATIENCE, PATIENCE_S))
        return patience if self.server in os.environ.get(ANSWERED, "").split() else min(patience, FIRST_S)


# Whether what runs is repeated as a part of something larger.
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)


# Of its own: what others draw from the common generator, seeded, must not depend on faults.
_jitter = random.Random()


def _drawn(most: float) -> float:
    return _jitter.uniform(0.0, most)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def repeated(call: Callable[[], Result], what: str, server: str) -> Result:
    """What `call` returns, once it raises nothing that is transient. What it repeats itself is repeated with it.

    Raises:
        Exception: the first error that is not, or the last one when the time is up.
    """
    if _inside.get():
        return call()
    made = Attempts(what, server)
    token = _inside.set(True)
    try:
        while True:
            try:
                result = call()
            except Exception as error:
                _sleep(made.pause(error))
            else:
                made.succeeded()
                return result
    finally:
        _inside.reset(token)


def patiently(method: Callable[..., Awaitable[Any]], what: str, server: str) -> Callable[..., Awaitable[Any]]:
    """The same for one request inside a driver, such as one part of an upload: only that part is sent again."""

    async def request(*arguments: Any, **named: Any) -> Any:
        made = Attempts(what, server)
        while True:
            try:
                result = await method(*arguments, **named)
            except Exception as error:
                await asyncio.sleep(made.pause(error))
            else:
                made.succeeded()
                return result

    return request


def silence_s() -> float:
    return float(os.environ.get(SILENCE, SILENCE_S))
