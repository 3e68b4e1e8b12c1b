"""dedup (Ray + FAISS): `vectors` + `images` -> `edges`, `duplicates`, `leaks` (DINOv2, section 3 and appendix A).

1. Candidates: the k nearest neighbours of every image above the threshold, close perceptual hashes, and what looks alike in
   one of many views (`lodeset.pipeline.stages.dedup.candidates`).
2. Verification (`verify: pixels`), or none: on thumbnails, as they are and mirrored, or aligned and weighed; of large images
   that these leave in doubt, on the full images (`lodeset.pipeline.stages.dedup.closeups`).
3. Connected components, guarded by size.
4. A component with a reference image is discarded whole; one with an included image keeps only that; any other keeps the image
   that the rules of `keeper` leave (`algorithms.copies.keepers`). Images of `by_hand.keep` are kept besides, unless a reference
   image is among their copies.

What was found is committed in parts that know nothing of thresholds, and between generations of images
(`lodeset.pipeline.stages.dedup.generations`): another threshold searches nothing, and a grown pool only what is new. An image that the run
before kept stays the keeper of its component, so that shards that hold it need not be rewritten.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import views
from lodeset.pipeline.algorithms.copies.components import components, size_limit
from lodeset.pipeline.algorithms.copies.keepers import keepers
from lodeset.pipeline.algorithms.copies.thresholds import Thresholds
from lodeset.pipeline.algorithms.neighbors.approximate import Asked
from lodeset.pipeline.algorithms.sampling import ranks
from lodeset.pipeline.by_hand import BY_HAND, IdList, union
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome, read_as
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.errors import GateError, LodesetError
from lodeset.pipeline.specs import KEPT, CalibrateDetails, DedupRuntime, DedupSpec
from lodeset.pipeline.stages import search
from lodeset.pipeline.stages.copies import looks_of
from lodeset.pipeline.stages.dedup.candidates import MEASURED, NONE, find_and_verify
from lodeset.pipeline.stages.dedup.closeups import CLOSEUPS, look
from lodeset.pipeline.stages.dedup.generations import TABLE, Between, Generation, between, generations_of
from lodeset.pipeline.stages.dedup.judging import Floats, Ints, Neighbors, Pairs, doubtful, judge, settled
from lodeset.pipeline.stages.dedup.leaks import leaks_of, with_leaks
from lodeset.pipeline.stages.dedup.outcomes import outcomes
from lodeset.pipeline.stages.dedup.pairwise import measured_before
from lodeset.pipeline.stages.dedup.universe import Members, Universe, gather, members_of
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import left_of_all

VERSION = DedupSpec.VERSION
STAGE, SEARCH, EDGES = "dedup", "dedup_search", "dedup_edges"
# Edges are kept this far below the threshold, so that the table shows what another threshold would add.
FLOOR = 0.05
NEIGHBORS = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("similarity", pa.float32())])


def run(context: Context[DedupSpec, DedupRuntime]) -> Outcome:
    spec = context.spec
    store = context.store
    sets = members_of(context.inputs, spec.roles)
    universe = gather(store, sets)
    generations = generations_of(store, context.previous, universe.ids)
    limits = chosen_thresholds(spec, context.inputs.get("calibration"))
    floor = min(limits.pool, limits.reference) - FLOOR
    neighbors, parts, parts_made = _search(context, sets, generations, spec.k, spec.neighbors, floor)
    looked = None
    if spec.verify == "pixels":
        looked = find_and_verify(context, sets, universe, generations)
        parts, parts_made = parts + looked.parts, parts_made + looked.parts_made
    pairs = judge(universe, neighbors, looked.seen if looked else NONE, limits, spec)
    tables_of_pairs = [looked.measured] if looked else []
    rows = doubtful(universe, pairs, floor, spec)
    if len(rows):
        images = [context.inputs[f"images:{one.set}"] for one in sets]
        looks = look(context, images, universe.ids, pairs.a[rows], pairs.b[rows])
        pairs = settled(universe, pairs, rows, looks, spec)
        parts, parts_made = parts + looks.known.parts, parts_made + looks.known.parts_made
        tables_of_pairs.append(looks.known)
    measured = measured_before(context.previous, (MEASURED, CLOSEUPS), tables_of_pairs)
    component = components(len(universe.ids), pairs.a[pairs.linked], pairs.b[pairs.linked])
    # Before the guard: who is stopped by it wants to see what linked strangers.
    edges = store.commit_part(EDGES, edges_key(context.fingerprint), {"edges": _edge_table(universe, pairs)})
    guard(universe.pool, component, limits, spec)
    stood = standing(store, context.previous, universe.ids)
    images = [context.inputs[f"images:{one.set}"] for one in sets]
    known = looks_of(store, images, universe, component, stood, spec.keeper)
    wanted = union(context.runtime.keep)
    by_hand = universe.pool & np.fromiter((i in wanted for i in universe.ids), bool, len(universe.ids))
    table = verdicts(universe, component, pairs, keepers(component, known, spec.keeper, by_hand), by_hand)
    key = digest(STAGE, VERSION, context.fingerprint)
    leaks = leaks_of(universe, component, pairs, spec.roles, by_hand)
    part = store.commit_part(STAGE, key, {"duplicates": table, "leaks": leaks})
    tables = {
        "duplicates": (part.files["duplicates"],),
        "edges": (edges.files["edges"],),
        TABLE: tuple(one.file for one in generations),
        **{kind.table: files for kind, _, files in measured},
    }
    details = {
        "parts": parts,
        "parts_made": parts_made,
        "threshold": limits.pool,
        "reference_threshold": limits.reference,
        "generations": [len(one.ids) for one in generations],
        **{kind.by: basis for kind, basis, _ in measured},
        "looked_at_closely": len(rows),
        **_told_by_hand(table, wanted, context.runtime.keep),
    }
    outcome = _outcome(table, universe, component, tables, details)
    outcome = replace(outcome, content={KEPT: digest(STAGE, VERSION, part.files["duplicates"].sha256)})
    return with_leaks(outcome, part, leaks, spec.roles)


def edges_key(fingerprint: str) -> str:
    """Of the part that holds the edges of a run of dedup, which is there even if the guard stopped that run."""
    return digest(EDGES, VERSION, fingerprint)


def standing(store: Store, previous: Artifact | None, ids: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these images [N] the run before kept."""
    if previous is None:
        return np.zeros(len(ids), bool)
    return np.asarray(pc.is_in(pa.array(ids, pa.string()), left_of_all(store, previous)).to_numpy(False), bool)


# -- candidates


def _search(
    context: Context, sets: Sequence[Members], generations: Sequence[Generation], k: int, asked: Asked, floor: float
) -> tuple[Neighbors, int, int]:
    """Pairs of neighbours more similar than `floor`; parts in all and parts made."""
    files = {one.set: one.vectors for one in sets}
    # What made the vectors; their files do not matter, because parts may be cut otherwise.
    space = sorted({search.space(context.inputs[f"vectors:{one.set}"]) for one in sets})
    plans = {one.key: search.chosen(context, files, len(one.ids), len(one.ids), k, asked) for one in generations}
    work = between(
        generations, context.runtime.part_images, lambda base: (SEARCH, VERSION, space, k, plans[base.key].kind)
    )

    def make(left: Iterable[Between]) -> Iterator[Part]:
        items = list(left)
        needed = {number for item in items for number in (item.queries, item.base)}
        bases = {}
        for number in sorted(needed):
            one = generations[number]
            basis = digest(search.VERSION, space, one.key)
            bases[number] = search.prepared(context, plans[one.key], files, one.ids, basis)
        worker = functools.partial(_searcher, context.store, bases, k)

        def seconds(item: Between) -> float:
            return search.seconds(len(generations[item.base].ids), item)

        yield from map_with_state(worker, items, cpus=context.cpus, address=context.ray_address, seconds=seconds)

    parts, new = made(context, SEARCH, work, make)
    found = [
        (generations[item.queries], generations[item.base], part.files["neighbors"])
        for (_, item, _), part in zip(work, parts, strict=True)
    ]
    return _neighbors(context.store, found, k, floor), len(parts), len(new)


def _searcher(store: Store, bases: Mapping[int, search.Base], k: int) -> Callable[[Between], Part]:
    opened = functools.lru_cache(maxsize=2)(lambda number: search.opened(store, bases[number]))

    def work(item: Between) -> Part:
        started = time.perf_counter()
        same, index = item.queries == item.base, opened(item.base)
        queries = opened(item.queries).vectors[item.start : item.stop]
        similarity, b = index.search(queries, min(k + same, len(index.vectors)))
        a = np.repeat(np.arange(item.start, item.stop), b.shape[1])
        b = b.reshape(-1)
        keep = (b >= 0) & ~(same & (a == b))
        table = pa.table({"a": a[keep], "b": b[keep], "similarity": similarity.reshape(-1)[keep]}, schema=NEIGHBORS)
        counts = {"images": item.stop - item.start}
        return store.commit_part(SEARCH, item.key, {"neighbors": table}, counts, time.perf_counter() - started)

    return work


def _neighbors(store: Store, found: Sequence[tuple[Generation, Generation, File]], k: int, floor: float) -> Neighbors:
    """Distinct pairs a < b of nodes with their similarity, sorted; of each image the k most similar ones count."""
    columns: list[tuple[Ints, Ints, Floats]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for asking, searched, file in found:
        table = store.table([file])
        near = table["similarity"].to_numpy() > floor
        a = asking.nodes[table["a"].to_numpy()[near]]
        b = searched.nodes[table["b"].to_numpy()[near]]
        there = (a >= 0) & (b >= 0)
        columns.append((a[there], b[there], table["similarity"].to_numpy()[near][there]))
    a, b, similarity = (np.concatenate(one) for one in zip(*columns, strict=True))
    order = np.lexsort((b, -similarity, a))
    order = order[ranks(a[order]) < k]
    a, b, similarity = a[order], b[order], similarity[order]
    # Each pair once, from its smaller node; if only the larger one finds it, from there.
    low, high = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((high, low))
    low, high, similarity = low[order], high[order], similarity[order]
    first = np.r_[True, (low[1:] != low[:-1]) | (high[1:] != high[:-1])] if len(low) else np.zeros(0, bool)
    return low[first], high[first], similarity[first]


def chosen_thresholds(spec: DedupSpec, calibration: Artifact | None) -> Thresholds:
    """The configured numbers, or those that the calibration found for this way of verifying."""
    found: Mapping[str, float] | None = {}
    if calibration is not None:
        learned = read_as(CalibrateDetails, calibration.details)
        found = learned.candidates if spec.verify == "pixels" else learned.unverified
    if found is None:
        raise LodesetError(
            "every image of the calibration sample is a copy of its neighbours, so no threshold can be learned for "
            "`verify: none`: set dedup.threshold and dedup.reference_threshold, or use `verify: pixels`"
        )
    pool = found["pool"] if spec.threshold == "auto" else spec.threshold
    reference = found["reference"] if spec.reference_threshold == "auto" else spec.reference_threshold
    return Thresholds(pool, reference)


# -- decisions


def guard(in_pool: NDArray[np.bool_], component: Ints, limits: Thresholds, spec: DedupSpec) -> None:
    """Raises GateError where a group of copies is too large to be one."""
    sizes = np.bincount(component, weights=in_pool) if len(component) else np.zeros(1)
    pool = int(in_pool.sum())
    allowed = size_limit(pool) if spec.max_group == "auto" else spec.max_group
    largest = int(sizes.max(initial=0))
    if largest <= allowed:
        return
    many = int((sizes > allowed).sum())
    if spec.verify == "pixels":
        way_out = f"Choose a higher dedup.min_score (now {spec.min_score})"
    else:
        way_out = (
            f"the cosine threshold {limits.pool} links strangers. Choose a higher dedup.threshold, `threshold: auto`, "
            f"`verify: pixels`, or a lower dedup.phash_distance (now {spec.phash_distance})"
        )
    raise GateError(
        f"one near-duplicate group holds {largest} of {pool} pool images ({largest / pool:.1%}; the limit is {allowed}), "
        f"and {many} groups are that large. Nothing was dropped. {way_out}; "
        f"if the pool does hold {largest} copies of one image, set dedup.max_group: {largest}. `lodeset dedup-preview` shows pairs"
    )


def verdicts(
    universe: Universe,
    component: Ints,
    pairs: Pairs,
    keeper: Ints,
    by_hand: NDArray[np.bool_] | None = None,
) -> pa.Table:
    """`duplicates`: one row for every pool and every included image.

    Args:
        keeper: [N], which node of its group is kept.
        by_hand: [N], nodes that are kept besides, unless a reference image is among their copies.
    """
    found = outcomes(universe.pool, universe.reference, universe.included, component, keeper, by_hand)
    similarity = {
        (int(x), int(y)): float(s)
        for x, y, s, linked in zip(pairs.a, pairs.b, pairs.similarity, pairs.linked, strict=True)
        if linked
    }
    rows = []
    for node in np.flatnonzero(universe.pool | universe.included).tolist():
        kept, match = bool(found.kept[node]), int(found.match[node])
        score = 1.0 if match == node else similarity.get((min(node, match), max(node, match)))
        rows.append(
            {
                "image_id": universe.ids[node],
                "group_id": universe.ids[component[node]],
                "kept": kept,
                "reason": found.reason[node],
                "matched_id": None if kept else universe.ids[match],
                "similarity": None if kept or score is None or np.isnan(score) else score,
            }
        )
    return pa.Table.from_pylist(rows, schema=records.DUPLICATES)


def _edge_table(universe: Universe, pairs: Pairs) -> pa.Table:
    ids = pa.array(universe.ids, pa.string())
    asked = pairs.verified >= 0
    return pa.table(
        {
            "image_id_a": ids.take(pa.array(pairs.a)),
            "image_id_b": ids.take(pa.array(pairs.b)),
            "similarity": pa.array(pairs.similarity, mask=np.isnan(pairs.similarity)),
            "phash_distance": pairs.distance,
            "verified": pa.array(pairs.verified == 1, mask=~asked),
            "transform": pa.array([views.ORIENTATIONS[o].name for o in pairs.orientation], mask=~asked),
            "score": pa.array(pairs.score, mask=np.isnan(pairs.score)),
            "map": pa.array([None if np.isnan(m[0]) else m for m in pairs.maps], pa.list_(pa.float32())),
            "points": pa.array(pairs.points, mask=pairs.points < 0),
            "linked": pairs.linked,
            "min_score_limit": pa.array(pairs.limit, mask=np.isneginf(pairs.limit)),
            "detail_score": pa.array(pairs.details, mask=np.isnan(pairs.details)),
        },
        schema=records.EDGES,
    )


def _told_by_hand(table: pa.Table, wanted: frozenset[str], lists: Sequence[IdList]) -> dict[str, Any]:
    """What the manifest says of `by_hand.keep`; nothing where there is no such list."""
    if not lists:
        return {}
    listed = table.filter(pc.is_in(table["image_id"], pa.array(sorted(wanted), pa.string())))
    leaked = pc.sum(pc.equal(listed["reason"], "reference")).as_py() or 0
    warning = (
        f"{leaked:,} images of by_hand.keep are images of reference sets or copies of these, and were dropped all the same: evaluation "
        "would not be fair with them"
    )
    kept = pc.sum(pc.equal(table["reason"], BY_HAND)).as_py() or 0
    return {"kept_by_hand": kept, **({"warnings": [warning]} if leaked else {})}


def _outcome(
    table: pa.Table,
    universe: Universe,
    component: Ints,
    tables: Mapping[str, tuple[File, ...]],
    details: Mapping[str, Any],
) -> Outcome:
    reasons = table["reason"].to_pylist()
    kept = table["kept"].to_pylist()
    dropped: dict[str, int] = {}
    for reason, keep in zip(reasons, kept, strict=True):
        if not keep:
            dropped[reason] = dropped.get(reason, 0) + 1
    sizes = np.bincount(component, weights=universe.pool) if len(component) else np.zeros(1)
    return Outcome(
        tables=tables,
        rows=Rows(taken=table.num_rows, kept=sum(kept), dropped=dict(sorted(dropped.items()))),
        details={**details, "groups": int((sizes > 1).sum()), "largest_group": int(sizes.max(initial=0))},
    )
