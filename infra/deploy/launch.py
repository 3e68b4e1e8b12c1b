"""What a pod of the CronJob runs in mode `ray_job`: it creates a RayJob and waits for its end.

The RayJob has the name of the pod's Job. A pod that takes over finds it, and follows it instead of starting another.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lodeset.infra.deploy.names import LONGEST, problem
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 10.0
# An API server that is silent for so long ends this pod; the next one goes on.
PATIENCE_S = 1800.0
REQUEST_S = 30.0
_EXIT = re.compile(r"exit code:? (\d{1,3})\b")


class Gone(LodesetError):
    """The object is not there."""


@dataclass(frozen=True)
class Api:
    """The part of the API of Kubernetes that concerns RayJobs of one namespace."""

    server: str
    namespace: str
    account: Path  # a folder with `token` and `ca.crt`

    def create(self, body: Mapping[str, Any]) -> bool:
        """Create a RayJob; False if there is one of this name."""
        try:
            self._call("POST", "", json.dumps(body).encode())
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def read(self, name: str) -> Any:
        """A RayJob.

        Raises:
            Gone: it was deleted.
        """
        try:
            return self._call("GET", f"/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise Gone(f"RayJob {name} was deleted before it ended") from None
            raise

    def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}",
            method=method,
            data=body,
            headers={
                # The token is renewed on disk while a pod lives.
                "Authorization": f"Bearer {(self.account / 'token').read_text(encoding='utf-8').strip()}",
                "Content-Type": "application/json",
            },
        )
        trusted = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
        with urllib.request.urlopen(request, timeout=REQUEST_S, context=trusted) as answer:
            return json.load(answer)


def launch(api: Api, body: Mapping[str, Any], name: str, uid: str, *, poll_s: float = POLL_S) -> int:
    """Create the RayJob for a Job and wait for its end; returns the exit status of its driver.

    Raises:
        LodesetError: the API refused, the RayJob was deleted, or the API was silent for too long.
    """
    if wrong := problem(name, LONGEST["RayJob"]):
        raise LodesetError(f"the Job's name {name} {wrong}, as the name of a RayJob: shorten `deploy.kubernetes.name`")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    owned = {**body, "metadata": {**body["metadata"], "name": name, "ownerReferences": [owner]}}
    created, told, silent_since = False, "", None
    while True:
        try:
            if not created:
                new = api.create(owned)
                created = True
                print(f"{'created' if new else 'following'} RayJob {name}", flush=True)
            status = api.read(name).get("status") or {}
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise LodesetError(f"Kubernetes refused: {_reason(error)}") from None
            silent_since = _patient(silent_since, error)
        except (OSError, ValueError) as error:
            silent_since = _patient(silent_since, error)
        else:
            silent_since = None
            line = " ".join(str(status.get(key) or "") for key in ("jobDeploymentStatus", "jobStatus")).strip()
            if line and line != told:
                print(line, flush=True)
                told = line
            if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
                return _ended(status)
        time.sleep(poll_s)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return f"HTTP {error.code}: {json.loads(error.read(100_000))['message']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code} {error.reason}"


def _patient(since: float | None, error: Exception) -> float:
    now = time.monotonic()
    if since is None:
        print(f"the API of Kubernetes does not answer, trying again: {shown(str(error))}", file=sys.stderr, flush=True)
        return now
    if now - since > PATIENCE_S:
        raise LodesetError(f"the API of Kubernetes did not answer for {PATIENCE_S / 60:.0f} minutes: {error}")
    return since


def _ended(status: Mapping[str, Any]) -> int:
    """The exit status of the driver, as far as Ray's message tells it."""
    if status.get("jobStatus") == "SUCCEEDED" and status["jobDeploymentStatus"] == "Complete":
        return 0
    message = str(status.get("message") or status.get("reason") or "no reason was given")
    print(shown(message), file=sys.stderr, flush=True)
    found = _EXIT.search(message)
    return int(found[1]) if found is not None and int(found[1]) else 1


def main() -> int:
    """Launch the RayJob of a file, in a pod."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    body = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        api = Api(server, os.environ["LODESET_NAMESPACE"], ACCOUNT)
        return launch(api, body, os.environ["LODESET_JOB_NAME"], os.environ["LODESET_JOB_UID"])
    except LodesetError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
