"""Curation end to end, through the command line, on a small sample world: what a user relies on from run to run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import webdataset
import yaml
from builders import encoded, id_of, picture, write_tar
from PIL import Image

from infra.demo.world import Truth, load_truth, make_world, write_config

pytestmark = [
    pytest.mark.slow,  # whole runs
    # Webdataset leaves the shards that it read open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def lodeset(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Runs the command line; standard output and standard error."""
    command = [sys.executable, "-m", "infra.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def entries(config: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    tree = json.loads(lodeset("status", config, "--json", *arguments)[0])
    return {f"{e['stage']}/{e['set']}": e for e in tree["artifacts"]}


def actions(config: Path, *arguments: str) -> dict[str, str]:
    tree = json.loads(lodeset("plan", config, "--json", *arguments)[0])
    return {f"{e['stage']}/{e['set']}": e["action"] for e in tree["stages"]}


def rows(entry: dict[str, Any], table: str) -> list[dict[str, Any]]:
    return ds.dataset(entry["tables"][table]).to_table().to_pylist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curation") / "world"
    make_world(folder, 260)
    path = write_config(folder)
    config = yaml.safe_load(path.read_text())
    del config["training"], config["pruning"]
    config["ingest"] = {"slice_mb": 0.5}
    config["dedup"] = {"calibration_images": 40}
    config["shards"] = {"size_mb": 0.2}
    config["curated"][1]["retrieve"]["min_matches"] = (
        2  # of 8 images: which clusters they fall in moves with what dedup keeps
    )
    path.write_text(yaml.safe_dump(config))
    lodeset("run", path)
    return folder


@pytest.fixture(scope="module")
def truth(world: Path) -> Truth:
    return load_truth(world)


@pytest.fixture(scope="module")
def finished(world: Path) -> dict[str, dict[str, Any]]:
    return entries(world / "lodeset.yaml")


@pytest.fixture
def copy(world: Path) -> Iterator[Path]:
    """A configuration of the same world with a copy of the finished store, to change."""
    shutil.copytree(world / "runs", world / "copy", copy_function=shutil.copy2)
    config = world / "copy.yaml"
    config.write_text((world / "lodeset.yaml").read_text().replace("./runs", "./copy"))
    yield config
    shutil.rmtree(world / "copy")


# -- what a run leaves


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


def test_manifests_tell_the_digest_of_every_file(
    finished: dict[str, dict[str, Any]], world: Path, store: str = "runs"
) -> None:
    for entry in finished.values():
        tree = json.loads(Path(entry["manifest"]).read_text())
        for files in tree["tables"].values():
            for file in files:
                assert hashlib.sha256((world / store / file["path"]).read_bytes()).hexdigest() == file["sha256"]


# -- from run to run


def test_a_second_run_does_nothing(world: Path) -> None:
    started = time.monotonic()
    _, err = lodeset("run", world / "lodeset.yaml")
    assert time.monotonic() - started < 10
    assert "start" not in err


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


def by_image(entry: dict[str, Any], table: str) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in rows(entry, table)}


def read_shards(entry: dict[str, Any]) -> dict[str, bytes]:
    """What plain webdataset reads from the shards, by image_id."""
    samples = webdataset.WebDataset(entry["tables"]["shards"], shardshuffle=False)
    return {s["__key__"]: next(v for k, v in s.items() if k not in ("__key__", "__url__", "json")) for s in samples}


def indexed(entry: dict[str, Any]) -> dict[str, bytes]:
    """What lies where the index says that images lie."""
    folder, found = Path(entry["tables"]["index"][0]).parent, {}
    for row in rows(entry, "index"):
        with (folder / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            found[row["image_id"]] = file.read(row["size_bytes"])
    assert all(id_of(data) == image_id for image_id, data in found.items())
    return found


@pytest.fixture
def grown(copy: Path, finished: dict[str, dict[str, Any]]) -> Iterator[Path]:
    """The configuration after another run over the pool with one more tar.

    It sorts first and holds an image that is in the pool already: neither may touch the parts of the others.
    """
    known = rows(finished["ingest/pool"], "locations")[0]
    with open(known["uri"], "rb") as file:
        file.seek(known["offset"])
        again = file.read(known["size_bytes"])
    kept = rows(finished["retrieve/all"], "selected")[0]["image_id"]
    place = next(row for row in rows(finished["ingest/pool"], "locations") if row["image_id"] == kept)
    with open(place["uri"], "rb") as file:
        file.seek(place["offset"])
        near = Image.open(io.BytesIO(file.read(place["size_bytes"]))).convert("RGB")
    larger = encoded(near.resize((2 * near.width, 2 * near.height)))
    new = copy.parent / "pool/a-new.tar"
    write_tar(
        new,
        [*((f"{i}.png", picture(1_000 + i)) for i in range(7)), ("again.bin", again), ("larger.png", larger)],
    )
    # Everything that is kept goes in, so that what is new does.
    tree = yaml.safe_load(copy.read_text())
    tree["curated"].append({"name": "anything", "uri": str(new), "retrieve": {"mode": "sample", "k": 1}})
    copy.write_text(yaml.safe_dump(tree))
    try:
        lodeset("run", copy)
        yield copy
    finally:
        new.unlink()


def test_one_more_tar_costs_only_itself(
    grown: Path, finished: dict[str, dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    after = entries(grown)
    assert after["ingest/pool"]["details"]["images_decoded"] == 9
    assert after["embed/pool"]["details"]["images_embedded"] == 8
    assert after["ingest/pool"]["rows"]["kept"] == finished["ingest/pool"]["rows"]["kept"] + 8
    for id_ in ("fit_embedder/pool", "calibrate/pool"):
        fingerprints = [tree[id_]["manifest"].rsplit("/", 2)[1] for tree in (after, finished)]
        assert fingerprints[0] == fingerprints[1]
    assert after["fit_clusters/pool"]["details"]["parts_made"] == 0
    names = [[Path(p).name for p in tree["fit_clusters/pool"]["tables"]["centroids"]] for tree in (after, finished)]
    assert names[0] == names[1]
    assert after["dedup/pool"]["details"]["generations"][1:] == [8]

    # The larger copy of an image that shards hold takes no place in them.
    before, duplicates = by_image(finished["dedup/pool"], "duplicates"), by_image(after["dedup/pool"], "duplicates")
    assert all(duplicates[image_id]["kept"] for image_id, row in before.items() if row["kept"])
    new = {i: row for i, row in duplicates.items() if i not in before}
    assert sorted(row["reason"] for row in new.values()) == ["near", *["unique"] * 7]

    shards, earlier = after["write_shards/all"], finished["write_shards/all"]
    since = shards["details"]["since"]
    assert sum(since["added"].values()) + sum(since["removed"].values()) == len(rows(shards, "changes"))
    assert since["added"]["anything sample"] >= 1
    assert "since the run before: " in lodeset("status", grown)[0]
    assert shards["details"]["written_bytes"] < 0.2 * shards["details"]["size_bytes"]
    assert {Path(p).name for p in earlier["tables"]["shards"]} <= {Path(p).name for p in shards["tables"]["shards"]}
    assert set(indexed(shards)) == {row["image_id"] for row in rows(after["retrieve/all"], "selected")}
    told = {row["image_id"]: row["change"] for row in rows(shards, "changes")}
    now, then = ({row["image_id"] for row in rows(entry, "index")} for entry in (shards, earlier))
    assert told == {**dict.fromkeys(now - then, "added"), **dict.fromkeys(then - now, "removed")}
    assert set(by_image(shards, "tombstones")) == set(read_shards(shards)) - now

    # From scratch, the same images are copies of the same; only who is kept of them may differ.
    scratch = tmp_path / "scratch.yaml"
    scratch.write_text(grown.read_text().replace("./copy", str(tmp_path / "runs")))
    shutil.copy(scratch, world / "scratch.yaml")
    try:
        lodeset("run", world / "scratch.yaml", "--until", "dedup")
        anew = by_image(entries(world / "scratch.yaml")["dedup/pool"], "duplicates")
    finally:
        (world / "scratch.yaml").unlink()
    assert {i: row["group_id"] for i, row in anew.items()} == {i: row["group_id"] for i, row in duplicates.items()}
    differ = {i for i, row in anew.items() if row["kept"] != duplicates[i]["kept"]}
    assert len({anew[i]["group_id"] for i in differ}) == 1


def test_compaction_leaves_what_is_selected_in_shards_of_its_own(grown: Path) -> None:
    before = entries(grown)["write_shards/all"]
    done = json.loads(lodeset("compact", grown, "--json")[0])
    after = entries(grown)["write_shards/all"]
    assert set(indexed(after)) == set(read_shards(after)) == set(indexed(before)) == set(by_image(before, "index"))
    assert done["superseded_bytes"] > 0 and not done["deleted"] and after["details"]["dead_bytes"] == 0
    deleted = json.loads(lodeset("compact", grown, "--delete", "--json")[0])
    assert deleted["images"] == len(indexed(after)) and deleted["superseded_bytes"] == done["superseded_bytes"]
    listed = {Path(file) for file in after["tables"]["shards"]}
    kept = set((grown.parent / "copy/shards").glob("*/*.tar"))
    # Of the run before the set was added, whose artifact is of other sets, the shards stay.
    assert listed <= kept and len(kept) < len(listed) + before["details"]["shards"]
    assert "nothing to do" in lodeset("plan", grown)[0]


def test_what_is_forgotten_is_gone_and_stays_away(grown: Path) -> None:
    before = entries(grown)
    held = indexed(before["write_shards/all"])
    places = {row["image_id"]: row["uri"] for row in rows(before["ingest/pool"], "locations")}
    image_id = min(held.keys() & places.keys())
    others = {i: data for i, data in held.items() if i != image_id}
    done = json.loads(lodeset("forget", grown, image_id, "--json")[0])
    assert done["image_ids"] == [image_id] and done["shards"] >= 1 and done["rows"]["images"] >= 1
    after = entries(grown)
    for entry in after.values():
        for files in entry["tables"].values():
            for file in files:
                if file.endswith(".parquet"):
                    table = ds.dataset(file).to_table()
                    assert not any(image_id in str(table[c].unique()) for c in table.column_names if "id" in c), file
    assert indexed(after["write_shards/all"]) == others
    store = grown.parent / "copy"
    assert not any(image_id.encode() in path.read_bytes() for path in store.glob("shards/*/*.tar") if path.is_file())
    test_manifests_tell_the_digest_of_every_file(after, grown.parent, "copy")
    assert "nothing to do" in lodeset("plan", grown)[0]
    assert "neither an image_id" in lodeset("forget", grown, "https://nowhere.org/x", code=1)[1]
    # The source still has it, and is read again because it seems to have changed.
    source = Path(places[image_id])
    times = source.stat()
    os.utime(source)
    try:
        lodeset("run", grown)
        again = entries(grown)
        left = set(indexed(again["write_shards/all"]))
        lodeset("compact", grown, "--delete")
        compacted = entries(grown)["write_shards/all"]
    finally:
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert again["ingest/pool"]["rows"]["dropped"]["forgotten"] >= 1
    assert again["embed/pool"]["details"]["images_embedded"] == 0
    assert image_id not in left
    assert set(indexed(compacted)) == set(read_shards(compacted)) == left


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
    assert "no image" in lodeset("trace", world / "lodeset.yaml", "0" * 32, code=1)[1]
    assert "not an image_id" in lodeset("trace", world / "lodeset.yaml", "xyz", code=2)[1]


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
