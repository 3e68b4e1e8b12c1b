"""plan, run, status, trace as functions; the command line prints what these return."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import dag
from infra.config import Config, read
from infra.estimate import Estimate, estimates
from pipeline.dag.runner import Decision, Event, Runner, decide
from pipeline.dag.stage import Stage, closure
from pipeline.dag.store import Artifact, Store
from pipeline.engines.ray import cluster
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Opened:
    """A configuration with its graph and its store."""

    config: Config
    stages: Mapping[str, Stage]
    store: Store


def open_config(
    path: str | Path, overrides: tuple[str, ...] = (), until: str | None = None, limit: int | None = None
) -> Opened:
    """Reads a configuration, lists its sources and builds the graph; runs nothing.

    Raises:
        ConfigError: the file, a key, a value, or `until` is wrong.
        LodesetError: a source or a model is not there.
    """
    if limit is not None:
        overrides = (*overrides, f"ingest.limit={limit}")
    config = read(path, overrides)
    stages = dag.build(config)
    names = sorted({stage.name for stage in stages.values()})
    if until is not None and until not in names:
        raise ConfigError(f"--until {until}: no such stage in this configuration; there are: {', '.join(names)}")
    return Opened(config, closure(stages, until), Store(config.store))


def cpus_of(config: Config) -> int:
    """The budget of cores: as configured, or what this process may use."""
    if config.resources.cpus != "auto":
        return config.resources.cpus
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(opened: Opened, fresh: bool = False) -> list[tuple[Decision, Estimate]]:
    """What `run` would do, and why, with estimated time and bytes."""
    decisions = decide(opened.store, opened.stages, fresh)
    return list(zip(decisions.values(), estimates(opened.store, decisions, cpus_of(opened.config)), strict=True))


def run(opened: Opened, watch: Callable[[Event], None], fresh: bool = False) -> dict[str, Artifact]:
    """Runs what is not finished and returns every artifact by stage id.

    Raises:
        LodesetError: the first stage that failed; what was finished stays.
    """
    cpus = cpus_of(opened.config)
    ray: Callable[[], contextlib.AbstractContextManager[str]] = functools.partial(
        cluster, opened.config.resources.ray_address, cpus
    )
    return Runner(opened.store, cpus, ray, watch, fresh).run(opened.stages)


def artifacts(opened: Opened) -> dict[str, Artifact]:
    """The finished artifacts of this configuration, by stage id."""
    return {id_: d.artifact for id_, d in decide(opened.store, opened.stages).items() if d.artifact is not None}


def status(opened: Opened) -> list[dict[str, Any]]:
    """One entry a stage and set, as `lodeset status --json` prints them."""
    finished = artifacts(opened)
    return [_entry(opened.store, stage, finished.get(stage.id)) for stage in opened.stages.values()]


def _entry(store: Store, stage: Stage, artifact: Artifact | None) -> dict[str, Any]:
    known: dict[str, Any] = {"stage": stage.name, "set": stage.set, "finished": artifact is not None}
    if artifact is None:
        return {**known, "manifest": None, "files": [], "tables": {}, "rows": None, "seconds": None, "details": {}}
    tables = {name: [store.full_url(f.path) for f in files] for name, files in artifact.tables.items()}
    rows = artifact.rows
    return {
        **known,
        "manifest": store.manifest_path(artifact),
        "files": [url for urls in tables.values() for url in urls],
        "tables": tables,
        "rows": {"in": rows.taken, "kept": rows.kept, "dropped": dict(rows.dropped)},
        "seconds": artifact.seconds,
        "details": dict(artifact.details),
    }
