"""A configuration with its graph and its store, which every command begins with, and the run of its stages."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lodeset.infra.config import Config, cpus_of, read
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.remote.settings import configure

if TYPE_CHECKING:
    from lodeset.infra.upkeep.rollback import DataSet
    from lodeset.pipeline.config import RayCluster
    from lodeset.pipeline.dag.cluster import Cluster
    from lodeset.pipeline.dag.manifests import Run
    from lodeset.pipeline.dag.runner import Event
    from lodeset.pipeline.dag.stage import Stage
    from lodeset.pipeline.dag.store import Artifact, Store


@dataclass(frozen=True)
class Opened:
    """A configuration with its graph and its store."""

    path: Path
    config: Config
    stages: Mapping[str, Stage]
    store: Store
    missing: tuple[str, ...] = ()  # why there is no graph, where that was asked for: a source or a model is not there
    ids: tuple[str, ...] = ()  # every stage of the configuration; `stages` are those up to the one that was asked for
    until: str | None = None
    overrides: tuple[str, ...] = ()  # of `--set`, and of `--limit`

    @property
    def overridden(self) -> bool:
        return bool(self.overrides)


def open_config(
    path: str | Path,
    overrides: tuple[str, ...] = (),
    until: str | None = None,
    limit: int | None = None,
    without_sources: bool = False,
) -> Opened:
    """Reads a configuration, lists its sources and builds the graph; runs nothing.

    `without_sources` opens a configuration that says what its sets are `expected` to hold even where sources or models
    are not there: without stages, and with what is `missing`.

    Raises:
        ConfigError: the file, a key, a value, or `until` is wrong.
        LodesetError: a source or a model is not there.
    """
    from lodeset.infra import dag
    from lodeset.infra.gates.config import unknown_stages
    from lodeset.pipeline.dag.stage import closure
    from lodeset.pipeline.dag.store import Store

    if limit is not None:
        overrides = (*overrides, f"ingest.limit={limit}")
    config = read(path, overrides)
    configure(config.resources)
    try:
        stages = dag.build(config)
    except ConfigError:
        raise
    except LodesetError as error:
        if not without_sources or not any(one.expected for one in config.curated):
            raise
        return Opened(Path(path), config, {}, Store(config.store), missing_sources(config) or (str(error),))
    misplaced = unknown_stages(config.gates, tuple(stages))
    if misplaced:
        raise ConfigError(f"{path}:\n  " + "\n  ".join(misplaced))
    names = sorted({stage.name for stage in stages.values()})
    if until is not None and until not in names:
        raise ConfigError(f"--until {until}: no such stage in this configuration; there are: {', '.join(names)}")
    chosen = closure(stages, until)
    return Opened(Path(path), config, chosen, Store(config.store), (), tuple(closure(stages, None)), until, overrides)


def open_store(path: str | Path, overrides: tuple[str, ...] = (), limit: int | None = None) -> Opened:
    """Like `open_config`, for what is shown of a store: sources and models need not be there.

    Raises:
        ConfigError: the file, a key or a value is wrong.
        LodesetError: the store cannot be opened.
    """
    from lodeset.pipeline.dag.store import Store

    try:
        return open_config(path, overrides, limit=limit)
    except LodesetError as error:
        limits = (f"ingest.limit={limit}",) if limit is not None else ()
        config = read(path, (*overrides, *limits))
        configure(config.resources)
        return Opened(Path(path), config, {}, Store(config.store), (str(error),), overrides=(*overrides, *limits))


def missing_sources(config: Config) -> tuple[str, ...]:
    """One message a set whose sources cannot be listed."""
    from lodeset.pipeline.graph import sets_of
    from lodeset.pipeline.sources.listing import expand

    found = []
    for name, sources in sets_of(config).items():
        try:
            expand(sources, name)
        except LodesetError as error:
            found.append(str(error))
    return tuple(found)


def run(opened: Opened, watch: Callable[[Event], None], fresh: bool = False) -> dict[str, Artifact]:
    """Runs what is not finished and returns every artifact by stage id; `fresh` takes nothing over from earlier runs. The store
    keeps a record of the run, its report, and what the gates of the configuration found.

    Raises:
        LodesetError: the first stage that failed; what was finished stays.
        HeldError: another run is at work on the store, or nothing has changed since a run that was rolled back.
        BreachedError: a gate of the configuration was breached; the run is recorded, as every other.
    """
    from lodeset.infra.observing.lineage import traced
    from lodeset.infra.observing.notify import notified
    from lodeset.pipeline.remote.retries import summed_up

    config, store = opened.config, opened.store.url
    with (
        summed_up(),
        notified(config.notify, watch, name=config.name, store=store, config=str(opened.path)) as told,
        traced(config.lineage, told, name=config.name, store=store) as told,
    ):
        return _run(opened, told, fresh)


def _run(opened: Opened, watch: Callable[[Event], None], fresh: bool) -> dict[str, Artifact]:
    from lodeset.infra.gates.commands import BreachedError, evaluated
    from lodeset.infra.looking.held import wanted
    from lodeset.infra.upkeep.rollback import refusing
    from lodeset.infra.versions import versions
    from lodeset.pipeline.dag.runs import record

    began = time.time()
    if not fresh:
        watch = refusing(opened.store, data_set(opened), opened.stages, watch)

    def finish(made: dict[str, Artifact]) -> None:
        asked = wanted(opened.config, opened.ids or tuple(opened.stages), opened.until)
        done = record(opened.store, asked, made, versions(), began, time.time())
        keep(opened, done)
        if opened.config.gates:
            outcome = evaluated(opened, done)
            if outcome.status == "error":
                raise BreachedError(outcome)

    return run_stages(opened, opened.stages, watch, names_of(opened) if fresh else (), finish=finish)


def keep(opened: Opened, run: Run) -> None:
    """Puts what describes the run into the store: its report, and the card of its shards."""
    from lodeset.infra.card.card import keep_card

    keep_report(opened, run)
    keep_card(opened, run)


def keep_report(opened: Opened, run: Run) -> None:
    """Puts the run's report into the store. The run is done: what goes wrong here must not fail it."""
    from lodeset.infra.looking.looking import held, title_of
    from lodeset.infra.looking.summary import REPORTS, report_path
    from lodeset.infra.report.render import page_of

    path = report_path(run.number)
    if path.rpartition("/")[2] in opened.store.names(REPORTS):
        return
    try:
        shown = held(opened, run.number)
        page = page_of(opened.store, shown.stages(opened.stages), shown.artifacts, title_of(opened))
        opened.store.put_absent(path, page.encode())
    except Exception as error:
        logging.getLogger("lodeset").warning(
            "the run is done, but its report could not be written (%s: %s); `lodeset report` tries again",
            type(error).__name__,
            error,
        )


def data_set(opened: Opened) -> DataSet:
    """Which runs of the store are those of this configuration."""
    from lodeset.infra.upkeep.rollback import DataSet

    return DataSet(opened.config.name, opened.config.ingest.limit, str(opened.path))


def names_of(opened: Opened) -> frozenset[str]:
    return frozenset(stage.name for stage in opened.stages.values())


def run_stages(
    opened: Opened,
    stages: Mapping[str, Stage],
    watch: Callable[[Event], None],
    fresh: Container[str],
    given: Mapping[str, Artifact] | None = None,
    finish: Callable[[dict[str, Artifact]], None] = lambda made: None,
) -> dict[str, Artifact]:
    """`given` is what stages are made from that are not to be run; `finish` is called with what was made, while the run still holds
    its claim.
    """
    config = opened.config
    return run_in(
        opened.store,
        stages,
        name=config.name,
        limit=config.ingest.limit,
        until=opened.until or "",
        cpus=cpus_of(config),
        ray=cluster_of(config.resources.cluster),
        watch=watch,
        fresh=fresh,
        given=given,
        finish=finish,
    )


def cluster_of(configured: RayCluster) -> Cluster:
    """The Ray cluster of a configuration, as the runner takes it."""
    from lodeset.pipeline.dag.cluster import Cluster

    return Cluster(
        address=configured.address,
        cpus=None if configured.cpus == "auto" else configured.cpus,
        wait_for_nodes=configured.wait_for_nodes,
        namespace=configured.namespace,
        env=configured.env,
        object_store_bytes=int(configured.object_store_mb * 2**20),
        in_place_s=configured.in_place_s,
        placement={name: where.model_dump() for name, where in configured.placement.items()},
    )


def run_in(
    store: Store,
    stages: Mapping[str, Stage],
    *,
    name: str,
    cpus: int,
    ray: Cluster,
    watch: Callable[[Event], None],
    limit: int | None = None,
    until: str = "",
    fresh: Container[str] = (),
    given: Mapping[str, Artifact] | None = None,
    finish: Callable[[dict[str, Artifact]], None] = lambda made: None,
) -> dict[str, Artifact]:
    """Runs the stages that are not finished in a store, and returns every artifact by stage id.

    Args:
        name, limit, until: which data set this makes, and how far; one run at a time may make it.
        finish: is called with what was made, while the run still holds its claim.

    Raises:
        LodesetError: the first stage that failed; what was finished stays.
        HeldError: another run of the data set, a take-down, or another run of the same stage is at work on the store.
    """
    from lodeset.infra.checks import before
    from lodeset.infra.upkeep.damage import TRIES, mend
    from lodeset.infra.versions import versions
    from lodeset.pipeline.dag.attempts import attempt, claim_name
    from lodeset.pipeline.dag.claims import claim
    from lodeset.pipeline.dag.damage import noted
    from lodeset.pipeline.dag.runner import Runner
    from lodeset.pipeline.engines.ray import cluster
    from lodeset.pipeline.tables.forgotten import refuse_during_take_down

    joining = functools.partial(cluster, ray, cpus)

    def running(some: Mapping[str, Stage], told: Callable[[Event], None]) -> dict[str, Artifact]:
        return Runner(store, cpus, joining, told, fresh, cluster=ray).run(some, given or {})

    store.prepare()
    # A run and a take-down put their claims first, and then look for the other's.
    mine = claim_name(name, limit)
    with claim(store, mine, f"{name} in {store.url}"):
        refuse_during_take_down(store)
        with attempt(store, stages, watch, name=name, limit=limit, until=until, versions=versions()) as told:
            for tries_left in reversed(range(TRIES)):
                for _ in range(TRIES):
                    if not mend(store, stages, mine, told, given or {}):
                        break
                try:
                    then = before(store, stages, running, told, given or {})
                    made = running(stages, then)
                    break
                except LodesetError:
                    # Readers leave a note of what they find damaged.
                    if not tries_left or not noted(store):
                        raise
            finish(made)
            return made
