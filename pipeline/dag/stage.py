"""A stage: a frozen handle around a plain function. Making one runs nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Generic, Literal

from typing_extensions import TypeVar

from lodeset.pipeline.dag.fingerprint import canonical, digest
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.references import resolved

Engine = Literal["beam", "ray"]
Spec = TypeVar("Spec", default=Any)  # a frozen dataclass of what a stage is
Runtime = TypeVar("Runtime", default=Any)  # a frozen dataclass of how it runs
Read = TypeVar("Read")
# The role that its own last artifact plays among the inputs of a stage that goes on from it.
PREVIOUS = "previous"


@dataclass(frozen=True)
class Input:
    """Depends on a stage: on all of it, or (`of`) on one named digest of its content.

    Only `ingest` names such digests. It is where places end: what lies downstream depends on the images, not on the
    folder that they were found in.
    """

    stage: Stage
    of: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a stage's function returns; the runner checks the rows and writes the manifest.

    `details` is a mapping of JSON types, or a frozen dataclass of these (fields that are None are left out).
    """

    tables: Mapping[str, tuple[File, ...]]
    rows: Rows
    content: Mapping[str, str] = field(default_factory=dict)
    details: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Follows:
    """A stage goes on from its last artifact that agrees with it in these keys of the configuration.

    With `published`, (id of a later stage, role that this one plays there), it is the artifact that the last one of that
    stage was made from: what was tried out in between does not count. Its own last one, as long as there is none of that.
    """

    keys: tuple[str, ...]
    published: tuple[str, str] | None = None


@dataclass(frozen=True)
class Stage(Generic[Spec, Runtime]):
    """One node of the DAG.

    Attributes:
        name, set: what it does, to which set (`pool`, a curated set's name, ..., or `all`).
        version: raised whenever the function's results change.
        function: `Context -> Outcome`, importable by name (see `deferred`).
        spec: what it is; enters the fingerprint.
        inputs: the stages it reads, by the role they play.
        runtime: how it runs (part sizes, places); never enters a fingerprint.
        max_cpus: more cores than this would idle.
        frozen: fitted once and taken over by later runs even when its inputs have changed, unless these are frozen
            themselves (`--fresh` refits).
        follows: which of its own artifacts it goes on from, as an input like any other (`--fresh` starts anew).
        seconds_per_image: a rough rate on 2 cores, for `plan` before anything was run; of a unit of `work` where that
            is given.
        work: how much it does, where the number of images that come in does not say it (steps x batch of training); a
            stage that has it puts it into its details, so that `plan` can scale the time of the last run.
        size_bytes: what it will store, where its configuration says it.
        also: ids of stages that read the same bytes. Where they are to run in the same run, they wait for this one, which
            makes their parts in its own pass; never in the fingerprint.
        most: images that it lets through at most, where its configuration says it; for `plan`.
        advice: what `plan` adds where a key of the specification has changed since the last run, by key.
        reads: files that the configuration names and that it goes by, beside its inputs; for lineage.
    """

    name: str
    set: str
    version: int
    engine: Engine
    function: Callable[[Context[Spec, Runtime]], Outcome]
    spec: Spec
    inputs: Mapping[str, Input] = field(default_factory=dict)
    runtime: Runtime = None  # type: ignore[assignment]  # a stage without knobs of its own has none
    max_cpus: int = 1_000_000
    frozen: bool = False
    follows: Follows | None = None
    seconds_per_image: float = 0.0
    work: int = 0
    size_bytes: int | None = None
    also: tuple[str, ...] = ()
    most: int | None = None
    advice: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.name}/{self.set}"

    @property
    def config(self) -> Mapping[str, Any]:
        """Its specification as JSON types, as artifacts hold it."""
        tree: Mapping[str, Any] = canonical(self.spec)
        return tree

    def fingerprint(self, finished: Mapping[str, Artifact], previous: str | None = None) -> str | None:
        """SHA-256 of (name, version, specification, inputs); None while an input is not finished.

        `previous` is the fingerprint of what it goes on from. The set's *name* is no part of it, so that two sets with the
        same content share parts.
        """
        identities = {} if previous is None else {PREVIOUS: previous}
        for role, needed in self.inputs.items():
            artifact = finished.get(needed.stage.id)
            if artifact is None:
                return None
            identities[role] = artifact.identity(needed.of)
        return digest(self.name, self.version, self.spec, identities)


def finished(artifact: Artifact) -> Stage:
    """The stage that an artifact was made by, for others to depend on and for display; it cannot be run again."""
    return Stage(artifact.stage, artifact.set, artifact.version, "ray", only_read, artifact.config)


def only_read(context: Context) -> Outcome:
    """The function of a stage that is there to be looked at."""
    raise AssertionError(f"{context.stage.id} is only read")


def deferred(reference: str) -> Callable[[Context], Outcome]:
    """The function `reference` ("package.module:name"), imported when it is called: a graph is built without its engines."""
    return functools.partial(_called, reference)


def module_of(function: Callable[[Context], Outcome]) -> str:
    """The module of a stage's function, which need not be imported yet."""
    if isinstance(function, functools.partial) and function.func is _called:
        return str(function.args[0]).partition(":")[0]
    return function.__module__


def _called(reference: str, context: Context) -> Outcome:
    outcome: Outcome = resolved(reference)(context)
    return outcome


def as_mapping(details: Any) -> dict[str, Any]:
    """Details as a manifest holds them."""
    if isinstance(details, Mapping):
        return dict(details)
    return {name: value for name, value in asdict(details).items() if value is not None}


def read_as(cls: type[Read], tree: Mapping[str, Any]) -> Read:
    """A dataclass from what an artifact holds; keys that the dataclass does not have are ignored, fields have their defaults.

    Raises:
        LodesetError: a field without a default is missing.
    """
    named = [one for one in fields(cls) if one.init]  # type: ignore[arg-type]
    needed = [one.name for one in named if one.default is MISSING and one.default_factory is MISSING]
    lacking = [name for name in needed if name not in tree]
    if lacking:
        raise LodesetError(
            f"a manifest of the store lacks {', '.join(lacking)} ({cls.__name__}): another version of lodeset wrote it; run again "
            "with `--fresh`, or use a new store"
        )
    return cls(**{one.name: tree[one.name] for one in named if one.name in tree})


@dataclass(frozen=True)
class Progress:
    """How far a stage, or a phase of it, is (0..1), and how many units (images, pairs) it has dealt with in this run.

    Attributes:
        phase: what goes on, where a stage does one thing after another; each begins at 0.
        parts_done, parts: committed parts and all parts of the phase, where it has parts and knows how many.
        waits_for: what it lacks at the moment, e.g. a free GPU of the cluster.
    """

    fraction: float
    count: int = 0
    unit: str = "images"
    phase: str = ""
    parts_done: int | None = None
    parts: int | None = None
    waits_for: str = ""


@dataclass(frozen=True)
class Context(Generic[Spec, Runtime]):
    """What a stage's function is given.

    Attributes:
        previous: its last artifact: a stage that does not follow it may look there for work done, never for what is true.
        also: what the stages would be given whose parts it makes on the way.
    """

    store: Store
    stage: Stage[Spec, Runtime]
    fingerprint: str
    inputs: Mapping[str, Artifact]
    cpus: int
    report: Callable[[Progress], None]
    previous: Artifact | None = None
    ray_address: str | None = None
    also: tuple[Context[Spec, Runtime], ...] = ()

    @property
    def spec(self) -> Spec:
        return self.stage.spec

    @property
    def runtime(self) -> Runtime:
        return self.stage.runtime


def closure(stages: Mapping[str, Stage], until: str | None) -> dict[str, Stage]:
    """The stages, in topological order; with `until`, only that stage (all its sets) and what it needs."""
    order: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.id in order:
            return
        for needed in stage.inputs.values():
            visit(needed.stage)
        order[stage.id] = stage

    for stage in stages.values():
        if until is None or stage.name == until:
            visit(stage)
    return order
