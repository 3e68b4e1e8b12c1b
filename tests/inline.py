"""Stages run in this process, without an engine, on artifacts made by hand."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import id_of, picture

from lodeset.pipeline import stages
from lodeset.pipeline.dag import runner
from lodeset.pipeline.dag.child import perform
from lodeset.pipeline.dag.cluster import Joined
from lodeset.pipeline.dag.stage import Context, Outcome, Stage, as_mapping
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.engines import ray
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.vectors import vector_table


def map_with_state(make: Callable[[], Callable[[Any], Any]], items: Iterable[Any], **_: Any) -> Iterator[Any]:
    return map(make(), items)


@contextmanager
def holding(
    make: Callable[[Any], Any], items: Iterable[Any], *, cpus_each: int, address: str | None
) -> Iterator[Callable[[Callable[[Any], Any]], list[Any]]]:
    held = [make(item) for item in items]
    yield lambda work: [work(one) for one in held]


class InThisProcess:
    """Runs a stage at once in this process, where the runner would start a child process for it."""

    def __init__(self, task: bytes, log: Path) -> None:
        told: list[dict[str, Any]] = []
        perform(task, told.append)
        self.channel, write = os.pipe()
        lines = "".join(json.dumps(message) + "\n" for message in told).encode()
        # In a thread, since a pipe holds 64 KiB until the runner reads it.
        self._writer = threading.Thread(target=_write_all, args=(write, lines))
        self._writer.start()

    def answer(self, message: bytes) -> None:
        raise AssertionError("nothing that runs in this process asks for Ray")

    def wait(self) -> int:
        self._writer.join()
        return 0

    def sweep(self) -> None:
        """Nothing outlives what ran in this process."""


def _write_all(pipe: int, data: bytes) -> None:
    with os.fdopen(pipe, "wb") as file:
        file.write(data)


def map_items(function: Callable[[Any], Any], items: Iterable[Any], **_: Any) -> Iterator[Any]:
    return map(function, items)


_INSTEAD = {
    "map_items": map_items,
    "map_with_state": map_with_state,
    "holding": holding,
    "job": lambda _: nullcontext(),
}


def without_engine(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Runs in this process what a module would give to Ray."""
    names = [name for name in _INSTEAD if hasattr(module, name)]
    assert names, f"{module.__name__} gives nothing to Ray"
    for name in names:
        patch.setattr(module, name, _INSTEAD[name])


def alone_in_this_process(patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Training or pruning alone runs its stages in this process, and gives nothing of these modules to Ray."""
    for module in modules:
        without_engine(module, patch)
    patch.setattr(runner, "Runner", functools.partial(runner.Runner, launch=InThisProcess))
    patch.setattr(ray, "cluster", lambda wanted, cpus: nullcontext(Joined("nowhere", cpus)))


@contextmanager
def in_one_process() -> Iterator[None]:
    """Commands run every stage of curation in this process: no child processes, and no Ray. Beam keeps its workers."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # What else only a stage's process would be told.
        warnings.filterwarnings("ignore", category=ImportWarning)  # Beam, when it is first imported
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        for found in pkgutil.walk_packages(stages.__path__, f"{stages.__name__}."):
            module = importlib.import_module(found.name)
            if any(hasattr(module, name) for name in _INSTEAD):
                without_engine(module, patch)
        alone_in_this_process(patch)
        yield


def ran(
    store: Store, stage: Stage, inputs: Mapping[str, Artifact], cpus: int = 1, previous: Artifact | None = None
) -> Artifact:
    """The artifact of a stage whose function is called here; another one where it goes on from `previous`."""
    given = {role: inputs[needed.stage.id] for role, needed in stage.inputs.items()}
    fingerprint = f"of-{stage.name}-{cpus}" + (f"-after-{previous.fingerprint}" if previous else "")
    outcome = stage.function(Context(store, stage, fingerprint, given, cpus, lambda _: None, previous))
    return artifact(stage.name, stage.set, outcome)


def artifact(stage: str, set_: str, outcome: Outcome) -> Artifact:
    assert outcome.rows.balanced()
    content = {"images": f"images-{set_}", "metadata": f"metadata-{set_}", **outcome.content}
    details = as_mapping(outcome.details)
    return Artifact(stage, set_, 1, f"{stage}-{set_}", {}, {}, outcome.tables, outcome.rows, content, details, 1.0, 1.0)


def listed(store: Store, path: str, rows: int = 0) -> File:
    """A file that lies in the store, as a manifest lists it."""
    data = Path(store.path(path)).read_bytes()
    return File(path, rows, len(data), hashlib.sha256(data).hexdigest())


def target_set(store: Store, folder: Path, side: int, vectors_of: slice = slice(None)) -> dict[str, Artifact]:
    """`ingest` and `embed` of a target set `target`: 12 images in 2 classes, 8 gallery and 4 test, `side` pixels a side.

    The vectors tell the classes apart; `vectors_of` says which images have one.
    """
    folder.mkdir(parents=True)
    places, told, vectors = [], [], []
    for n in range(12):
        data = picture(n, width=side, height=side)
        (folder / f"{n}.png").write_bytes(data)
        places.append(("target", str(folder / f"{n}.png"), "", 0, id_of(data), len(data)))
        split = "gallery" if n < 8 else "test"
        told.append((id_of(data), "", "even" if n % 2 == 0 else "odd", None, None, None, f'{{"split": "{split}"}}'))
        vectors.append([1.0, 0.0] if n % 2 == 0 else [0.0, 1.0])

    def table(schema: pa.Schema, rows: list[tuple[Any, ...]]) -> pa.Table:
        return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)

    ingested = {"locations": table(records.LOCATIONS, places), "metadata": table(records.METADATA, told)}
    chosen = [place[4] for place in places][vectors_of]
    embedded = {"vectors": vector_table(chosen, np.asarray(vectors, np.float16)[vectors_of])}
    made = {}
    for stage, tables in (("ingest", ingested), ("embed", embedded)):
        files = store.commit_part(stage, "by-hand", tables).files
        outcome = Outcome({name: (file,) for name, file in files.items()}, Rows(12, 12))
        made[f"{stage}/target"] = artifact(stage, "target", outcome)
    return made


def as_task(stage: Stage, store: str = "memory://unused") -> dict[str, Any]:
    """What the runner sends to the process of a stage that has no inputs."""
    return {
        "store": Store(store),
        "stage": stage,
        "fingerprint": "f" * 64,
        "inputs": {},
        "cpus": 1,
        "previous": None,
        "ray_address": None,
        "also": [],
        "ray": {},
    }


@contextmanager
def no_ray() -> Iterator[Joined]:
    """For runners whose stages need no cluster."""
    raise AssertionError("no stage here needs Ray")
    yield Joined("", 0)
