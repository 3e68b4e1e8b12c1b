"""Which pairs a preview shows in which section, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import dedup_spec

from lodeset.infra.report.preview import bands, edges_of, write_preview
from lodeset.pipeline.dag.decisions import Decision
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.dedup import run as dedup
from lodeset.pipeline.tables import records


def edge(n: int, score: float | None, verified: bool | None, similarity: float | None = 0.5) -> dict[str, Any]:
    shown = {"image_id_a": f"{n:032x}", "image_id_b": f"{n + 500:032x}", "similarity": similarity, "phash_distance": 9}
    found = {"score": score, "verified": verified, "transform": "mirror", "linked": bool(verified)}
    return {**dict.fromkeys(records.EDGES.names), **shown, **found}


def written(store: Store, rows: list[dict[str, Any]]) -> File:
    table = pa.Table.from_pylist(rows, schema=records.EDGES)
    return store.commit_part(dedup.EDGES, dedup.edges_key("f"), {"edges": table}).files["edges"]


def test_each_pair_is_in_the_section_of_what_judged_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = [
        *(edge(n, 4.5, True) for n in range(30)),
        edge(40, 3.5, False),
        edge(41, 9.0, False),
        edge(42, None, True),
        edge(43, None, False),
        {**edge(44, 9.0, False), "detail_score": -1.0},
        {**edge(45, None, False), "detail_score": -7.0},
        {**edge(46, 4.5, True), "detail_score": 2.0},
    ]
    spec = dedup_spec(verify="pixels", min_score=4.0, min_detail_score=0.5)
    found = bands(store, [written(store, rows)], spec, 0.9, each=12)
    assert [(band.title, band.copies, band.count) for band in found] == [
        ("alike, but other details, log-odds below -4: not taken", False, 1),
        ("alike, but other details, log-odds -2 to 0: not taken", False, 1),
        ("aligned, log-odds 3 to 4: not taken, too low", False, 1),
        ("aligned, log-odds 4 to 5: copies", True, 31),
        ("aligned, log-odds 8 to 10: not taken, of a kind of picture, not above its surroundings", False, 1),
        ("agree as they are, or mirrored: copies", True, 1),
        ("alike by vector or hash, but not in their pixels: not taken", False, 1),
    ]
    assert len(found[3].pairs) == 12
    page = write_preview(store, {}, found, "The line.", 10**6, tmp_path / "out/page.html", "<pool>").read_text()
    assert "&lt;pool&gt;" in page and "31 pairs" in page and "The line." in page and "no ingested set" in page


def test_unverified_pairs_go_by_cosine(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = [edge(1, None, None, 0.89), edge(2, None, True, 0.91), edge(3, None, True, 0.99), edge(4, None, True, None)]
    rows.append(edge(5, None, True, 0.4))  # by its hash, too
    found = bands(store, [written(store, rows)], dedup_spec(verify="none"), 0.9, each=12)
    assert [(band.copies, band.count) for band in found] == [(True, 1), (False, 1), (True, 1), (True, 1), (True, 1)]


def test_edges_are_there_once_dedup_has_searched(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stage = Stage("dedup", "pool", 1, "ray", lambda _: pytest.fail("not run"), {})
    with pytest.raises(LodesetError, match="dedup/pool has not searched yet: not made yet"):
        edges_of(store, Decision(stage, "run", "not made yet", "f"))
    file = written(store, [edge(1, 4.0, True)])
    assert edges_of(store, Decision(stage, "run", "not made yet", "f")) == (file,)
