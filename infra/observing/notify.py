"""Tell people or programs how a run ended, and that it makes no progress."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from lodeset.infra.observing.config import Hook, When
from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.errors import GateError, HeldError, LodesetError
from lodeset.pipeline.shown import shown, without_secrets

TIMEOUT_S = 30.0
log = logging.getLogger("lodeset")


@dataclass(frozen=True)
class Message:
    """What a hook is given, as JSON. `text` says it all, for chats."""

    event: When
    text: str
    name: str
    store: str
    config: str
    host: str
    exit_code: int | None
    error: str
    stages: tuple[str, ...]  # at work when a run stalled


def deliver(hook: Hook, message: Message) -> str | None:
    """Run a hook; return what went wrong, or None. It has half a minute."""
    data = json.dumps(asdict(message)).encode()
    try:
        if hook.command:
            done = subprocess.run(
                hook.command,
                input=data,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=TIMEOUT_S,
                env={**os.environ, "LODESET_EVENT": message.event},
            )
            if done.returncode:
                said = done.stderr.decode(errors="backslashreplace").strip()[-200:]
                return f"{hook.command[0]} ended with status {done.returncode}{f': {said}' if said else ''}"
            return None
        url = hook.webhook or os.environ.get(hook.webhook_env or "", "")
        if not url.startswith(("https://", "http://")):
            return f"the environment variable {hook.webhook_env} holds no http or https URL"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", "User-Agent": "lodeset"})
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S):
            return None
    except subprocess.TimeoutExpired:
        return f"{hook.command[0]} was still at work after {TIMEOUT_S:.0f} s"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # None of them may show the URL, which can be a secret.
        code = f" {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
        return f"{type(error).__name__}{code}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A hook that moved is told, and not followed to an address that nobody configured."""

    def redirect_request(self, *_: object) -> None:
        return None


class Notifier:
    """Delivers messages to the hooks of a run, and says that it has stalled, once until it moves again."""

    def __init__(self, hooks: Sequence[Hook], name: str, store: str, config: str) -> None:
        self._hooks, self._name, self._config = hooks, name, config
        self._store = without_secrets(store)
        self._lock, self._moved, self._told = threading.Lock(), time.monotonic(), set[int]()
        self._at_work: dict[str, tuple[float, int, str]] = {}

    def watch(self, event: Event) -> None:
        """Takes note of what moves."""
        id_ = event.stage.id
        with self._lock:
            if event.kind == "progress" and event.progress is not None:
                state = (event.progress.fraction, event.progress.count, event.progress.phase)
                if self._at_work.get(id_) == state:
                    return
                self._at_work[id_] = state
            elif event.kind == "started":
                self._at_work[id_] = (0.0, 0, "")
            elif event.kind != "waiting":
                self._at_work.pop(id_, None)
            self._moved = time.monotonic()
            self._told.clear()

    def look(self) -> float:
        """Tells hooks that the run has stalled, where it has; returns the seconds until the next look."""
        with self._lock:
            still = time.monotonic() - self._moved
            due = [
                (n, hook)
                for n, hook in enumerate(self._hooks)
                if "stalled" in hook.when and still >= hook.stalled_after and n not in self._told
            ]
            self._told.update(n for n, _ in due)
            stages = tuple(sorted(self._at_work))
        for _, hook in due:
            told = f"no progress for {still:.0f} s in {', '.join(stages) or 'any stage'}"
            self._deliver(hook, self._message("stalled", told, None, "", stages))
        return 1.0

    def tell(self, event: When, text: str, exit_code: int, error: str = "") -> None:
        """Tells hooks how the run ended."""
        for hook in self._hooks:
            if event in hook.when:
                self._deliver(hook, self._message(event, text, exit_code, error, ()))

    def _message(self, event: When, text: str, code: int | None, error: str, stages: tuple[str, ...]) -> Message:
        told = f"lodeset {self._name} on {socket.gethostname()}: {text} (`lodeset status {self._config}`)"
        return Message(
            event, told, self._name, self._store, self._config, socket.gethostname(), code, shown(error), stages
        )

    def _deliver(self, hook: Hook, message: Message) -> None:
        wrong = deliver(hook, message)
        if wrong is not None:
            name = hook.command[0] if hook.command else hook.webhook_env or "a web hook"
            log.warning("%s could not be told that the run has %s: %s", name, _WORDS[message.event], wrong)


_WORDS = {"done": "ended", "failed": "failed", "gate": "breached a gate", "stalled": "stalled"}


@contextlib.contextmanager
def notified(
    hooks: Sequence[Hook], watch: Callable[[Event], None], *, name: str, store: str, config: str
) -> Iterator[Callable[[Event], None]]:
    """Tells the hooks how the block ended, and when it makes no progress; yields the callback that the runner is to tell.

    A run that is refused because another one is at work, and one that was stopped by hand, are not told.
    """
    if not hooks:
        yield watch
        return
    notifier = Notifier(hooks, name, store, config)

    def both(event: Event) -> None:
        notifier.watch(event)
        watch(event)

    try:
        with repeating(notifier.look, 1.0):
            yield both
    except HeldError:
        raise
    except GateError as error:
        notifier.tell("gate", f"a gate was breached: {shown(error)}", error.exit_code, str(error))
        raise
    except LodesetError as error:
        notifier.tell("failed", f"failed: {shown(error)}", error.exit_code, str(error))
        raise
    except Exception as error:
        notifier.tell("failed", f"failed: {type(error).__name__}", 1, str(error))
        raise
    notifier.tell("done", "done", 0)
