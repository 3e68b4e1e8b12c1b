"""A configuration with its graph and its store, which every command begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lodeset.infra.config import Config, read
from lodeset.pipeline.errors import ConfigError, LodesetError

if TYPE_CHECKING:
    from lodeset.pipeline.dag.stage import Stage
    from lodeset.pipeline.dag.store import Store


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
    overridden: bool = False  # by `--set`


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
    from lodeset.pipeline.dag.stage import closure
    from lodeset.pipeline.dag.store import Store

    if limit is not None:
        overrides = (*overrides, f"ingest.limit={limit}")
    config = read(path, overrides)
    try:
        stages = dag.build(config)
    except ConfigError:
        raise
    except LodesetError as error:
        if not without_sources or not any(one.expected for one in config.curated):
            raise
        return Opened(Path(path), config, {}, Store(config.store), missing_sources(config) or (str(error),))
    names = sorted({stage.name for stage in stages.values()})
    if until is not None and until not in names:
        raise ConfigError(f"--until {until}: no such stage in this configuration; there are: {', '.join(names)}")
    chosen = closure(stages, until)
    return Opened(
        Path(path), config, chosen, Store(config.store), (), tuple(closure(stages, None)), until, bool(overrides)
    )


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
        return Opened(Path(path), config, {}, Store(config.store), (str(error),), overridden=bool(overrides))


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
