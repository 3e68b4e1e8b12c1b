"""Curation end to end, through the command line, on a small sample world: what a user relies on from run to run."""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset
from builders import id_of
from commands import actions, assert_digests_hold, entries, lodeset, rows, typed

from lodeset.infra.demo.truth import Truth

pytestmark = [
    pytest.mark.slow,  # whole runs
    # Webdataset leaves the shards that it read open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


# -- what a run leaves


def test_what_is_made_in_place_is_what_ray_makes(world: Path, finished: dict[str, dict[str, Any]]) -> None:
    """The little work of this world is done in the processes of stages. Ray makes the same parts with the same bytes."""
    assert finished["dedup/pool"]["finished"]
    by_ray = ("--set", "store=./by-ray", "--set", "resources.ray.in_place_s=0")
    lodeset("run", world / "lodeset.yaml", *by_ray, "--until", "dedup")
    for stage in ("embed", "filter", "calibrate", "dedup_search", "dedup_views", "dedup_verify"):
        made = _files(world / "by-ray", stage)
        assert made and made.items() <= _files(world / "runs", stage).items(), stage
    shutil.rmtree(world / "by-ray")


def _files(store: Path, stage: str) -> dict[str, dict[str, str]]:
    """Digests of the files of a stage's parts, by key and name."""
    manifests = [json.loads(path.read_text()) for path in (store / "parts" / stage).glob("*/manifest.json")]
    return {one["key"]: {name: file["sha256"] for name, file in one["files"].items()} for one in manifests}


def test_every_row_is_accounted_for(finished: dict[str, dict[str, Any]]) -> None:
    assert all(e["finished"] for e in finished.values())
    for id_, entry in finished.items():
        counted = entry["rows"]
        assert counted["in"] == counted["kept"] + sum(counted["dropped"].values()), id_


def test_ingest_finds_what_is_there(finished: dict[str, dict[str, Any]], truth: Truth) -> None:
    entry = finished["ingest/pool"]
    assert entry["rows"]["in"] == truth.files
    assert entry["rows"]["dropped"]["exact_duplicate"] == truth.exact_duplicates
    images = rows(entry, "images")
    assert {row["image_id"] for row in images} == set(truth.concepts)
    assert len(images) == len(truth.concepts), "image_id is the primary key"
    assert len(rows(entry, "rejects")) == sum(truth.rejects.values())
    places = [(r["set"], r["uri"], r["member"], r["offset"]) for r in rows(entry, "locations")]
    assert len(places) == len(set(places)) == truth.images + len(truth.tiny)


def test_locations_lead_to_the_bytes(finished: dict[str, dict[str, Any]]) -> None:
    for row in rows(finished["ingest/pool"], "locations"):
        with open(row["uri"], "rb") as file:
            file.seek(row["offset"])
            assert id_of(file.read(row["size_bytes"])) == row["image_id"]


def test_nothing_of_a_reference_set_reaches_the_shards(finished: dict[str, dict[str, Any]], truth: Truth) -> None:
    index = {row["image_id"] for row in rows(finished["write_shards/all"], "index")}
    assert truth.leaked
    assert not index & set(truth.leaked)
    assert finished["dedup/pool"]["rows"]["dropped"]["reference"] >= len(truth.leaked)


def test_one_keeper_a_group(finished: dict[str, dict[str, Any]]) -> None:
    table = rows(finished["dedup/pool"], "duplicates")
    assert len({row["image_id"] for row in table}) == len(table)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        groups.setdefault(row["group_id"], []).append(row)
    for members in groups.values():
        kept = [row for row in members if row["kept"]]
        if all(row["reason"] in ("unique", "near") for row in members):
            assert len(kept) == 1
            assert all(row["matched_id"] == kept[0]["image_id"] for row in members if not row["kept"])
        if any(row["reason"] == "reference" for row in members):
            assert not kept


def test_leaks_say_who_leaked_into_what(finished: dict[str, dict[str, Any]], truth: Truth, world: Path) -> None:
    entry = finished["dedup/pool"]
    leaks = rows(entry, "leaks")
    keys = [(row["set"], row["image_id"], row["pool_image_id"]) for row in leaks]
    assert len(keys) == len(set(keys))
    lost = {
        row["image_id"]: row["reason"]
        for row in rows(entry, "duplicates")
        if row["reason"] != "near" and not row["kept"]
    }
    assert {row["pool_image_id"] for row in leaks} == set(lost) and set(truth.leaked) <= set(lost)
    for name, counts in entry["details"]["leaks"].items():
        mine = [row for row in leaks if row["set"] == name]
        owned = {row["image_id"] for row in rows(finished[f"ingest/{name}"], "images")}
        assert {row["image_id"] for row in mine} <= owned
        assert counts["dropped"] == len({row["pool_image_id"] for row in mine})
        assert {lost[row["pool_image_id"]] for row in mine} <= {counts["role"]}
    leaked = next(row for row in leaks if row["pool_image_id"] in truth.leaked)
    steps = json.loads(lodeset("trace", world / "lodeset.yaml", leaked["pool_image_id"], "--json")[0])["steps"]
    assert leaked["set"] in {step["set"] for step in steps if step["table"] == "leaks"}


def test_what_sets_asked_and_got_adds_up(finished: dict[str, dict[str, Any]], world: Path) -> None:
    sets = {e["set"]: e["details"] for e in finished.values() if e["stage"] == "retrieve"}
    everything = sets.pop("all")
    selected = rows(finished["retrieve/all"], "selected")
    for name, told in sets.items():
        assert told["asked"] == told["distinct"] + told["collisions"] + told["short"] + told["capped"]
        assert told["distinct"] == sum(r["set"] == name and r["mode"] != "as_is" for r in selected)
        assert told["distinct"] == finished[f"retrieve/{name}"]["rows"]["kept"]
    holders: dict[str, int] = {}
    for row in selected:
        holders[row["image_id"]] = holders.get(row["image_id"], 0) + 1
    assert everything["shared"] == sum(n > 1 for n in holders.values())
    assert everything["distinct"] == len(holders) == len(rows(finished["write_shards/all"], "index"))
    out = lodeset("status", world / "lodeset.yaml")[0]
    total = next(line for line in out.splitlines() if line.startswith("all sets"))
    figures = [int(word.replace(",", "")) for word in total.split()[2:]]
    counted = [
        sum(told[key] for told in sets.values()) for key in ("asked", "distinct", "collisions", "short", "capped")
    ]
    assert figures == [*counted, everything["shared"]]
    composed = json.loads(lodeset("plan", world / "lodeset.yaml", "--json")[0])["composition"]
    assert composed["final"] == len(selected) and composed["unknown"] == []


def test_edges_are_ordered_pairs(finished: dict[str, dict[str, Any]]) -> None:
    edges = rows(finished["dedup/pool"], "edges")
    pairs = [(row["image_id_a"], row["image_id_b"]) for row in edges]
    assert pairs
    assert len(pairs) == len(set(pairs))
    assert all(a < b for a, b in pairs)


def test_selected_is_unique_and_each_set_gets_what_it_looks_for(
    finished: dict[str, dict[str, Any]], truth: Truth
) -> None:
    table = rows(finished["retrieve/all"], "selected")
    keys = [(row["image_id"], row["set"]) for row in table]
    assert len(keys) == len(set(keys))
    for name, concepts in truth.curated.items():
        mine = [r for r in table if r["set"] == name]
        assert {r["mode"] for r in mine} <= {"sample", "cluster", "as_is"}
        got = [truth.concepts[r["image_id"]] for r in mine if r["mode"] == "sample"]
        base = sum(c in concepts for c in truth.concepts.values()) / len(truth.concepts)
        assert not got or sum(c in concepts for c in got) / len(got) > 1.5 * base, name
    assert {r["set"] for r in table if r["mode"] == "as_is"} == {"beta"}


def test_shards_are_what_plain_webdataset_reads(finished: dict[str, dict[str, Any]], world: Path) -> None:
    entry = finished["write_shards/all"]
    sources: dict[str, bytes] = {}
    for set_ in ("pool", "beta"):
        for row in rows(finished[f"ingest/{set_}"], "locations"):
            with open(row["uri"], "rb") as file:
                file.seek(row["offset"])
                sources[row["image_id"]] = file.read(row["size_bytes"])
    wanted: dict[str, list[str]] = {}
    for row in rows(finished["retrieve/all"], "selected"):
        wanted.setdefault(row["image_id"], []).append(row["set"])
    read = {}
    assert len(entry["tables"]["shards"]) > 3
    for sample in webdataset.WebDataset(entry["tables"]["shards"], shardshuffle=False):
        (extension,) = [k for k in sample if not k.startswith("__") and k != "json"]
        assert sample[extension] == sources[sample["__key__"]]
        told = json.loads(sample["json"])
        assert told["image_id"] == sample["__key__"]
        assert [why["set"] for why in told["selected"]] == wanted[sample["__key__"]]
        assert sample["__key__"] not in read, "one entry, however many sets want it"
        read[sample["__key__"]] = sample[extension]
    index = rows(entry, "index")
    assert {row["image_id"] for row in index} == set(read)
    folder = Path(entry["tables"]["index"][0]).parent
    for row in index:
        with (folder / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size_bytes"]) == read[row["image_id"]]
    for shard in entry["tables"]["shards"]:
        assert Path(shard).stat().st_size <= 0.2 * 2**20 + 20_480
        with tarfile.open(shard) as tar:
            assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in tar)


def test_manifests_tell_the_digest_of_every_file(finished: dict[str, dict[str, Any]], world: Path) -> None:
    assert_digests_hold(finished, world / "runs")


# -- from run to run


def test_a_second_run_does_nothing(world: Path) -> None:
    started = time.monotonic()
    code, _, err = typed("run", world / "lodeset.yaml")
    assert time.monotonic() - started < 10
    assert code == 0 and "start" not in err


def test_another_threshold_searches_nothing_again(copy: Path, finished: dict[str, dict[str, Any]]) -> None:
    change = ("--set", "dedup.threshold=0.9")
    planned = actions(copy, *change)
    assert planned["dedup/pool"] == "run"
    assert {id_ for id_, action in planned.items() if action == "wait"} == {
        "cluster/pool", "fit_clusters/pool", "retrieve/alpha", "retrieve/beta", "retrieve/all", "write_shards/all"
    }  # fmt: skip
    out = lodeset("plan", copy, *change)[0]
    assert 'threshold "auto" -> 0.9' in out
    lodeset("run", copy, *change)
    after = entries(copy, *change)
    assert after["dedup/pool"]["details"]["threshold"] == 0.9
    assert after["dedup/pool"]["details"]["parts_made"] == 0
    for id_ in ("ingest/pool", "embed/pool", "filter/pool"):
        assert after[id_]["seconds"] == finished[id_]["seconds"], id_


def test_moved_data_is_listed_again_and_embedded_never(copy: Path, finished: dict[str, dict[str, Any]]) -> None:
    image_id = rows(finished["ingest/pool"], "images")[0]["image_id"]
    (copy.parent / "pool").rename(copy.parent / "moved")
    try:
        copy.write_text(copy.read_text().replace("pool/", "moved/"))
        _, err = lodeset("run", copy)
        assert [line.split()[1] for line in err.splitlines() if line.startswith("start")] == ["ingest/pool"]
        after = entries(copy)
        assert after["write_shards/all"]["details"] == finished["write_shards/all"]["details"]
        assert "/moved/" in lodeset("trace", copy, image_id)[0]
    finally:
        (copy.parent / "moved").rename(copy.parent / "pool")


def test_a_limit_takes_a_seeded_sample(copy: Path, truth: Truth) -> None:
    limit = ("--limit", "60")
    lodeset("run", copy, "--until", "embed", *limit)
    first = entries(copy, *limit)["ingest/pool"]
    assert first["rows"]["in"] == 60
    assert {r["image_id"] for r in rows(first, "images")} <= set(truth.concepts)


# -- asking


def test_trace_tells_an_image_s_way(world: Path, finished: dict[str, dict[str, Any]]) -> None:
    image_id = rows(finished["write_shards/all"], "index")[0]["image_id"]
    steps = json.loads(lodeset("trace", world / "lodeset.yaml", image_id, "--json")[0])["steps"]
    tables = [step["table"] for step in steps]
    for table in ("images", "locations", "vectors", "duplicates", "selected", "index"):
        assert table in tables
    for nobody in ("0" * 32, "xyz"):
        assert f"knows an image {nobody}" in lodeset("trace", world / "lodeset.yaml", nobody, code=1)[1]


def test_pairs_can_be_looked_at_where_dedup_refuses_them(copy: Path, tmp_path: Path) -> None:
    page = tmp_path / "pairs.html"
    change = ("--set", "dedup.verify=none", "--set", "dedup.threshold=0.1", "--set", "dedup.reference_threshold=0.1")
    done = json.loads(lodeset("dedup-preview", copy, "--out", page, "--json", *change)[0])
    assert "near-duplicate group" in done["refused"] and done["sections"]
    assert page.read_text().count("data:image/jpeg;base64,") > 10
    assert json.loads(lodeset("dedup-preview", copy, "--out", page, "--json")[0])["refused"] is None


def test_report_is_one_file(world: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert json.loads(lodeset("report", world / "lodeset.yaml", "--out", page, "--json")[0]) == {"path": str(page)}
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") > 50
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "<script" not in text
