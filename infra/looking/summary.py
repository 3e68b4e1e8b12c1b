"""Where a run's results lie, and what to do with them next."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lodeset.infra.looking.held import Held
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.shown import shown
from lodeset.pipeline.specs import WriteShardsDetails
from lodeset.training.specs import TrainDetails

REPORTS = "reports"
TRAINED = ("train", "finish", "distill")

# Reads the images that count, wherever their shards lie; needs what lodeset needs.
SNIPPET = """import io
import fsspec, pyarrow.parquet as pq
from PIL import Image

folder = {folder!r}
with fsspec.open(folder + "/index.parquet", "rb") as file:
    index = pq.read_table(file).to_pylist()
for row in index:
    with fsspec.open(folder + "/" + row["shard"], "rb") as shard:
        shard.seek(row["offset"])
        image = Image.open(io.BytesIO(shard.read(row["size_bytes"])))
"""


@dataclass(frozen=True)
class Model:
    stage: str
    path: str  # a folder


@dataclass(frozen=True)
class Summary:
    """What `status --json` tells beside the artifacts.

    `run` is None where none has finished yet, and for stores of lodeset 0.1.0. `changed`: sources or configuration are others since;
    None: nobody can tell, because `why`.
    """

    run: int | None
    finished: str | None
    limit: int | None
    until: str | None
    changed: bool | None
    why: str
    shards: str | None  # the folder of the index
    images: int | None  # that count
    dead_bytes: int  # of shards, of images that count no more
    models: tuple[Model, ...]
    report: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report_path(number: int) -> str:
    return f"{REPORTS}/{number:06d}.html"


def summary(store: Store, held: Held) -> Summary:
    run = held.run
    written = held.artifacts.get("write_shards/all")
    shards = None if written is None else read_as(WriteShardsDetails, written.details)
    page = report_path(run.number) if run is not None else ""
    return Summary(
        run=run.number if run is not None else None,
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.ended)) if run is not None else None,
        limit=run.limit if run is not None else None,
        until=(run.until or None) if run is not None else None,
        changed=held.changed,
        why=held.why,
        shards=None if shards is None else store.full_url(shards.folder),
        images=written.rows.kept if written is not None else None,
        dead_bytes=0 if shards is None else shards.dead_bytes,
        models=_models(store, held.artifacts),
        report=store.full_url(page) if page and page.rpartition("/")[2] in store.names(REPORTS) else None,
    )


def _models(store: Store, artifacts: Mapping[str, Artifact]) -> tuple[Model, ...]:
    made = ((name, artifacts.get(f"{name}/all")) for name in (*TRAINED, "prune"))
    return tuple(
        Model(name, store.full_url(read_as(TrainDetails, artifact.details).folder))
        for name, artifact in made
        if artifact is not None
    )


def lines(told: Summary, config: str) -> list[str]:
    """The summary for people, a line each; `config` is how they named the configuration."""
    found = []
    if told.run is not None:
        trial = f", a sample of {told.limit:,} images" if told.limit is not None else ""
        part = f", up to {told.until}" if told.until else ""
        found.append(f"run {told.run}, finished {told.finished}{trial}{part}")
    else:
        found.append("no finished run of this configuration is on record: the table shows what the store holds so far")
    if told.changed:
        found.append(f"the configuration or its sources have changed since: `lodeset plan {config}` says what")
    elif told.changed is None and told.why:
        found.append(f"lodeset cannot tell now whether anything has changed since: {shown(told.why)}")
    if told.shards is not None:
        found.append(f"shards  {shown(told.shards)} ({told.images:,} images, listed in `index.parquet`)")
    found += [
        f"{'pruned' if model.stage == 'prune' else 'model'}   {shown(model.path)} ({model.stage})"
        for model in told.models
    ]
    if told.report is not None:
        found.append(f"report  {shown(told.report)}")
    elif told.run is not None:
        found.append(f"report  not written yet, or deleted by a take-down: `lodeset report {config}` writes one")
    return found + _next(told, config)


def _next(told: Summary, config: str) -> list[str]:
    if told.shards is None:
        return [f"next: `lodeset run {config}` goes on to the shards"] if told.run is not None else []
    found = []
    trained = [model for model in told.models if model.stage in TRAINED]
    if trained:
        path = shown(trained[-1].path)
        embed = f"embed: {{semantic: {{kind: huggingface, model: {path}}}}}"
        found.append(f"next: `lodeset export {path} model.onnx`, or curate with the model (`{embed}`)")
    else:
        found.append(f"next: add `training: {{recipe: tiny}}` to {config} and run again")
    found.append(f"`lodeset status {config} --snippet` prints Python that reads the shards")
    if told.dead_bytes:
        found.append(
            f"{told.dead_bytes / 1e6:,.1f} MB of the shards are images that no longer count: `lodeset compact {config}` writes shards without them"
        )
    return found


def snippet(told: Summary) -> str:
    """Python that reads the images of the shards."""
    return SNIPPET.format(folder=told.shards)
