"""train, finish, distill (Ray Train): shards -> checkpoints, metrics and an exported model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.dag.stage import Context, Outcome, Progress
from lodeset.pipeline.dag.store import File, Rows, Store
from lodeset.pipeline.dag.stored import stored
from lodeset.pipeline.engines.ray import job
from lodeset.pipeline.errors import LodesetError
from lodeset.training.away import Away, RunFolder, read, relative
from lodeset.training.checkpoint import MARKER
from lodeset.training.config import TrainingConfig
from lodeset.training.export import CONFIG, PREPROCESSOR, WEIGHTS
from lodeset.training.index import Shards
from lodeset.training.launch import launch
from lodeset.training.metrics import FILE as METRICS
from lodeset.training.origin import Origin
from lodeset.training.specs import SELECTED, TrainRuntime, TrainSpec


def folder_of(store: Store, fingerprint: str, chosen: str = "") -> RunFolder:
    """Where a run's checkpoints, metrics and export lie."""
    relative = chosen or f"training/{fingerprint[:16]}"
    return Path(store.path(relative)) if store.local else Away(store.url, relative)


def run(context: Context[TrainSpec, TrainRuntime]) -> Outcome:
    config = context.spec.config
    store, shards = context.store, context.inputs["shards"]
    folder = folder_of(store, context.fingerprint, context.runtime.folder)
    selected = context.inputs[SELECTED].tables["selected"] if SELECTED in context.inputs else ()
    check_whole(store, (*shards.tables["index"], *selected))
    found = Shards(
        index=context.runtime.index or (store.full_url(shards.tables["index"][0].path),),
        selected=tuple(store.full_url(file.path) for file in selected),
    )

    def report(share: float, images: int) -> None:
        context.report(Progress(share, images))

    with job(context.ray_address), following(report, folder, config):
        summary = launch(config, found, folder, context.cpus, _origin(context))
    model = (WEIGHTS, CONFIG, PREPROCESSOR)
    names = (*model, METRICS, "summary.json")
    files = folder.left() if isinstance(folder, Away) else {n: _file(store, folder / n) for n in names}
    images = shards.rows.kept
    return Outcome(
        tables={
            "model": tuple(files[name] for name in model),
            "metrics": (files[METRICS], files["summary.json"]),
            "checkpoints": _checkpoint(store, folder, config.steps),
        },
        rows=Rows(taken=images, kept=images),
        details={
            **summary,
            "folder": relative(folder, store),
            "work": context.stage.work,
            "warnings": _skipped(int(summary["skipped"])),
        },
    )


def check_whole(store: Store, files: Sequence[File]) -> None:
    """Raises DamagedError: one of these is missing, or not what was written. What reads them next looks at no digest."""
    for file in files:
        store.check(file)


def _skipped(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} times an image of the shards could not be read, or was not what was written, and another one stood in for it: "
        "`lodeset verify --deep` says which shards are damaged, and `lodeset run` writes these again"
    ]


def _origin(context: Context[TrainSpec, TrainRuntime]) -> Origin | None:
    before = context.inputs.get("before")
    if before is not None:
        marker = before.tables["checkpoints"][0]
        if context.store.local:  # of a remote store, each machine checks what it copies
            check_whole(context.store, before.tables["checkpoints"])
        of, distil = context.runtime.before, context.stage.name == "distill"
        return start_of(context.store, before.tables["checkpoints"], marker, of, distil)
    weights, digest = context.spec.config.weights, context.spec.weights
    return None if weights is None or digest is None else Origin(path=weights.path, digest=digest)


def start_of(
    store: Store, files: Sequence[File], marker: File, of: TrainingConfig | None, distil: bool = False
) -> Origin:
    """The networks in a checkpoint, whose files and marker these are, to start from."""
    checkpoint = stored(store, files)
    away = None if store.local else checkpoint
    return Origin(path=checkpoint.folder, digest=marker.sha256, of=of, distil=distil, checkpoint=away)


def _file(store: Store, path: Path) -> File:
    return File(path.relative_to(store.root).as_posix(), 0, path.stat().st_size, file_digest(str(path)))


def _checkpoint(store: Store, folder: RunFolder, step: int) -> tuple[File, ...]:
    """The files of a step's checkpoint, its manifest first. Digests are those in it: the files can be gigabytes."""
    name = f"step-{step:07d}/{MARKER}"
    data = read(folder, name)
    assert data is not None, f"{folder}/{name} of a run that has ended"
    path = f"{relative(folder, store)}/{name}"
    marker = File(path, 0, len(data), hashlib.sha256(data).hexdigest())
    within = posixpath.dirname(path)
    told = json.loads(data)["files"].items()
    return (marker, *(File(f"{within}/{name}", 0, one["size_bytes"], one["sha256"]) for name, one in told))


@contextlib.contextmanager
def following(report: Callable[[float, int], None], folder: RunFolder, config: TrainingConfig) -> Iterator[None]:
    """Reports the share of the steps that is done, and images since it looked first, from the last line of metrics.jsonl, which worker 0
    writes wherever it runs."""
    every = 5.0 if isinstance(folder, Away) else 1.0
    start: int | None = None

    def look() -> float:
        nonlocal start
        try:
            line = _last_line(folder)
        except LodesetError:  # a store that does not answer now
            return every
        step = line["step"] if line is not None else 0
        start = step if start is None else start
        report(step / config.steps, max(0, step - start) * config.batch)
        return every

    with repeating(look, every):
        yield


def _last_line(folder: RunFolder) -> dict[str, Any] | None:
    """The last whole line, or None where there is none yet; the file may be written to at the same time."""
    lines = (read(folder, METRICS) or b"").decode(errors="replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            int(told["step"])
            return dict(told)
    return None
