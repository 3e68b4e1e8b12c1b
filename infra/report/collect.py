"""Read what the report shows from the store, with filters, one file at a time, limited to what fits a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lodeset.infra.report.contents import (
    Calibration,
    Cluster,
    Clusters,
    Copy,
    Dedup,
    Dropped,
    Group,
    Leaked,
    Query,
    Reject,
    Rejected,
    Report,
    Retrieved,
    Shards,
    Similarity,
    Step,
)
from lodeset.infra.report.pictures import public, short_name
from lodeset.infra.report.pruned import report_of
from lodeset.infra.report.scored import scored
from lodeset.infra.report.trained import scores_of, training_of
from lodeset.pipeline.by_hand import BY_HAND
from lodeset.pipeline.dag.stage import Stage, read_as
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.specs import (
    CalibrateDetails,
    ClusterDetails,
    DedupDetails,
    RetrieveDetails,
    SelectDetails,
    WriteShardsDetails,
)
from lodeset.pipeline.tables import records
from lodeset.pruning.specs import PruneDetails

# Maximum number of pictures of each kind: 382 in total.
REJECTS_SHOWN = 5  # for each set and reason
DROPS_SHOWN, DROP_PICTURES = 8, 48  # for each set and reason; in total
GROUPS_SHOWN, GROUP_PICTURES = 6, 9  # the largest, and as many drawn at random; images of each
LEAKS_SHOWN, INCLUDED_SHOWN = 12, 4  # pairs
CLUSTERS_SHOWN, CLUSTER_PICTURES = 8, 12
QUERIES_SHOWN, HITS_SHOWN = 14, 6  # queries over all sets, at most 3 per set; hits of each query
CANDIDATES = 100  # images that are checked for a missing vector

TRAINED = ("train", "finish", "distill")
PARTLY_SHOWN = ("ingest", "dedup", "calibrate")  # stages whose section is there without them, and says what it lacks

Row = dict[str, Any]


def collect(store: Store, stages: Mapping[str, Stage], artifacts: Mapping[str, Artifact]) -> Report:
    """Read what the page shows; `artifacts` are the finished stages by id.

    Raises:
        LodesetError: a file that a manifest lists is missing in the store, or damaged.
    """
    evaluated, pruned = artifacts.get("evaluate/all"), artifacts.get("prune/all")
    dedup, calibrated = artifacts.get("dedup/pool"), artifacts.get("calibrate/pool")
    clustered, written = artifacts.get("cluster/pool"), artifacts.get("write_shards/all")
    return Report(
        store=public(store.url),
        newest=max((a.created for a in artifacts.values()), default=0.0),
        steps=tuple(step(stage, artifacts.get(id_)) for id_, stage in stages.items()),
        rejected=tuple(_rejected(store, artifacts)),
        dropped=_dropped(store, artifacts),
        scored=scored(store, stages, artifacts),
        dedup=_dedup(store, dedup) if dedup else None,
        calibration=_calibration(store, calibrated) if calibrated else None,
        clusters=_clusters(store, clustered) if clustered else None,
        retrieved=_retrieved(store, artifacts),
        shared=read_as(SelectDetails, artifacts["retrieve/all"].details).shared
        if "retrieve/all" in artifacts
        else None,
        shards=_shards(store, written) if written else None,
        training=tuple(training_of(store, artifacts[f"{name}/all"]) for name in TRAINED if f"{name}/all" in artifacts),
        scores=scores_of(store, evaluated) if evaluated else (),
        pruned=tuple(map(report_of, read_as(PruneDetails, pruned.details).jobs)) if pruned else (),
        absent={name: absent_stages(stages, artifacts, (f"{name}/*",)) for name in PARTLY_SHOWN},
    )


def step(stage: Stage, artifact: Artifact | None) -> Step:
    """A stage as the funnel shows it; `artifact` is None if it is not finished."""
    if artifact is None:
        return Step(stage.name, stage.set, False, 0, 0, {}, 0.0, {}, stage.config)
    rows = artifact.rows
    return Step(
        stage.name,
        stage.set,
        True,
        rows.taken,
        rows.kept,
        rows.dropped,
        artifact.seconds,
        artifact.details,
        artifact.config,
    )


def absent_stages(stages: Mapping[str, Stage], artifacts: Mapping[str, Artifact], needs: Sequence[str]) -> str:
    """Name the stages that are not finished, or say that there are none; empty if all are finished. `needs` as in
    `Section`.
    """
    wanted = matching(stages, needs)
    waiting = [id_ for id_ in wanted if id_ not in artifacts]
    if not wanted:
        return f"This configuration has no stage {needs[0].partition('/')[0]}."
    return f"Not finished: {', '.join(waiting)}." if waiting else ""


def matching(ids: Iterable[str], needs: Sequence[str]) -> list[str]:
    return [id_ for id_ in ids if any(fnmatchcase(id_, pattern) for pattern in needs)]


# -- tables, a file at a time


def _rows_where(
    store: Store,
    files: Iterable[File],
    columns: Sequence[str],
    column: str,
    values: Iterable[Any],
    most: int | None = None,
) -> list[Row]:
    """The rows whose `column` holds one of `values`; reading stops once there are `most` rows."""
    wanted = pa.array(list(values))
    rows: list[Row] = []
    for file in files:
        table = store.table([file], columns)
        chosen = table.filter(pc.is_in(table[column], wanted.cast(table.schema.field(column).type)))
        rows += (chosen if most is None else chosen.slice(0, most - len(rows))).to_pylist()
        if most is not None and len(rows) >= most:
            break
    return rows


def _rejected(store: Store, artifacts: Mapping[str, Artifact]) -> Iterator[Rejected]:
    columns = ["uri", "member", "size_bytes", "reason", "detail"]
    for artifact in artifacts.values():
        if artifact.stage != "ingest":
            continue
        files = artifact.tables.get("rejects", ())
        for reason, count in artifact.rows.dropped.items():
            rows = _rows_where(store, files, columns, "reason", [reason], REJECTS_SHOWN)
            examples = tuple(
                Reject(short_name(r["uri"], r["member"]), public(r["uri"]), r["detail"], r["size_bytes"]) for r in rows
            )
            if examples:
                yield Rejected(artifact.set, reason, count, examples)


def _dropped(store: Store, artifacts: Mapping[str, Artifact]) -> tuple[Dropped, ...]:
    """Drops between ingest and dedup that can be shown with a picture, DROP_PICTURES images in total."""
    dropped: list[Dropped] = []

    def add(
        artifact: Artifact, reason: str, count: int, ids: Iterable[str], scores: Mapping[str, float] | None = None
    ) -> None:
        room = min(DROPS_SHOWN, DROP_PICTURES - sum(len(entry.image_ids) for entry in dropped))
        chosen = tuple(islice(ids, room))
        if chosen:
            dropped.append(Dropped(artifact.stage, artifact.set, reason, count, chosen, scores or {}))

    # If space is short, `filter` comes first: the user chose its reasons.
    for artifact in sorted(artifacts.values(), key=lambda a: a.stage != "filter"):
        reasons = artifact.rows.dropped
        if artifact.stage == "filter":
            for reason, count in reasons.items():
                columns = ["image_id", "reason", "score"]
                rows = _rows_where(store, artifact.tables["filtered"], columns, "reason", [reason], DROPS_SHOWN)
                scores = {row["image_id"]: row["score"] for row in rows if row["score"] is not None}
                add(artifact, reason, count, (row["image_id"] for row in rows), scores)
        elif artifact.stage == "ingest" and "exact_duplicate" in reasons:
            add(artifact, "exact_duplicate", reasons["exact_duplicate"], _repeated(store, artifact))
        elif artifact.stage == "embed" and reasons and f"ingest/{artifact.set}" in artifacts:
            listed = artifacts.get(f"blur_faces/{artifact.set}", artifacts[f"ingest/{artifact.set}"])
            images = listed.tables["images"]
            missing = _without_vector(store, images, artifact.tables["vectors"])
            add(artifact, " or ".join(reasons), sum(reasons.values()), missing)
    return tuple(dropped)


def _repeated(store: Store, ingested: Artifact) -> Iterator[str]:
    """image_ids with several locations: twice in one part, or in a part whose images an earlier part owns."""
    seen: set[str] = set()
    for places, images in zip(ingested.tables["locations"], ingested.tables["images"], strict=True):
        counted = pc.value_counts(store.table([places], ["image_id"])["image_id"])
        twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1)).to_pylist()
        for image_id in (*twice, *_only_in_first(store, places, images)):
            if image_id not in seen:
                seen.add(image_id)
                yield image_id


def _without_vector(store: Store, images: Sequence[File], vectors: Sequence[File]) -> list[str]:
    """Some image_ids without a vector in any file; there may be none if ingest was cut into other parts since."""
    pairs = zip(images, vectors, strict=False)
    missing = list(islice((i for a, b in pairs for i in _only_in_first(store, a, b)), CANDIDATES))
    with_vector = {row["image_id"] for row in _rows_where(store, vectors, ["image_id"], "image_id", missing)}
    return [image_id for image_id in missing if image_id not in with_vector]


def _only_in_first(store: Store, first: File, second: File) -> list[str]:
    ids, others = (store.table([file], ["image_id"])["image_id"] for file in (first, second))
    missing: list[str] = ids.filter(pc.invert(pc.is_in(ids, others.combine_chunks()))).to_pylist()
    return missing


# -- near-duplicates


def _dedup(store: Store, artifact: Artifact) -> Dedup:
    table = store.table(artifact.tables["duplicates"], None, records.DUPLICATES)
    own = table.filter(pc.is_in(table["reason"], pa.array(["unique", "near", BY_HAND])))
    sizes = own.group_by("group_id").aggregate([("image_id", "count")])
    sizes = sizes.filter(pc.greater(sizes["image_id_count"], 1))
    sizes = sizes.sort_by([("image_id_count", "descending"), ("group_id", "ascending")])
    rest = sizes.slice(GROUPS_SHOWN)
    drawn = np.random.default_rng(0).choice(rest.num_rows, min(GROUPS_SHOWN, rest.num_rows), replace=False)
    groups = [*sizes.slice(0, GROUPS_SHOWN).to_pylist(), *rest.take(pa.array(np.sort(drawn))).to_pylist()]
    members = [_members(own, group["group_id"]) for group in groups]

    details = read_as(DedupDetails, artifact.details)
    roles = {name: counts["role"] for name, counts in details.leaks.items()}
    leaks, included = (
        _pairs(store, artifact, [name for name, of in roles.items() if of == role], most)
        for role, most in (("reference", LEAKS_SHOWN), ("included", INCLUDED_SHOWN))
    )
    edges = _edges(store, artifact, [*(r for _, rows in members for r in rows), *leaks, *included])
    shown = [
        Group(group["image_id_count"], keeper, tuple(_copy(row, edges) for row in rows))
        for group, (keeper, rows) in zip(groups, members, strict=True)
    ]
    return Dedup(
        artifact.rows.dropped,
        details,
        artifact.config,
        tuple(shown[:GROUPS_SHOWN]),
        tuple(shown[GROUPS_SHOWN:]),
        tuple(Leaked(name, **counts) for name, counts in details.leaks.items()),
        tuple(_copy(row, edges) for row in leaks),
        tuple(_copy(row, edges) for row in included),
    )


def _pairs(store: Store, artifact: Artifact, sets: Sequence[str], most: int) -> list[Row]:
    """Leaks into these sets, distributed evenly over them; pairs that only look alike come before identical bytes."""
    leaks = store.table(artifact.tables["leaks"], ["set", "image_id", "pool_image_id", "similarity"])
    leaks = leaks.rename_columns(["set", "matched_id", "image_id", "similarity"])
    leaks = leaks.append_column("same_bytes", pc.equal(leaks["image_id"], leaks["matched_id"]).cast(pa.int8()))
    leaks = leaks.sort_by([("same_bytes", "ascending"), ("image_id", "ascending"), ("matched_id", "ascending")])
    each = [leaks.filter(pc.equal(leaks["set"], name)).slice(0, most).to_pylist() for name in sets]
    return [row for turn in zip_longest(*each) for row in turn if row is not None][:most]


def _members(own: pa.Table, group_id: str) -> tuple[str, list[Row]]:
    """The keeper of a group, and the rows of its least similar copies; those without a similarity come last. If several are kept by
    hand, it is the one that the others are copies of.
    """
    group = own.filter(pc.equal(own["group_id"], group_id)).sort_by(
        [("similarity", "ascending"), ("image_id", "ascending")]
    )
    copies = group.filter(pc.invert(group["kept"]))
    keeper: str = (copies["matched_id"] if copies.num_rows else group["image_id"])[0].as_py()
    return keeper, copies.slice(0, GROUP_PICTURES - 1).to_pylist()


def _edges(store: Store, artifact: Artifact, rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The edges between each row's image and the image that it matched."""
    ids = pa.array(sorted({row[column] for row in rows for column in ("image_id", "matched_id")}), pa.string())
    edges: dict[tuple[str, str], Row] = {}
    for file in artifact.tables["edges"]:
        table = store.table([file])
        both = pc.and_(pc.is_in(table["image_id_a"], ids), pc.is_in(table["image_id_b"], ids))
        edges |= {(edge["image_id_a"], edge["image_id_b"]): edge for edge in table.filter(both).to_pylist()}
    return edges


def _copy(row: Row, edges: Mapping[tuple[str, str], Row]) -> Copy:
    a, b = sorted((row["image_id"], row["matched_id"]))
    edge = edges.get((a, b), {})
    # Dedup records a similarity for linked pairs; an edge without one was found by perceptual hash and counts unless
    # refuted.
    by_hash = bool(edge) and edge["similarity"] is None and edge["verified"] is not False
    direct = row["similarity"] is not None or by_hash
    return Copy(
        row["image_id"], row["matched_id"], direct, row["similarity"],
        edge.get("phash_distance") if direct else None, edge.get("transform") if direct else None,
    )  # fmt: skip


def _calibration(store: Store, artifact: Artifact) -> Calibration:
    table = store.table(artifact.tables["samples"], ["kind", "similarity"])
    kinds = []
    for kind in read_as(CalibrateDetails, artifact.details).median_similarity:
        of_kind = table.filter(pc.equal(table["kind"], kind))["similarity"].to_numpy()
        if len(of_kind):
            kinds.append(Similarity(kind, *(float(q) for q in np.quantile(of_kind, (0.1, 0.5, 0.9)))))
    return Calibration(artifact.rows.kept, tuple(kinds))


# -- clusters, retrieval, shards


def _clusters(store: Store, artifact: Artifact) -> Clusters:
    k = read_as(ClusterDetails, artifact.details).k
    sizes = np.zeros(k, np.int64)
    for file in artifact.tables["clusters"]:
        sizes += np.bincount(store.table([file], ["cluster"])["cluster"].to_numpy(), minlength=k)
    order = np.argsort(-sizes, kind="stable")
    chosen = [int(c) for c in order[:CLUSTERS_SHOWN] if sizes[c]]
    # image_ids are hashes: the smallest ones are a random sample, and the same one every time.
    members: dict[int, list[str]] = {c: [] for c in chosen}
    for file in artifact.tables["clusters"]:
        table = store.table([file], ["image_id", "cluster"])
        for c in chosen:
            ids = table.filter(pc.equal(table["cluster"], c))["image_id"].sort().slice(0, CLUSTER_PICTURES).to_pylist()
            members[c] = sorted([*members[c], *ids])[:CLUSTER_PICTURES]
    largest = tuple(Cluster(c, int(sizes[c]), tuple(members[c])) for c in chosen)
    return Clusters(k, int((sizes == 0).sum()), tuple(int(n) for n in sizes[order] if n), largest)


def _retrieved(store: Store, artifacts: Mapping[str, Artifact]) -> tuple[Retrieved, ...]:
    retrievals = [a for a in artifacts.values() if a.stage == "retrieve" and a.set != "all"]
    asking = [a for a in retrievals if a.tables["matches"]]
    shown = {a.set: max(1, min(3, QUERIES_SHOWN // len(asking))) for a in asking[:QUERIES_SHOWN]}
    return tuple(_retrieved_by(store, a, artifacts, shown.get(a.set, 0)) for a in retrievals)


def _retrieved_by(store: Store, artifact: Artifact, artifacts: Mapping[str, Artifact], queries: int) -> Retrieved:
    embedded, together = artifacts.get(f"embed/{artifact.set}"), artifacts.get("retrieve/all")
    files = artifact.tables["matches"]
    similarity = np.concatenate(
        [np.zeros(0, np.float32), *(store.table([f], ["similarity"])["similarity"].to_numpy() for f in files)]
    )
    ids: list[str] = []
    for file in files if queries else ():
        ids = sorted(
            {
                *ids,
                *pc.unique(store.table([file], ["query_id"])["query_id"].drop_null())
                .sort()
                .slice(0, queries)
                .to_pylist(),
            }
        )[:queries]
    rows = _rows_where(store, files, ["query_id", "image_id", "similarity"], "query_id", ids) if ids else []
    shown = []
    for query_id in ids:
        hits = sorted(
            ((r["image_id"], r["similarity"]) for r in rows if r["query_id"] == query_id),
            key=lambda hit: (-hit[1], hit[0]),
        )
        shown.append(Query(query_id, len(hits), tuple(hits[:HITS_SHOWN])))
    details = read_as(RetrieveDetails, artifact.details)
    return Retrieved(
        set=artifact.set,
        config=artifact.config,
        images=embedded.rows.kept if embedded else details.queries,
        asked=details.asked,
        retrieved=details.retrieved,
        distinct=details.distinct,
        collisions=details.collisions,
        short=details.short,
        capped=details.capped,
        shared=read_as(SelectDetails, together.details).shared_by_set.get(artifact.set, 0) if together else None,
        median_similarity=float(np.median(similarity)) if len(similarity) else None,
        queries=tuple(shown),
    )


def _shards(store: Store, artifact: Artifact) -> Shards:
    details = read_as(WriteShardsDetails, artifact.details)
    folder, since = public(store.full_url(details.folder)), details.since or {}
    changes = tuple((change, why, n) for change in ("added", "removed") for why, n in since.get(change, {}).items())
    return Shards(
        folder, artifact.rows.kept, details.size_bytes, artifact.tables["shards"], changes, details.dead_bytes
    )
