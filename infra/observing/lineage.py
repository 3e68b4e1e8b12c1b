"""OpenLineage events of every stage, through the client's own transports (OPENLINEAGE_URL, openlineage.yml).

Events are a job for each stage, `<name>.<stage>/<set>`, and a run for each time that it is made. Inputs and outputs are artifacts of
the store; lists by hand are inputs, too. Source: OpenLineage spec 2-0-2 (openlineage.io).
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown, without_secrets

PRODUCER = "lodeset"
log = logging.getLogger("lodeset")


class Lineage:
    """Emits an event when a stage starts, ends, or fails. What goes wrong is told once and never fails the run."""

    def __init__(self, name: str, store: str) -> None:
        """Raises ConfigError: the client is not installed, or its own settings are wrong."""
        try:
            from openlineage.client import OpenLineageClient
        except ImportError as error:
            raise ConfigError("lineage: needs OpenLineage's client: pip install 'lodeset[lineage]'") from error
        self._name, self._store = name, without_secrets(store)
        try:
            self._client: Any = OpenLineageClient()
        except Exception as error:
            why = f"{type(error).__name__}: {shown(error)}"
            raise ConfigError(
                f"lineage: the client's settings (OPENLINEAGE_URL, openlineage.yml) are wrong: {why}"
            ) from error
        self._runs: dict[str, str] = {}
        self._broken = False

    def watch(self, event: Event) -> None:
        """Emits what the event stands for."""
        stage = event.stage
        if event.kind == "started":
            self._runs[stage.id] = str(uuid.uuid4())
            self._emit("START", stage)
        elif event.kind == "done":
            self._emit("COMPLETE", stage)
        elif event.kind in ("failed", "again"):
            self._emit("FAIL", stage, shown(event.reason))

    def _emit(self, state: str, stage: Stage, error: str = "") -> None:
        run = self._runs.get(stage.id)
        if run is None or self._broken:
            return
        try:
            self._client.emit(self._event(state, stage, run, error))
        except Exception as problem:
            self._broken = True
            log.warning("lineage is not told any more: %s: %s", type(problem).__name__, shown(problem))

    def _event(self, state: str, stage: Stage, run: str, error: str) -> Any:
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import error_message_run

        facets: dict[str, Any] = {}
        if error:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(message=error, programmingLanguage="python")
        return RunEvent(
            eventType=RunState[state],
            eventTime=datetime.now(UTC).isoformat(),
            run=Run(runId=run, facets=facets),
            job=Job(namespace=PRODUCER, name=f"{self._name}.{stage.id}"),
            producer=PRODUCER,
            inputs=[
                *(InputDataset(namespace=self._store, name=needed.stage.id) for needed in stage.inputs.values()),
                *(InputDataset(namespace=namespace, name=name) for namespace, name in map(_dataset, stage.reads)),
            ],
            outputs=[OutputDataset(namespace=self._store, name=stage.id)],
        )


def _dataset(place: str) -> tuple[str, str]:
    """Namespace and name of a file, as OpenLineage spells them: `s3://bucket` and the key; `file` and the path."""
    public = without_secrets(place)
    protocol, separator, rest = public.partition("://")
    if not separator or protocol == "file":
        return "file", rest or public
    host, _, path = rest.partition("/")
    return f"{protocol}://{host}", path


@contextlib.contextmanager
def traced(wanted: bool, watch: Callable[[Event], None], *, name: str, store: str) -> Iterator[Callable[[Event], None]]:
    """Tells lineage, where that is `wanted`, beside `watch`."""
    if not wanted:
        yield watch
        return
    lineage = Lineage(name, store)

    def both(event: Event) -> None:
        lineage.watch(event)
        watch(event)

    yield both
