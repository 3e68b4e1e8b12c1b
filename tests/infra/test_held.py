"""What a store holds can be asked for when its sources, models and configuration are gone, others, or elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import id_of, picture, write_folder
from report_world import World, jpeg, make_world
from whole import pieces

from lodeset.infra import api
from lodeset.infra.config import read
from lodeset.infra.looking.held import configuration
from lodeset.infra.looking.summary import lines, snippet
from lodeset.pipeline.config import Ingest
from lodeset.pipeline.dag.damage import Damage, withdraw
from lodeset.pipeline.dag.runs import Wanted, record
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.errors import ConfigError, LodesetError, replaced_source, source_replaced
from lodeset.pipeline.sources.reading import Location
from lodeset.pipeline.stages.ingest.run import ingest_slice
from lodeset.pipeline.stages.write_shards import Entry, Shard, _read_from, write_shard
from lodeset.pipeline.tables.forgotten import remember


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A finished run of every stage, under a configuration whose pool is there no longer."""
    made = make_world(tmp_path)
    (tmp_path / "c.yaml").write_text("store: ./store\npool: [gone/*.tar]\n")
    run(made, tmp_path)
    return made


def run(world: World, folder: Path, **changes: Any) -> int:
    """Records what the world's artifacts are as one run."""
    artifacts = {id_: world.store.commit_artifact(one) for id_, one in world.artifacts.items()}
    wanted = Wanted("lodeset", None, "", configuration(read(folder / "c.yaml")), tuple(artifacts))
    return record(world.store, replace(wanted, **changes), artifacts, {}, 0.0, 1.8e9).number


def opened(folder: Path, *overrides: str) -> api.Opened:
    found = api.open_store(folder / "c.yaml", overrides)
    assert not found.stages and "gone" in found.missing[0]
    return found


def test_status_and_report_tell_the_last_run_without_its_sources(world: World, tmp_path: Path) -> None:
    told = {f"{e['stage']}/{e['set']}": e for e in api.status(opened(tmp_path))}
    assert list(told) == list(world.artifacts) and all(entry["finished"] for entry in told.values())
    assert told["dedup/pool"]["rows"] == {"in": 13, "kept": 9, "dropped": {"near": 3, "reference": 1}}
    found = api.summary(opened(tmp_path))
    assert (found.run, found.changed, found.images, found.dead_bytes) == (1, None, 8, 3_072)
    assert found.shards == world.store.full_url("shards/x")
    said = "\n".join(lines(found, "c.yaml"))
    assert (
        "run 1, finished 2027-01-15" in said
        and "cannot tell now whether anything has changed since: pool: nothing is at" in said
        and "compact" in said
    )
    page = api.report(opened(tmp_path), tmp_path / "page.html").read_text()
    assert "near-duplicates removed" in page and page.count("Not finished") == 0


def test_a_copied_store_is_as_good(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "store", tmp_path / "other/store")
    shutil.copy(tmp_path / "c.yaml", tmp_path / "other/c.yaml")
    before = api.status(opened(tmp_path))
    world.store.fs.rm(world.store.root, recursive=True)
    after = api.status(opened(tmp_path / "other"))
    assert [(e["rows"], e["details"]) for e in after] == [(e["rows"], e["details"]) for e in before]
    assert all(str(tmp_path / "other") in url for entry in after for url in entry["files"])
    assert "near-duplicates removed" in api.report(opened(tmp_path / "other"), tmp_path / "b.html").read_text()


def test_any_run_can_be_asked_for(world: World, tmp_path: Path) -> None:
    """A trial, a run that stopped early, and one of another data set in the same store."""
    full = dict(world.artifacts)
    world.artifacts = {"ingest/pool": replace(full["ingest/pool"], fingerprint="later", rows=Rows(3, 3))}
    assert run(world, tmp_path, until="ingest", stages=tuple(full)) == 2
    assert run(world, tmp_path, name="another") == 3
    assert run(world, tmp_path, limit=5) == 4
    last = api.status(opened(tmp_path))
    assert [e["finished"] for e in last] == [True] + [False] * (len(full) - 1) and last[0]["rows"]["in"] == 3
    assert api.summary(opened(tmp_path)).run == 2
    assert api.summary(api.open_store(tmp_path / "c.yaml", limit=5)).run == 4
    assert len([e for e in api.status(opened(tmp_path), 1) if e["finished"]]) == len(full)
    with pytest.raises(LodesetError, match="has no run 9: it has runs 1 to 4"):
        api.status(opened(tmp_path), 9)


def test_a_report_never_comes_out_empty_over_a_good_one(world: World, tmp_path: Path) -> None:
    page = api.report(opened(tmp_path), tmp_path / "page.html").read_bytes()
    (tmp_path / "c.yaml").write_text("store: ./nothing\npool: [gone/*.tar]\n")
    with pytest.raises(LodesetError, match=r"no stage has finished in .*page\.html stays as it is"):
        api.report(opened(tmp_path), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == page


def test_pairs_can_be_looked_at_without_their_sources(world: World, tmp_path: Path) -> None:
    before = world.artifacts["calibrate/pool"]
    details = {**before.details, "candidates": {"pool": 0.61, "reference": 0.45}}
    world.artifacts["calibrate/pool"] = replace(before, fingerprint="own", details=details)
    run(world, tmp_path)
    done = api.dedup_preview(opened(tmp_path), lambda _: None, tmp_path / "pairs.html")
    assert sum(section["pairs"] for section in done["sections"]) == 4 and done["refused"] is None
    assert "log-odds 3" in (tmp_path / "pairs.html").read_text()


def test_tables_are_listed_shown_and_written(world: World, tmp_path: Path) -> None:
    listed = {(t.stage, t.table): t.rows for t in api.tables(opened(tmp_path))}
    assert listed["dedup/pool", "duplicates"] == 13 and listed["ingest/pool", "rejects"] == 7
    near = api.table(opened(tmp_path), "duplicates", where={"reason": "near"})
    assert isinstance(near, list) and {row["matched_id"] for row in near} == {world.ids["00.jpg"], world.ids["01.jpg"]}
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        assert api.table(opened(tmp_path), "rejects", of="ingest/pool", to=tmp_path / name) == 7
        assert (tmp_path / name).stat().st_size
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 7
    assert api.table(opened(tmp_path), "rejects", where={"reason": "none"}, to=tmp_path / "b.csv") == 0
    assert not (tmp_path / "b.csv").exists()
    for arguments, message in (
        ({"name": "duplicate"}, r"no table duplicate in this run; its tables are: .*duplicates \(dedup/pool\)"),
        ({"name": "rejects", "where": {"reasons": "x"}}, "--where reasons: no such column; the columns are: set, uri"),
        ({"name": "rejects", "to": "a.xls"}, r"must end in \.parquet"),
    ):
        with pytest.raises(ConfigError, match=message):
            api.table(opened(tmp_path), **arguments)  # type: ignore[arg-type]


def test_trace_begins_with_a_sentence(world: World, tmp_path: Path) -> None:
    ids, sources = world.ids, world.sources
    today = time.strftime("%Y-%m-%d", time.localtime(1.8e9))

    def told(what: str) -> str:
        return api.trace(opened(tmp_path), what).sentence

    copy = (
        f"dropped as a copy of 00.jpg ({ids['00.jpg'][:12]}), similarity 0.800; that image has been kept since {today}"
    )
    for what in (
        ids["copy-of-0.jpg"],
        ids["copy-of-0.jpg"][:7].upper(),
        "copy-of-0.jpg",
        str(sources / "copy-of-0.jpg"),
    ):
        assert told(what) == copy, what
    assert told("leak.jpg").startswith("dropped as a copy of ref.jpg (") and "in the reference set `test-set`" in told(
        "leak.jpg"
    )
    assert told("tiny.jpg") == "dropped by the filter min_side (8, where the limit is 16)"
    assert told("query.jpg") == "an image of `flowers`, not of the pool"
    assert told("09.jpg") == "dropped by embed/pool: it has no vector"
    assert told("03.jpg") == f"kept by dedup, and selected by no curated set; kept since {today}"
    assert told("copy-of-0.jpg") != told("by-hash.jpg")
    # A picture that lies somewhere else, with the bytes of one that is known.
    elsewhere = tmp_path / "downloaded.bin"
    elsewhere.write_bytes((sources / "tiny.jpg").read_bytes())
    assert told(str(elsewhere)) == told("tiny.jpg")
    # A path whose file has other bytes by now.
    (sources / "tiny.jpg").write_bytes(jpeg(99))
    assert (
        told(str(sources / "tiny.jpg"))
        == f"{told(ids['tiny.jpg'])}. The file has other bytes now (image_id {id_of(jpeg(99))})"
    )
    for what in ("f" * 32, "nothing.jpg", "https://x.org/none.jpg"):
        with pytest.raises(LodesetError, match=r"no run of this store knows an image .*: give an image_id"):
            told(what)


def test_trace_finds_rejects_and_what_was_forgotten(world: World, tmp_path: Path) -> None:
    write_folder(
        tmp_path / "pool",
        [("a.png", picture(1)), ("b.png", b"no image"), ("deep/c.png", picture(2)), ("deep/a.png", picture(3))],
    )
    (piece,) = pieces(tmp_path / "pool")
    remember(world.store, [id_of(picture(2))], ["https://x.org/2"])
    tables, _ = ingest_slice("pool", piece, Ingest(), frozenset([id_of(picture(2))]))
    files = world.store.commit_part("ingest", "real", tables).files
    before = world.artifacts["ingest/pool"]
    world.artifacts["ingest/pool"] = replace(before, fingerprint="real", tables={n: (f,) for n, f in files.items()})
    assert run(world, tmp_path) == 2
    found = api.trace(opened(tmp_path), "b.png")
    assert found.image_id is None and found.sentence.startswith("rejected by ingest/pool as ")
    assert found.steps[0]["uri"] == str(tmp_path / "pool/b.png")
    assert api.trace(opened(tmp_path), "deep/c.png").sentence.startswith("forgotten")
    for what in (id_of(picture(2)), id_of(picture(2))[:6], "https://x.org/2"):
        assert api.trace(opened(tmp_path), what).sentence.startswith("forgotten on 20")
    with pytest.raises(
        ConfigError, match=r"a\.png stands for 2 images: give one of their ids \([0-9a-f]{32}, [0-9a-f]{32}\)"
    ):
        api.trace(opened(tmp_path), "a.png")
    assert api.trace(opened(tmp_path), str(tmp_path / "pool/a.png")).image_id == id_of(picture(1))
    # What only the run before had.
    assert api.trace(opened(tmp_path), "tiny.jpg").sentence.startswith(
        "no longer in the sources; according to run 1 of "
    )


# -- shards


def shard_of(store: Store, folder: Path, number: int) -> Artifact:
    """Four images in two shards, with their index."""
    write_folder(folder / "pool", [(f"{n}.png", picture(n)) for n in range(4)])
    (piece,) = pieces(folder / "pool")
    places = ingest_slice("pool", piece, Ingest())[0]["locations"].drop_columns(["set"]).to_pylist()
    parts = []
    for n, rows in enumerate((places[:2], places[2:])):
        entries = tuple(Entry(Location(**row), "png", json.dumps({"image_id": row["image_id"]})) for row in rows)
        parts.append(write_shard(store, f"shards/{number}", Shard(f"{number}-{n}", f"shard-{n:06d}.tar", entries)))
    index = store.write_named(f"shards/{number}/index.parquet", store.table([part.files["entries"] for part in parts]))
    tables = {"shards": tuple(part.files["shard"] for part in parts), "index": (index,)}
    details = {"folder": f"shards/{number}", "shards": 1, "shards_numbered": 1}
    return Artifact("write_shards", "all", 1, "w", {}, {}, tables, Rows(4, 4), {}, details)


@pytest.mark.parametrize("remote", [False, True])
def test_the_snippet_reads_the_shards(tmp_path: Path, remote: bool) -> None:
    store = Store(str(tmp_path / "store"))
    written = store.commit_artifact(shard_of(store, tmp_path, 0))
    wanted = Wanted("lodeset", None, "", {}, ("write_shards/all",))
    record(store, wanted, {written.id: written}, {}, 0.0, 1.0)
    (tmp_path / "c.yaml").write_text("store: ./store\npool: [gone/*.tar]\n")
    code = snippet(api.summary(opened(tmp_path)))
    if remote:
        code = code.replace(str(tmp_path), f"file://{tmp_path}")
    code += "    print(row['image_id'], image.size)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    sizes = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(sizes) == {id_of(picture(n)) for n in range(4)}, done.stderr


def test_shards_are_written_anew_from_shards_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    held = shard_of(store, tmp_path, 0)
    shutil.rmtree(tmp_path / "pool")
    entries = tuple(
        Entry(Location(i, "/nowhere", "", 0, 1), "png", "{}") for i in sorted(id_of(picture(n)) for n in (0, 3))
    )
    (moved,) = _read_from(store, held, [Shard("new", "shard-000009.tar", entries)])
    part = write_shard(store, "shards/1", moved)
    with tarfile.open(store.path(part.files["shard"].path)) as tar:
        found = [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".png")]  # type: ignore[union-attr]
    assert sorted(map(id_of, found)) == [entry.place.image_id for entry in entries]


# -- sources that changed unseen


def test_a_source_of_the_same_size_and_time_is_read_anew(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    artifacts = []
    for name in ("one", "two"):
        write_folder(tmp_path / name, [(f"{n}.png", picture(n)) for n in range(2)])
        (piece,) = pieces(tmp_path / name)
        files = store.commit_part("ingest", name, ingest_slice("pool", piece, Ingest())[0]).files
        tables = {table: (file,) for table, file in files.items()}
        artifacts.append(store.commit_artifact(Artifact("ingest", name, 1, name, {}, {}, tables, Rows(2, 2))))
    store.commit_part("ingest_exact", "both", {}, {"unique": 2})
    told = source_replaced(str(tmp_path / "one/1.png"), " at 0: image a expected, b found")
    uri, why = replaced_source(f"embed/pool: {told}") or ("", "")
    assert uri == str(tmp_path / "one/1.png") and "image a expected" in why
    done = withdraw(store, [Damage(uri, why, source=True)])
    assert [one.id for one in done.artifacts] == ["ingest/one"] and done.parts == 2
    assert store.part("ingest", "one") is None and store.part("ingest_exact", "both") is None
    assert store.artifact("ingest", "two", "two") == artifacts[1] and store.part("ingest", "two") is not None
