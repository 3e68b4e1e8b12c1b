"""Where the results of a run are, and what to do with them next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lodeset.infra.gates.accepted import accepted
from lodeset.infra.gates.outcome import Outcome, last_outcome
from lodeset.infra.looking.held import Held
from lodeset.pipeline.dag.manifests import RolledBack, Run
from lodeset.pipeline.dag.rollbacks import last_of, standing
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.shown import shown
from lodeset.pipeline.specs import WriteShardsDetails
from lodeset.training.specs import TrainDetails

REPORTS = "reports"
CARDS, README, CROISSANT = "cards", "README.md", "croissant.json"
TRAINED = ("train", "finish", "distill")

# Reads the images that count, wherever their shards are; needs the packages that lodeset needs.
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
    """What `status --json` prints in addition to the artifacts.

    `run` is None if none has finished yet, and for stores of lodeset 0.1.0. `changed`: whether sources or configuration
    have changed since; None if that cannot be determined, because of `why`. `accepted`: the run that gates compare
    with. `rolled_back`: if what counts is that of a rollback, to which run, and which runs do not count anymore.
    `gates`: what the last evaluation of gates on this run found.
    """

    run: int | None
    finished: str | None
    limit: int | None
    until: str | None
    changed: bool | None
    why: str
    shards: str | None  # the folder of the index
    images: int | None  # number of images that count
    dead_bytes: int  # bytes of images in shards that no longer count
    models: tuple[Model, ...]
    report: str | None
    accepted: int | None = None
    rolled_back: Mapping[str, Any] | None = None
    gates: Outcome | None = None
    card: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report_path(number: int) -> str:
    return f"{REPORTS}/{number:06d}.html"


def card_folder(number: int) -> str:
    return f"{CARDS}/{number:06d}"


def summary(store: Store, held: Held) -> Summary:
    run = held.run
    event = accepted(store, run.name, run.limit) if run is not None else None
    back = _back(store, run) if run is not None else None
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
        accepted=event.run if event is not None else None,
        rolled_back=None
        if back is None
        else {
            "to": back.to,
            "runs": list(back.runs),
            "at": back.at,
            "by": back.by,
            "why": back.why,
        },
        gates=last_outcome(store, run.number) if run is not None else None,
        card=_card(store, run),
    )


def _back(store: Store, run: Run) -> RolledBack | None:
    """The rollback that made this record, or that the last run has not ended."""
    newest = last_of(store, run.name, run.limit)
    if run.rolled_back is not None or newest is None or newest.number != run.number:
        return run.rolled_back
    return standing(store, run.name, run.limit)


def _card(store: Store, run: Run | None) -> str | None:
    """The dataset card of a run; None if it was not written yet, or deleted by a take-down."""
    folder = card_folder(run.number) if run is not None else ""
    return store.full_url(f"{folder}/{README}") if folder and README in store.names(folder) else None


def _models(store: Store, artifacts: Mapping[str, Artifact]) -> tuple[Model, ...]:
    made = ((name, artifacts.get(f"{name}/all")) for name in (*TRAINED, "prune"))
    return tuple(
        Model(name, store.full_url(read_as(TrainDetails, artifact.details).folder))
        for name, artifact in made
        if artifact is not None
    )


def lines(summary_: Summary, config: str) -> list[str]:
    """The summary for people, one line each; `config` is the name of the configuration that they used."""
    out = []
    if summary_.run is not None:
        trial = f", a sample of {summary_.limit:,} images" if summary_.limit is not None else ""
        part = f", up to {summary_.until}" if summary_.until else ""
        accepted_ = "" if summary_.accepted is None else f"; the accepted run is {summary_.accepted}"
        accepted_ = ", accepted" if summary_.accepted == summary_.run else accepted_
        out.append(f"run {summary_.run}, finished {summary_.finished}{trial}{part}{accepted_}")
        out += _rolled_back(summary_) + _gates(summary_, config)
    else:
        out.append("no finished run of this configuration is on record: the table shows what the store holds so far")
    if summary_.changed:
        out.append(f"the configuration or its sources have changed since: `lodeset plan {config}` shows the changes")
    elif summary_.changed is None and summary_.why:
        out.append(f"lodeset cannot tell now whether anything has changed since: {shown(summary_.why)}")
    if summary_.shards is not None:
        out.append(f"shards  {shown(summary_.shards)} ({summary_.images:,} images, listed in `index.parquet`)")
    out += [
        f"{'pruned' if model.stage == 'prune' else 'model'}   {shown(model.path)} ({model.stage})"
        for model in summary_.models
    ]
    if summary_.report is not None:
        out.append(f"report  {shown(summary_.report)}")
    elif summary_.run is not None:
        out.append(f"report  not written yet, or deleted by a take-down: `lodeset report {config}` writes one")
    if summary_.card is not None:
        out.append(f"card    {shown(summary_.card)}")
    return out + _next(summary_, config)


def _rolled_back(summary_: Summary) -> list[str]:
    back = summary_.rolled_back
    if back is None:
        return []
    why = f" ({shown(back['why'])})" if back["why"] else ""
    return [
        f"rolled back to run {back['to']} on {back['at']} by {shown(back['by'])}{why}: what {numbered(back['runs'])} made does not "
        "count"
    ]


def numbered(runs: Sequence[int]) -> str:
    """E.g. `run 3`, or `runs 3, 4`."""
    return f"{'run' if len(runs) == 1 else 'runs'} {', '.join(map(str, runs))}"


def _gates(summary_: Summary, config: str) -> list[str]:
    if summary_.gates is None:
        return []
    return [f"gates   {summary_.gates.said}: `lodeset gates {config}` shows them"]


def _next(summary_: Summary, config: str) -> list[str]:
    if summary_.shards is None:
        return [f"next: `lodeset run {config}` continues to the shards"] if summary_.run is not None else []
    out = []
    trained = [model for model in summary_.models if model.stage in TRAINED]
    if trained:
        path = shown(trained[-1].path)
        embed = f", or curate with the model (`embed: {{semantic: {{kind: huggingface, model: {path}}}}}`)"
        out.append(f"next: `lodeset export {path} model.onnx`{'' if '://' in path else embed}")
    else:
        out.append(f"next: add `training: {{recipe: tiny}}` to {config} and run again")
    out.append(f"`lodeset status {config} --snippet` prints Python that reads the shards")
    if summary_.dead_bytes:
        out.append(
            f"{summary_.dead_bytes / 1e6:,.1f} MB of the shards are images that no longer count: `lodeset compact "
            f"{config}` writes shards without them"
        )
    return out


def snippet(summary_: Summary) -> str:
    """Python that reads the images of the shards."""
    return SNIPPET.format(folder=summary_.shards)
