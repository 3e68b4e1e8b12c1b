"""The head of a Ray cluster, asked over HTTP. Every wait has an end, and every refusal says what to do."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from lodeset.infra.jobs.errors import Refused, Taken, Unknown, Unreachable
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown

# Ray's own name for the address of a head. `--address` has precedence.
ADDRESS = "RAY_API_SERVER_ADDRESS"
_LIMITS_S = (10.0, 60.0)  # to connect, and between two pieces of an answer
for _name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # Ray sets INFO when it is imported


@dataclass(frozen=True)
class Token:
    """What a cluster's head asks for, and where it was found."""

    text: str
    where: str


class Head(JobSubmissionClient):
    """The head at an address.

    Ray's client (2.60) waits forever for an answer, prefers an address from the environment to the one that it is
    given, sends no token unless RAY_AUTH_MODE is set, and reports every problem as a RuntimeError. This one does not,
    and it sends a token only to a head that asks for one.
    """

    def __init__(self, address: str) -> None:
        """Raises ConfigError for what is no address, Unreachable or Refused if the head does not let us ask."""
        self.url = _checked(address)
        self.token: Token | None = None  # once the head has asked for it
        try:
            with _without(ADDRESS, "RAY_ADDRESS"):
                # A file of certificates for https, as `requests` knows it; Ray's log stream takes it from here.
                super().__init__(self.url, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)
        except AuthenticationError as error:  # RAY_AUTH_MODE asks for a token that is nowhere
            raise Refused(f"{shown(str(error).splitlines()[0])} {_WAY_OUT}") from None
        except (requests.RequestException, RuntimeError, KeyError, ValueError) as error:
            raise Unreachable(
                f"{self.url} answers, but not as the head of a Ray cluster does ({_short(error)}): give the address "
                "of its dashboard, e.g. http://HEAD:8265"
            ) from None

    @property
    def in_the_clear(self) -> bool:
        """Whether the token crosses a network unencrypted."""
        parts = urlsplit(self.url)
        return self.token is not None and parts.scheme == "http" and not _is_loopback(parts.hostname or "")

    def cluster_status(self) -> dict[str, Any]:
        """What the head knows of its nodes."""
        answer = self._do_request("GET", "/api/cluster_status")
        if answer.status_code != 200:
            self._raise_error(answer)
        return dict(answer.json().get("data") or {})

    def _do_request(
        self,
        method: str,
        endpoint: str,
        *,
        data: bytes | None = None,
        json_data: dict[str, Any] | None = None,
        **_: Any,
    ) -> requests.Response:
        answer = self._sent(method, endpoint, data, json_data)
        if answer.status_code == 401 and self.token is None and (found := token()) is not None:
            self.token = found
            self._headers = {"Authorization": f"Bearer {found.text}"}
            answer = self._sent(method, endpoint, data, json_data)
        if answer.status_code == 401:
            none = "there is none here"
            if os.environ.get("RAY_AUTH_MODE") == "disabled":
                none = "RAY_AUTH_MODE=disabled keeps it from being sent"
            raise Refused(f"{self.url} asks for a token, and {none}: {_WAY_OUT}")
        if answer.status_code == 403:
            where = self.token.where if self.token is not None else "your environment"
            raise Refused(f"{self.url} refuses the token of {where}: it is not the one of this cluster. {_WAY_OUT}")
        return answer

    def _sent(self, method: str, endpoint: str, data: bytes | None, tree: dict[str, Any] | None) -> requests.Response:
        url, headers = self._address + endpoint, self._headers
        try:
            answer = requests.request(
                method, url, data=data, json=tree, headers=headers, verify=self._verify, timeout=_LIMITS_S
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Unreachable(
                f"{self.url} does not answer ({_short(error)}): check that the head is up and that its dashboard port "
                "can be reached from here. For a head behind a firewall, open a tunnel (`ssh -N -L "
                "8265:127.0.0.1:8265 HEAD`) and use --address http://127.0.0.1:8265"
            ) from None
        if answer.status_code in (502, 503, 504):
            raise Unreachable(f"{self.url} cannot be reached through what is before it (HTTP {answer.status_code})")
        return answer

    def _raise_error(self, r: requests.Response) -> NoReturn:
        text, code = r.text, r.status_code
        if code == 404:
            raise Unknown(f"{self.url} has no such job: `lodeset jobs list` shows those that it has")
        if code >= 500 and "already exists" in text:
            raise Taken(f"{self.url} has a job of this name already")
        last = shown((text.strip().splitlines() or [""])[-1])[:500]
        if code >= 500:
            raise Unreachable(f"{self.url} failed to answer (HTTP {code}): {last}")
        raise LodesetError(f"{self.url} refused the request (HTTP {code}): {last}")


_WAY_OUT = (
    "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it (`ray get-auth-token` on the head prints it)"
)


def token() -> Token | None:
    """The token of this user, from where Ray looks for it.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(given, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        if not named:
            return None
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: cannot read {shown(file)}: {why}") from None
    return Token(text, str(file)) if text else None


def _checked(address: str) -> str:
    parts = urlsplit(address if "://" in address else f"http://{address}")
    wrong = None
    try:
        if parts.scheme not in ("http", "https"):
            wrong = f"the Jobs API is asked over http or https, not {parts.scheme}"
        elif not parts.hostname or parts.port == 0:
            wrong = "a host is missing"
        elif parts.username or parts.password:
            wrong = "a user or password in it would be kept in logs: a cluster takes a token, from RAY_AUTH_TOKEN"
    except ValueError as error:
        wrong = str(error)
    if wrong is not None:
        raise ConfigError(f"--address {shown(address)}: {wrong}; expected e.g. http://HEAD:8265")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _short(error: Exception) -> str:
    """An error of `requests` without the object addresses and repetitions in it."""
    text = str(error)
    for known in ("Connection refused", "Name or service not known", "timed out", "Connection reset by peer"):
        if known.lower() in text.lower():
            return known.lower()
    if isinstance(error, json.JSONDecodeError):
        return "its answer is not JSON"
    return shown(text)[:200]
