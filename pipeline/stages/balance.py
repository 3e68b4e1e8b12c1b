"""balance: `clusters` -> a sample of the pool with equal shares of every cluster, as `matches` (Vo et al., arXiv:2405.15613).

It asks of the pool what a curated set asks of it, without queries, so `retrieve/all` takes its rows like those of any set.
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from lodeset.pipeline.algorithms.clusters.balance import balanced
from lodeset.pipeline.algorithms.clusters.points import keys_of
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome, as_mapping
from lodeset.pipeline.dag.store import Rows
from lodeset.pipeline.specs import BalanceSpec
from lodeset.pipeline.stages.retrieve import counted
from lodeset.pipeline.tables import records

VERSION = BalanceSpec.VERSION
STAGE = "balance"


def run(context: Context[BalanceSpec, None]) -> Outcome:
    started, store = time.perf_counter(), context.store
    table = store.table(context.inputs["clusters"].tables["clusters"], ["image_id", "path"], records.CLUSTERS)
    images, wanted = table.num_rows, context.spec.images
    key = digest(STAGE, VERSION, context.fingerprint)

    def draw(_: object) -> pa.Table:
        ids = table["image_id"].to_pylist()
        paths = table["path"].combine_chunks().flatten().to_numpy().reshape(images, -1)
        rows = balanced(paths, keys_of(ids), wanted, context.spec.seed)
        drawn = sorted((ids[row], int(paths[row, -1])) for row in rows)
        columns = {
            "image_id": [i for i, _ in drawn],
            "set": ["pool"] * len(drawn),
            "mode": ["balance"] * len(drawn),
            "query_id": pa.nulls(len(drawn), pa.string()),
            "similarity": pa.nulls(len(drawn), pa.float32()),
            "cluster": np.array([c for _, c in drawn], np.int32),
        }
        return pa.table(columns, schema=records.MATCHES)

    parts, new = made(
        context,
        STAGE,
        [(key, None, images)],
        lambda items: (
            store.commit_part(STAGE, key, {"matches": draw(i)}, {"images": images}, time.perf_counter() - started)
            for i in items
        ),
    )
    kept = parts[0].files["matches"].rows
    return Outcome(
        tables={"matches": (parts[0].files["matches"],)},
        rows=Rows(taken=images, kept=kept, dropped={"not_drawn": images - kept} if images > kept else {}),
        details={**as_mapping(counted(wanted, kept, kept)), "parts": 1, "parts_made": len(new)},
    )
