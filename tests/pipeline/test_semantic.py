"""Semantic duplicates: the rule against a plain one, and a whole run on precomputed vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import id_of, picture, write_folder
from commands import entries, lodeset, rows
from inline import in_one_process

from lodeset.pipeline.algorithms.copies import semantic

BLOBS, EACH, EPS = 5, 16, 0.01


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def plainly(vectors: np.ndarray, order: np.ndarray, eps: float) -> set[int]:
    """SemDeDup: of each pair that is closer than eps, the one that comes later goes."""
    return {
        int(order[later])
        for later in range(len(order))
        if any(1 - float(vectors[order[later]] @ vectors[order[before]]) < eps for before in range(later))
    }


@pytest.mark.parametrize("keep", ["far", "centroid", "random"])
@pytest.mark.parametrize("block", [1, 7, 1_000])
def test_the_rule_is_that_of_the_paper(keep: semantic.Keep, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "AT_ONCE", block)
    rng = np.random.default_rng(0)
    vectors, nobody = unit(rng.normal(size=(60, 3))), np.zeros(60, bool)
    centroid, keys = vectors.mean(axis=0), rng.integers(0, 2**63, 60).astype(np.uint64)
    order = semantic.order_of(vectors, centroid, keep, keys, nobody)
    assert sorted(order.tolist()) == list(range(60))
    distance = 1 - vectors[order] @ unit(centroid[None])[0]
    step = np.diff(distance)
    assert keep == "random" or bool((step <= 1e-6).all() if keep == "far" else (step >= -1e-6).all())
    found = semantic.duplicates(vectors, order, 0.05, nobody)
    assert 5 < found.dropped.sum() < 55 and set(np.flatnonzero(found.dropped).tolist()) == plainly(vectors, order, 0.05)
    place = np.argsort(order)
    for row in np.flatnonzero(found.dropped).tolist():
        assert place[found.match[row]] < place[row]
        assert found.similarity[row] == pytest.approx(float(vectors[row] @ vectors[found.match[row]]), abs=1e-6)


def test_what_is_to_stay_stays_and_stands_for_others() -> None:
    vectors = unit(np.array([[1, 0], [1, 0.001], [1, 0.002], [0, 1]]))
    first = np.array([False, False, True, False])
    order = semantic.order_of(vectors, vectors.mean(axis=0), "far", np.arange(4, dtype=np.uint64), first)
    found = semantic.duplicates(vectors, order, EPS, first)
    assert order[0] == 2 and found.dropped.tolist() == [True, True, False, False] and found.match[0] in (1, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """Five blobs of vectors, as in NeMo Curator's example, for pictures that are no copies of each other."""
    folder = tmp_path_factory.mktemp("semantic")
    named = [(f"{n}.png", picture(n, width=64, height=64)) for n in range(BLOBS * EACH)]
    write_folder(folder / "pool", named)
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(BLOBS, 6)) * 3
    vectors = np.repeat(centers, EACH, axis=0) + 0.35 * rng.normal(size=(BLOBS * EACH, 6))
    ids = [id_of(data) for _, data in named]
    pq.write_table(pa.table({"image_id": ids, "vector": [row.tolist() for row in vectors]}), folder / "v.parquet")
    (folder / "hand.txt").write_text(f"{ids[0]}\n{ids[1]}\n")
    (folder / "c.yaml").write_text(
        "store: ./runs\npool: [pool/]\nembed: {semantic: {kind: precomputed, path: v.parquet}}\n"
        "dedup: {threshold: 1.0, reference_threshold: 1.0, verify: none, phash_distance: 0,\n"
        f"  semantic: {{eps: {EPS}, keep: far}}}}\ncluster: {{k: {BLOBS}}}\nby_hand: {{keep: [hand.txt]}}\n"
    )
    with in_one_process():
        lodeset("run", folder / "c.yaml")
    yield folder / "c.yaml", dict(zip(ids, vectors, strict=True))


def test_a_run_drops_what_the_rule_says(finished: tuple[Path, dict[str, np.ndarray]]) -> None:
    config, vectors = finished
    now = entries(config)
    cluster = {row["image_id"]: row["cluster"] for row in rows(now["cluster/pool"], "clusters")}
    assert len(set(cluster.values())) == BLOBS and len(cluster) == BLOBS * EACH
    centroids = np.load(now["fit_clusters/pool"]["tables"]["centroids"][0])
    hand = (config.parent / "hand.txt").read_text().split()
    expected = set()
    for number in range(BLOBS):
        own = sorted(i for i, c in cluster.items() if c == number)
        some = unit(np.stack([vectors[i] for i in own])).astype(np.float16).astype(np.float32)
        first = np.isin(own, hand)
        order = semantic.order_of(some, centroids[number], "far", np.zeros(len(own), np.uint64), first)
        expected |= {own[n] for n in plainly(some, order, EPS) if not first[n]}
    found = rows(now["semdedup/pool"], "semantic")
    assert {row["image_id"] for row in found} == expected and 10 < len(expected) < 70
    counted = now["semdedup/pool"]["rows"]
    assert counted["dropped"] == {"semantic": len(expected)} and counted["kept"] == BLOBS * EACH - len(expected)
    kept = {row["image_id"] for row in rows(now["semdedup/pool"], "duplicates") if row["kept"]}
    assert kept == set(vectors) - expected >= set(hand)
    assert {row["image_id"] for row in rows(now["semdedup/pool"], "clusters")} == kept
    assert {row["image_id"] for row in rows(now["write_shards/all"], "index")} == kept


def test_it_is_told_wherever_images_are(
    finished: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, one_process: None
) -> None:
    config, _ = finished
    gone = rows(entries(config)["semdedup/pool"], "semantic")[0]
    told = json.loads(lodeset("trace", config, gone["image_id"], "--json")[0])["sentence"]
    assert told.startswith(
        f"dropped as a semantic duplicate of {gone['matched_id']} in cluster {gone['cluster']} (cosine 0.99"
    )
    assert "semdedup" in lodeset("status", config)[0] and "semantic" in lodeset("status", config)[0]
    lodeset("report", config, "--out", tmp_path / "report.html")
    assert "mean the same as another image of their cluster" in (tmp_path / "report.html").read_text()
    table = tmp_path / "gone.csv"
    lodeset("table", config, "semantic", "--out", table)
    assert gone["image_id"] in table.read_text()
    lodeset("inspect", config, "--make-only", "--no-thumbnails")
    # The same again is finished; another eps makes it and what follows again, and dedup not.
    assert lodeset("run", config, "--set", "dedup.semantic.eps=0.02")
    actions = {
        f"{one['stage']}/{one['set']}": one for one in json.loads(lodeset("plan", config, "--json")[0])["stages"]
    }
    assert actions["dedup/pool"]["action"] == "finished" == actions["semdedup/pool"]["action"]


def test_without_it_nothing_changes(finished: tuple[Path, dict[str, np.ndarray]], one_process: None) -> None:
    config, vectors = finished
    planned = json.loads(lodeset("plan", config, "--json", "--set", "dedup.semantic=null")[0])["stages"]
    actions = {one["stage"]: one["action"] for one in planned}
    assert "semdedup" not in actions and actions["dedup"] == "finished" == actions["cluster"]
    assert len(vectors) == BLOBS * EACH
