"""inspect: everything that a run says of its images, in the order in which pages ask for it.

- `inspected`: one row for each image of each set, by image_id: where it comes from, what became of it, where it is on the map;
- `by_cluster`: the same images by cluster, the nearest to the centroid first;
- `compared` and `pairs`: the images and the pairs of dedup's `edges`, as numbers;
- `joins`: for each setting of dedup that can be tried, what its values drop (`lodeset.pipeline.stages.dedup.what_if`).

Time and memory grow with the number of images, and nothing here reads their bytes.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Outcome, Progress, read_as
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup.run import FLOOR, chosen_thresholds
from lodeset.pipeline.stages.dedup.what_if import Compared, Joins, Setting, StoredPairs, joined, limits, settings_of
from lodeset.pipeline.stages.fit_clusters import read_levels
from lodeset.pipeline.stages.inspect import compared
from lodeset.pipeline.stages.inspect.fit_map import Place, placing
from lodeset.pipeline.stages.inspect.graph import InspectDetails, InspectSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import fixed, rows_of
from lodeset.pipeline.tables.vectors import read_vectors

STAGE = "inspect"
MEMORY_MB = 4_096  # of DuckDB; more goes to disk


def run(context: Context[InspectSpec, None]) -> Outcome:
    store, inputs, started = context.store, context.inputs, time.perf_counter()
    steps = ["rows", "pairs", "settings"]

    def tell(step: str) -> None:
        context.report(Progress(steps.index(step) / len(steps), unit="images", phase=step))

    tell("rows")
    with (
        tempfile.TemporaryDirectory(prefix="lodeset-inspect-") as scratch,
        duckdb.connect(
            config={"threads": context.cpus, "memory_limit": f"{MEMORY_MB}MB", "temp_directory": scratch}
        ) as database,
    ):
        rows, by_cluster = _rows(database, store, inputs, context.spec.sets, context.cpus)
    tell("pairs")
    tables = {"inspected": rows, "by_cluster": by_cluster}
    details = InspectDetails(images=rows.num_rows)
    if "dedup" in inputs:
        images, pairs, pool = compared.read(store, inputs, context.spec.sets)
        tables |= {"compared": compared.table_of(images), "pairs": pairs}
        tell("settings")
        tried = _settings(inputs["dedup"], inputs.get("calibration"), images, compared.stored(pairs))
        tables["joins"] = _joins(tried)
        details = InspectDetails(
            images=rows.num_rows, pool=pool, settings=tuple(asdict(setting) for setting, _ in tried)
        )
    part = store.commit_part(
        STAGE,
        digest(STAGE, context.spec.VERSION, context.fingerprint),
        tables,
        {"images": rows.num_rows},
        time.perf_counter() - started,
    )
    return Outcome(
        tables={name: (file,) for name, file in part.files.items()},
        rows=Rows(taken=rows.num_rows, kept=rows.num_rows),
        details=details,
    )


# -- rows


def _rows(
    database: duckdb.DuckDBPyConnection,
    store: Store,
    inputs: Mapping[str, Artifact],
    sets: Mapping[str, str],
    threads: int,
) -> tuple[pa.Table, pa.Table]:
    read = functools.partial(_read, store, inputs)
    database.register("filtered", read("masked", "filtered", records.FILTERED))
    last = "semantic" if "semantic" in inputs else "dedup"  # which adds to what dedup drops
    database.register("duplicates", read(last, "duplicates", records.DUPLICATES))
    database.register("clusters", read("clusters", "clusters", records.CLUSTERS).drop_columns(["path"]))
    database.register("selected", read("selected", "selected", records.SELECTED))
    database.register("listed", read("written", "index", records.SHARDS))
    database.register("pictured", _pictured(store, inputs.get("thumbnails")))
    pieces = []
    for name, role in sets.items():
        images = inputs[f"images:{name}"]
        columns = [c for c in records.IMAGES.names if c != "thumbnail"]
        database.register("images", store.table(images.tables["images"], columns, records.IMAGES))
        database.register("places", _numbered(store.table(images.tables["locations"], None, records.LOCATIONS)))
        said = store.table(images.tables.get("metadata", ()), None, records.METADATA)
        database.register("said", _numbered(said.drop_columns(["extra"])))
        database.register("placed", _placed(store, inputs, name, threads))
        known = {
            "set": name,
            "role": role,
            "embedded": f"vectors:{name}" in inputs,
            "deduplicated": "dedup" in inputs,
            "chosen": "selected" in inputs,
        }
        pieces.append(database.sql(_SET, params=known).to_arrow_table())
    database.register("every", pa.concat_tables(pieces))
    rows: pa.Table = database.sql("SELECT * FROM every ORDER BY image_id, set").to_arrow_table()
    rows = rows.append_column("row", pa.array(np.arange(rows.num_rows, dtype=np.int32))).cast(records.INSPECTED)
    database.register("ordered", rows)
    by_cluster: pa.Table = database.sql(
        f"SELECT {', '.join(records.BY_CLUSTER.names)} FROM ordered WHERE cluster IS NOT NULL "
        "ORDER BY cluster, centroid_similarity DESC, image_id"
    ).to_arrow_table()
    return rows, by_cluster.cast(records.BY_CLUSTER)


# One row for each image of a set. What has happened last to an image of the pool, or of an included set, is its outcome; the images of
# other sets have the part that their set plays.
_SET = """
WITH place AS (SELECT DISTINCT ON (image_id) image_id, uri, member, "offset" FROM places ORDER BY image_id, n),
drawn AS (SELECT DISTINCT ON (image_id) image_id, file, "row" FROM pictured ORDER BY image_id, file),
first_said AS (
    SELECT DISTINCT ON (image_id) image_id, label, caption, url, licence FROM said ORDER BY image_id, n
),
wanted AS (
    SELECT image_id, list(set ORDER BY set) AS selected_for, arg_max(query_id, coalesce(similarity, 2)) AS query_id,
        arg_max(mode, coalesce(similarity, 2)) AS mode, max(similarity) AS query_similarity
    FROM selected GROUP BY image_id
),
sizes AS (SELECT group_id, count(*) AS size FROM duplicates GROUP BY group_id HAVING count(*) > 1),
judged AS (SELECT d.*, s.size FROM duplicates d LEFT JOIN sizes s USING (group_id))
SELECT i.image_id, $set AS set,
    CASE
        WHEN f.reason IS NOT NULL AND $role = 'pool' THEN f.reason
        WHEN $role NOT IN ('pool', 'included') THEN $role || '_set'
        WHEN NOT $embedded THEN 'not_embedded'
        WHEN v.image_id IS NULL THEN 'no_vector'
        WHEN NOT $deduplicated THEN 'embedded'
        WHEN NOT d.kept THEN d.reason
        WHEN l.image_id IS NOT NULL THEN 'in_shard'
        WHEN w.image_id IS NOT NULL THEN 'selected'
        WHEN $chosen THEN 'not_selected'
        ELSE 'kept'
    END AS outcome,
    CASE
        WHEN $role NOT IN ('pool', 'included') THEN ''
        WHEN f.reason IS NOT NULL AND $role = 'pool' THEN 'filter'
        WHEN $embedded AND v.image_id IS NULL THEN 'embed'
        WHEN d.reason = 'semantic' THEN 'semdedup'
        WHEN d.kept IS NOT NULL AND NOT d.kept THEN 'dedup'
        WHEN $chosen AND w.image_id IS NULL THEN 'retrieve'
        ELSE ''
    END AS dropped_by,
    i.width, i.height, i.format, i.size_bytes, i.sharpness, i.quality, i.derived_from,
    p.uri, p.member, p."offset", m.label, m.caption, m.url, m.licence,
    f.score AS filter_score, f.threshold AS filter_threshold,
    CASE WHEN d.size > 1 THEN d.group_id END AS group_id, d.size AS group_size, d.matched_id,
    d.similarity AS matched_similarity,
    c.cluster, v.centroid_similarity, v.x, v.y,
    w.selected_for, w.mode, w.query_id, w.query_similarity,
    l.shard, l."offset" AS shard_offset, l.size_bytes AS shard_bytes,
    t.file AS picture_file, t.row AS picture_row
FROM images i
LEFT JOIN place p USING (image_id)
LEFT JOIN first_said m USING (image_id)
LEFT JOIN filtered f ON f.image_id = i.image_id AND $role = 'pool'
LEFT JOIN placed v ON v.image_id = i.image_id
LEFT JOIN judged d ON d.image_id = i.image_id AND $role IN ('pool', 'included')
LEFT JOIN clusters c ON c.image_id = i.image_id AND $role = 'pool'
LEFT JOIN wanted w ON w.image_id = i.image_id AND $role IN ('pool', 'included')
LEFT JOIN listed l ON l.image_id = i.image_id AND $role IN ('pool', 'included')
LEFT JOIN drawn t ON t.image_id = i.image_id
"""


def _read(store: Store, inputs: Mapping[str, Artifact], role: str, table: str, schema: pa.Schema) -> pa.Table:
    artifact = inputs.get(role)
    return store.table(artifact.tables[table] if artifact is not None else (), schema.names, schema)


def _numbered(table: pa.Table) -> pa.Table:
    """With the number of each row: which of several of one image comes first."""
    return table.append_column("n", pa.array(np.arange(table.num_rows, dtype=np.int64)))


_PLACED = pa.schema(
    [
        ("image_id", pa.string()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("centroid_similarity", pa.float32()),
    ]
)


def _placed(store: Store, inputs: Mapping[str, Artifact], name: str, threads: int) -> pa.Table:
    """Where each embedded image of a set lies on the map, and how similar it is to the centroid of its cluster."""
    if f"vectors:{name}" not in inputs or "map" not in inputs:
        return _PLACED.empty_table()
    width, place = placing(store, inputs["map"], threads)
    near = _to_centroid(store, inputs) if name == "pool" and "clusters" in inputs else None
    return pa.concat_tables(
        [_PLACED.empty_table(), *_placed_parts(store, inputs[f"vectors:{name}"], width, place, near)]
    )


Near = Callable[[pa.Array, NDArray[np.float32]], NDArray[np.float32]]


def _placed_parts(store: Store, vectors: Artifact, width: int, place: Place, near: Near | None) -> Iterator[pa.Table]:
    for file in vectors.tables["vectors"]:
        ids, matrix = read_vectors(store, [file])
        if not ids or matrix.shape[1] != width:
            continue  # of another embedder than the pool's: it has no place on this map
        wide = matrix.astype(np.float32)
        x, y = place(wide).T
        names = pa.array(ids, pa.string())
        similarity = near(names, wide) if near else np.full(len(ids), np.nan, np.float32)
        yield pa.table([names, x, y, pa.array(similarity, mask=np.isnan(similarity))], schema=_PLACED)


def _to_centroid(store: Store, inputs: Mapping[str, Artifact]) -> Near:
    """What tells the cosines of images with the centroids of their clusters, NaN for those in none."""
    clusters = store.table(inputs["clusters"].tables["clusters"], ["image_id", "cluster"], records.CLUSTERS)
    ids = fixed(clusters["image_id"])
    order = np.argsort(ids)
    ids, number = ids[order], clusters["cluster"].to_numpy()[order]
    centroids = read_levels(store, inputs["centroids"])[0]
    length = np.linalg.norm(centroids, axis=1, keepdims=True)
    centroids = np.asarray(centroids / np.where(length > 0, length, 1), np.float32)

    def near(names: pa.Array, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        at = rows_of(fixed(pa.chunked_array([names])), ids)
        found = np.full(len(at), np.nan, np.float32)
        rows = np.flatnonzero(at >= 0)
        found[rows] = np.einsum("nd,nd->n", vectors[rows], centroids[number[at[rows]]])
        return found

    return near


_PICTURED = pa.schema([("image_id", pa.string()), ("file", pa.int32()), ("row", pa.int32())])


def _pictured(store: Store, thumbnails: Artifact | None) -> pa.Table:
    """In which file of the thumbnails, and in which of its rows, each picture lies: image_ids may repeat."""
    found = [_PICTURED.empty_table()]
    for number, file in enumerate(thumbnails.tables["thumbnails"] if thumbnails is not None else ()):
        ids = store.table([file], ["image_id"])["image_id"]
        count = len(ids)
        found.append(
            pa.table(
                [ids, np.full(count, number, np.int32), np.arange(count, dtype=np.int32)],
                schema=_PICTURED,
            )
        )
    return pa.concat_tables(found)


# -- settings of dedup


def _settings(
    dedup: Artifact, calibration: Artifact | None, images: Compared, pairs: StoredPairs
) -> list[tuple[Setting, Joins]]:
    spec = read_as(DedupSpec, dedup.config)
    thresholds = chosen_thresholds(spec, calibration)
    searched_to = min(thresholds.pool, thresholds.reference) - FLOOR
    found = settings_of(spec, thresholds, pairs, searched_to)
    return [(one, joined(images, pairs, limits(one, spec, thresholds, images, pairs))) for one in found]


def _joins(tried: list[tuple[Setting, Joins]]) -> pa.Table:
    tables = [records.JOINS.empty_table()]
    for setting, joins in tried:
        count = len(joins.limit) + 1
        before: dict[str, Any] = {
            "setting": pa.repeat(setting.name, count),
            "limit": np.r_[np.float32(np.inf), joins.limit],
            "a": np.r_[-1, joins.a].astype(np.int32),
            "b": np.r_[-1, joins.b].astype(np.int32),
        }
        counted = {name: getattr(joins, name) for name in ("dropped", "leaked", "groups", "largest")}
        tables.append(pa.table({**before, **counted}, schema=records.JOINS))
    return pa.concat_tables(tables)
