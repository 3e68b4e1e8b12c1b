"""Read the results of training and evaluation from the store for the page."""

from __future__ import annotations

import json
from dataclasses import fields

from lodeset.infra.report.contents import Scores, Training
from lodeset.infra.report.pictures import png_uri
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.tables import records
from lodeset.training.specs import EvaluateDetails

POINTS = 400  # maximum number of points of a training curve


def training_of(store: Store, artifact: Artifact) -> Training:
    lines: list[dict[str, float]] = []
    for file in artifact.tables["metrics"]:
        if file.path.endswith(".jsonl"):
            lines += [json.loads(line) for line in (store.read(file.path) or b"").decode().splitlines() if line]
    step = -(-len(lines) // POINTS) or 1
    return Training(artifact.stage, artifact.details, (*lines[:-1:step], *lines[-1:]))


def scores_of(store: Store, artifact: Artifact) -> tuple[Scores, ...]:
    seen = store.table(artifact.tables.get("pictures", ()), None, records.PICTURES).to_pylist()
    names = [f.name for f in fields(Scores) if f.name not in ("target", "pictures", "pictured")]
    scores = []
    for target, tree in read_as(EvaluateDetails, artifact.details).targets.items():
        rows = [row for row in seen if row["set"] == target]
        pictures = tuple((row["image_id"], png_uri(row["image"]), png_uri(row["picture"])) for row in rows)
        pictured = rows[0]["network"] if rows else ""
        scores.append(Scores(target=target, pictures=pictures, pictured=pictured, **{n: tree[n] for n in names}))
    return tuple(scores)
