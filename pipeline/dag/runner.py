"""Runs a DAG: what is finished is skipped, what is ready runs side by side within a budget of cores."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import cloudpickle

from lodeset.pipeline.dag import child
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.cluster import LOCAL, ON_DEMAND, Cluster, Joined
from lodeset.pipeline.dag.decisions import Decision, decided
from lodeset.pipeline.dag.fingerprint import canonical
from lodeset.pipeline.dag.forking import forking
from lodeset.pipeline.dag.launched import Launched
from lodeset.pipeline.dag.stage import PREVIOUS, Outcome, Progress, Stage, module_of
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import GateError, HeldError, LodesetError, LostError, ends_like_an_interrupt

LOGS = "logs"
RESTARTS = 2  # of a stage whose workers were lost, in one run
GOES_ON = "`run` again goes on from its finished parts"
_LATER = Joined(ON_DEMAND, 0)


@dataclass(frozen=True)
class Event:
    """What the runner tells whoever watches it."""

    kind: Literal["waiting", "again", "finished", "taken over", "started", "progress", "done", "failed", "damaged"]
    stage: Stage
    progress: Progress | None = None
    artifact: Artifact | None = None
    reason: str = ""  # of `waiting`: what for; of `again`: why a stage that was lost starts again
    log: str = ""  # of `started` and `failed`: where the stage's output is kept


@dataclass
class Running:
    stage: Stage
    decision: Decision
    child: Launched
    log: Path
    cpus: int
    cluster: str | None  # the address of its Ray cluster
    started: float
    held: contextlib.ExitStack
    buffer: bytes = b""
    gone: bool = False  # its cluster
    waits_for: str = ""
    result: dict[str, Any] | None = field(default=None)


class Runner:
    """Runs stages as child processes. One budget of cores covers both engines of this machine; a Ray cluster that is joined has a
    budget of its own.
    """

    def __init__(
        self,
        store: Store,
        cpus: int,
        ray: Callable[[], contextlib.AbstractContextManager[Joined]],
        watch: Callable[[Event], None],
        fresh: Container[str] = (),
        launch: Callable[[bytes, Path], Launched] | None = None,
        cluster: Cluster = LOCAL,
    ) -> None:
        """`launch` starts the stage of a pickled task, whose output goes to a log file, by default as a fork; `ray` starts or joins the `cluster`."""
        self._launch_child = launch
        self.store, self.cpus, self.watch, self.fresh = store, cpus, watch, fresh
        self._start_ray = ray
        self._cluster, self._joined = cluster, cast(Joined | None, None)
        self._losses: Counter[str] = Counter()  # by id
        self._services = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._logs = Path(store.path(LOGS)) if store.local else None  # else a folder of this run
        self._waits: dict[str, str] = {}  # by id, as last told

    def run(
        self, stages: Mapping[str, Stage], given: Mapping[str, Artifact] = MappingProxyType({})
    ) -> dict[str, Artifact]:
        """Runs what is not finished; `stages` in topological order, `given` what they are made from besides, by id.

        Raises:
            LodesetError: the first stage that failed, once those beside it have ended.
        """
        self.store.prepare()
        finished = dict(given)
        waiting = dict(stages)
        running: dict[str, Running] = {}
        failure: LodesetError | None = None
        with self._services, ends_like_an_interrupt():
            if self._logs is None:
                self._logs = Path(self._services.enter_context(tempfile.TemporaryDirectory(prefix="lodeset-logs-")))
            if self._launch_child is None:
                self._launch_child = self._services.enter_context(forking(_modules(stages)))
            try:
                while waiting or running:
                    if failure is None:
                        try:
                            self._settle(waiting, finished)
                            self._launch(waiting, running, finished)
                        except LodesetError as error:
                            failure = error
                    if not running:
                        break
                    for ended in self._listen(running):
                        try:
                            finished[ended.stage.id] = self._finish(ended, finished)
                        except LostError as error:
                            if failure is None and self._may_start_again(ended, error):
                                waiting[ended.stage.id] = ended.stage
                                continue
                            final = LostError(f"{error}; {GOES_ON}")
                            self.watch(Event("failed", ended.stage, reason=str(final), log=self._log_of(ended)))
                            failure = failure or final
                        except LodesetError as error:
                            self.watch(Event("failed", ended.stage, reason=str(error), log=self._log_of(ended)))
                            failure = failure or error
            finally:
                for left in running.values():
                    self._sweep(left)
                    left.held.close()
        if failure is not None:
            raise failure
        return finished

    def _settle(self, waiting: dict[str, Stage], finished: dict[str, Artifact]) -> None:
        for stage in list(waiting.values()):
            decision = decided(self.store, stage, finished, self.fresh)
            if decision.artifact is not None:
                del waiting[stage.id]
                finished[stage.id] = decision.artifact
                kind: Literal["finished", "taken over"] = (
                    "taken over" if decision.action == "taken over" else "finished"
                )
                self.watch(Event(kind, stage, artifact=decision.artifact, reason=decision.reason))

    def _launch(self, waiting: dict[str, Stage], running: dict[str, Running], finished: Mapping[str, Artifact]) -> None:
        """Starts what is ready, the widest first and never narrower than it could be: small stages then fill the cores that
        are left, instead of holding a large one to one core."""
        ready = [(stage, decided(self.store, stage, finished, self.fresh)) for stage in waiting.values()]
        unfinished = (*waiting.values(), *(one.stage for one in running.values()))
        hosts = {id_: stage.id for stage in unfinished for id_ in stage.also}
        not_ready = {stage.id for stage, decision in ready if decision.action == "wait"}
        ahead: list[Stage] = []  # nothing overtakes a stage that waits for the same cores
        for stage, decision in sorted(ready, key=lambda pair: -pair[0].max_cpus):
            if decision.action != "run":
                self._wait(stage, decision.reason)
                continue
            if stage.id in hosts:
                self._wait(stage, f"{hosts[stage.id]}, which makes its parts on the way")
                continue
            if not not_ready.isdisjoint(stage.also):
                self._wait(stage, f"{', '.join(sorted(not_ready & {*stage.also}))}, whose parts it makes on the way")
                continue
            budget, beside = self._budget(stage), [r for r in running.values() if self._shares(r.stage, stage)]
            cpus, free = min(budget, stage.max_cpus), budget - sum(r.cpus for r in beside)
            if cpus > free or any(self._shares(one, stage) for one in ahead):
                users = ", ".join(f"{r.stage.id} {r.cpus}" for r in beside)
                self._wait(stage, f"cores: it takes {cpus}, and of {budget} {max(0, free)} are free ({users})")
                ahead.append(stage)
                continue
            also = [pair for pair in ready if pair[0].id in stage.also]
            running[stage.id] = self._start(stage, decision, cpus, finished, also)
            del waiting[stage.id]

    def _shares(self, one: Stage, other: Stage) -> bool:
        """Whether two stages draw on the same cores."""
        return self._cluster.local or one.engine == other.engine

    def _budget(self, stage: Stage) -> int:
        if stage.engine != "ray" or self._cluster.local:
            return self.cpus
        return self._join(stage).cpus

    def _join(self, stage: Stage) -> Joined:
        if self._joined is None:
            if not self._cluster.local:  # what asks for a local one tells itself that it waits
                self._wait(stage, f"the Ray cluster at {self._cluster.address}")
            self._joined = self._services.enter_context(self._start_ray())
        return self._joined

    def _may_start_again(self, lost: Running, error: LostError) -> bool:
        """Whether a stage whose workers were lost starts again: its finished parts stay, and only what was being made is lost."""
        self._losses[lost.stage.id] += 1
        if self._losses[lost.stage.id] > RESTARTS:
            return False
        if self._joined is not None and self._joined.address == lost.cluster and (lost.gone or not self._cluster.local):
            self._joined = None  # the next stage starts another one, or counts what is left
        self.watch(Event("again", lost.stage, reason=str(error), log=self._log_of(lost)))
        return True

    def _wait(self, stage: Stage, why: str) -> None:
        if self._waits.get(stage.id) != why:
            self._waits[stage.id] = why
            self.watch(Event("waiting", stage, reason=why))

    def _start(
        self,
        stage: Stage,
        decision: Decision,
        cpus: int,
        finished: Mapping[str, Artifact],
        also: Sequence[tuple[Stage, Decision]],
    ) -> Running:
        fingerprint = decision.fingerprint or ""
        held = contextlib.ExitStack()
        held.enter_context(
            claim(self.store, f"{stage.name}-{stage.set}-{fingerprint[:16]}", f"{stage.id} in {self.store.url}")
        )
        joined = None
        if stage.engine == "ray":
            joined = self._joined or (_LATER if self._cluster.local else self._join(stage))
        task = {
            **self._task(decision, cpus, finished, joined),
            "also": [self._task(its, cpus, finished, joined) for _, its in also],
            "ray": self._cluster.of_stage(stage.name),
        }
        assert self._logs is not None and self._launch_child is not None  # since the run began
        log = self._logs / f"{stage.name}-{stage.set}-{fingerprint[:12]}.log"
        child_process = self._launch_child(cloudpickle.dumps(task), log)
        address = joined.address if joined is not None else None
        started = Running(stage, decision, child_process, log, cpus, address, time.monotonic(), held)
        self._selector.register(child_process.channel, selectors.EVENT_READ, started)
        self.watch(Event("started", stage, reason=decision.reason, log=self._log_of(started)))
        return started

    def _task(
        self, decision: Decision, cpus: int, finished: Mapping[str, Artifact], joined: Joined | None
    ) -> dict[str, Any]:
        """What the stage's `Context` is made of in its process."""
        stage = decision.stage
        return {
            "store": self.store,
            "stage": stage,
            "fingerprint": decision.fingerprint or "",
            "inputs": {role: finished[needed.stage.id] for role, needed in stage.inputs.items()},
            "cpus": cpus,
            "previous": decision.previous,
            "ray_address": joined.address if joined is not None else None,
        }

    def _listen(self, running: dict[str, Running]) -> Iterator[Running]:
        for key, _ in self._selector.select(timeout=1.0):
            one: Running = key.data
            data = os.read(one.child.channel, 65536)
            if not data:
                self._selector.unregister(one.child.channel)
                os.close(one.child.channel)
                del running[one.stage.id]
                one.child.wait()
                self._sweep(one)
                yield one
                continue
            *lines, one.buffer = (one.buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "wants" in message:
                    one.child.answer(json.dumps(self._ray_for(one)).encode())
                elif "progress" in message:
                    told = Progress(*message["progress"])
                    one.waits_for = told.waits_for
                    self.watch(Event("progress", one.stage, progress=told))
                else:
                    one.result = message

    def _ray_for(self, one: Running) -> dict[str, Any]:
        """What a stage is told that asks for Ray."""
        try:
            joined = self._join(one.stage)
        except LodesetError as error:
            return {"error": str(error)}
        one.cluster = joined.address
        return {"address": joined.address, "environment": dict(joined.environment)}

    def _sweep(self, one: Running) -> None:
        """Ends whatever is left of a stage's session (engine workers that outlived it)."""
        one.child.sweep()
        if not self.store.local and one.log.exists():
            with contextlib.suppress(OSError, LodesetError):  # a stage must not fail because its log cannot be written
                self.store.append(f"{LOGS}/{one.log.name}", one.log.read_bytes())
                one.log.unlink()

    def _finish(self, one: Running, finished: Mapping[str, Artifact]) -> Artifact:
        with one.held:
            result = one.result
            if result is None:
                code = one.child.wait()
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                one.gone = code == child.LOST_RAY
                if one.gone:
                    how = "lost its Ray cluster (killed, or out of memory)"
                if code == child.NO_ROOM:
                    how = f"gave up waiting for {one.waits_for}: give the cluster such a node, or ask for less (resources, training.workers)"
                if one.gone:
                    raise LostError(f"{one.stage.id} {how} (log: {self._log_of(one)})")
                raise LodesetError(f"{one.stage.id} {how}; {GOES_ON}. Its log: {self._log_of(one)}")
            if "error" in result:
                where = f" (log: {self._log_of(one)})" if result.get("unexpected") else ""
                message = f"{one.stage.id}: {result['error']}{where}"
                if result.get("lost"):
                    raise LostError(message)
                raise {3: GateError, 4: HeldError}.get(result["exit_code"], LodesetError)(message)
            artifact = self._accounted(one, _outcome(result["outcome"]), result["used"], finished)
        committed = self.store.commit_artifact(artifact)
        self.watch(Event("done", one.stage, artifact=committed))
        return committed

    def _log_of(self, one: Running) -> str:
        return self.store.full_url(f"{LOGS}/{one.log.name}")

    def _accounted(
        self,
        one: Running,
        outcome: Outcome,
        used: Mapping[str, Sequence[str]],
        finished: Mapping[str, Artifact],
    ) -> Artifact:
        rows = outcome.rows
        if not rows.balanced():
            raise LodesetError(
                f"{one.stage.id} lost count of its rows: {rows.taken} in, {rows.kept} kept, dropped {dict(rows.dropped)}; "
                "nothing was published. This is a defect of lodeset: please report it with the stage's log"
            )
        previous = one.decision.previous
        inputs = {
            role: {
                "stage": needed.stage.id,
                "identity": finished[needed.stage.id].identity(needed.of),
                "fingerprint": finished[needed.stage.id].fingerprint,
            }
            for role, needed in one.stage.inputs.items()
        }
        if one.stage.follows is not None and previous is not None:
            known = previous.fingerprint
            inputs[PREVIOUS] = {"stage": one.stage.id, "identity": known, "fingerprint": known}
        return Artifact(
            stage=one.stage.name,
            set=one.stage.set,
            version=one.stage.version,
            fingerprint=one.decision.fingerprint or "",
            config=canonical(one.stage.config),
            inputs=inputs,
            tables=outcome.tables,
            rows=rows,
            content=outcome.content,
            details=outcome.details,
            seconds=round(time.monotonic() - one.started, 3),
            created=time.time(),
            order=self.store.next_order(one.stage.name, one.stage.set),
            used={stage: tuple(keys) for stage, keys in used.items()},
        )


def _modules(stages: Mapping[str, Stage]) -> list[str]:
    """The modules that the processes of these stages import, in the order in which they are needed."""
    return list(dict.fromkeys(module_of(stage.function) for stage in stages.values()))


def _outcome(tree: Mapping[str, Any]) -> Outcome:
    return Outcome(
        tables={name: tuple(File(**f) for f in files) for name, files in tree["tables"].items()},
        rows=Rows(**tree["rows"]),
        content=tree["content"],
        details=tree["details"],
    )
