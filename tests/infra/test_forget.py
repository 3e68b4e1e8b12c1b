"""Take-down on a small store made by hand: one ingest part, two shards with their index, what dedup keeps for later runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import id_of, picture, write_folder
from whole import pieces

from lodeset.infra.upkeep.damage import verify
from lodeset.infra.upkeep.forget import forget
from lodeset.pipeline.config import Ingest
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.errors import HeldError, LodesetError
from lodeset.pipeline.sources.reading import Location
from lodeset.pipeline.stages.dedup import generations
from lodeset.pipeline.stages.dedup.generations import generations_of
from lodeset.pipeline.stages.ingest.run import ingest_slice
from lodeset.pipeline.stages.standing import Told
from lodeset.pipeline.stages.write_shards import Entry, Shard, _publish, content_of, write_shard
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.forgotten import forgotten, refuse_during_take_down
from lodeset.pipeline.tables.tar_writing import add_member, open_tar

DATA = [picture(n) for n in range(6)]
IDS = [id_of(data) for data in DATA]
GONE, COPY = IDS[1], IDS[2]
OF_COPIES = {GONE: {"metadata_of_copies": [{"image_id": COPY, "url": "https://x.org/c"}, {"image_id": "d" * 32}]}}


@dataclass(frozen=True)
class World:
    store: Store
    artifacts: dict[str, Artifact]
    folder: Path


@pytest.fixture
def world(tmp_path: Path) -> World:
    store = Store(str(tmp_path / "store"))
    write_folder(tmp_path / "pool", [(f"{n}.png", data) for n, data in enumerate(DATA)])
    (piece,) = pieces(tmp_path / "pool")
    tables, counts = ingest_slice("pool", piece, Ingest())
    tables["metadata"] = pa.Table.from_pylist(
        [{**dict.fromkeys(records.METADATA.names), "image_id": i, "source": "s", "url": f"https://x.org/{n}"}
         for n, i in enumerate(IDS)],
        schema=records.METADATA,
    )  # fmt: skip
    ingested = store.commit_part("ingest", "p", tables, counts)
    places = {row["image_id"]: row for row in tables["locations"].drop_columns(["set"]).to_pylist()}
    parts = []
    for n, ids in enumerate((IDS[:3], IDS[3:])):
        entries = tuple(
            Entry(Location(**places[i]), "png", json.dumps({"image_id": i, **OF_COPIES.get(i, {})})) for i in ids
        )
        parts.append(write_shard(store, "shards/a", Shard(f"s{n}", f"shard-{n:06d}.tar", entries)))
    index = store.table([part.files["entries"] for part in parts])
    told = Told(index, *(schema.empty_table() for schema in (records.TOMBSTONES, records.CHANGES, records.COPIES)))
    published = _publish(store, "shards/a", told)
    duplicates = pa.table(
        {
            "image_id": IDS,
            "group_id": [min(GONE, COPY) if i in (GONE, COPY) else i for i in IDS],
            "kept": [i != COPY for i in IDS],
            "reason": ["near" if i == COPY else "unique" for i in IDS],
            "matched_id": [GONE if i == COPY else None for i in IDS],
            "similarity": pa.nulls(6, pa.float32()),
        },
        schema=records.DUPLICATES,
    )
    judged = store.commit_part("dedup", "d", {"duplicates": duplicates})
    generation = generations_of(store, None, sorted(IDS))[0].file
    store.commit_part("neighbors", "n", {"anything": pa.table({"x": [1]})})

    def made(stage: str, set_: str, tables: dict[str, tuple[File, ...]]) -> Artifact:
        content = {"images": content_of(index)}
        return store.commit_artifact(Artifact(stage, set_, 1, f"f-{stage}", {}, {}, tables, Rows(6, 6), content))

    artifacts = {
        "ingest/pool": made("ingest", "pool", {name: (file,) for name, file in ingested.files.items()}),
        "dedup/pool": made("dedup", "pool", {"duplicates": (judged.files["duplicates"],), "generations": (generation,)}),
        "write_shards/all": made(
            "write_shards", "all",
            {"shards": tuple(p.files["shard"] for p in parts), **{n: (f,) for n, f in published.items()}},
        ),
    }  # fmt: skip
    return World(store, artifacts, tmp_path)


def every_part(store: Store) -> Iterator[Part]:
    for stage in store.names("parts"):
        for key in store.names(f"parts/{stage}"):
            part = store.part(stage, key)
            if part is not None:
                yield part


def check(world: World, *gone: str) -> None:
    """Nothing names what is gone, everything else is where it is said to be, and manifests fit their files."""
    store = world.store
    files = {file.path: file for part in every_part(store) for file in part.files.values()}
    for id_, before in world.artifacts.items():
        after = store.artifact(before.stage, before.set, before.fingerprint)
        assert after is not None and after.rows.balanced() and after.rows.taken == before.rows.taken
        lost = len(gone) if id_ != "dedup/pool" else 1  # the copy was not kept
        assert after.rows.dropped == {"forgotten": lost}, id_
        assert id_ != "write_shards/all" or after.content["images"] != before.content["images"]
        for file in (f for of in after.tables.values() for f in of):
            assert files[file.path] == file, id_
    for path, file in files.items():
        data = store.read(path)
        assert data is not None and hashlib.sha256(data).hexdigest() == file.sha256 and len(data) == file.size_bytes
        if path.endswith(".tar"):
            assert not any(one.encode() in data for one in gone)
        else:
            table = store.table([file])
            assert table.num_rows == file.rows
            assert not any(one in str(table.to_pydict()) for one in gone), path
    index = store.table([store.part("shard_index", store.names("parts/shard_index")[0]).files["index"]]).to_pylist()  # type: ignore[union-attr]
    assert {row["image_id"] for row in index} == set(IDS) - set(gone)
    for row in index:
        data = store.read(f"shards/a/{row['shard']}") or b""
        assert id_of(data[row["offset"] : row["offset"] + row["size_bytes"]]) == row["image_id"]
    names = []
    for shard in (0, 1):
        with tarfile.open(store.path(f"shards/a/shard-{shard:06d}.tar")) as tar:
            names += [member.name for member in tar]
    assert sorted(names) == sorted(f"{i}.{e}" for i in set(IDS) - set(gone) for e in ("png", "json"))
    assert forgotten(store) == set(gone)
    assert not store.names("parts/neighbors") or not any(
        store.part("neighbors", k) for k in store.names("parts/neighbors")
    )


@pytest.mark.parametrize("asked", [GONE, GONE.upper(), "https://x.org/1"])
def test_an_image_leaves_every_table_and_shard(world: World, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = forget(world.store, [asked], with_copies=False)
    assert (done.image_ids, done.shards, done.copies, done.warnings) == ((GONE,), 1, (COPY,), ())
    assert done.rows["images"] == done.rows["locations"] == done.rows["index"] == done.rows["generations"] == 1
    check(world, GONE)
    part = world.store.part("ingest", "p")
    assert part is not None
    rejects = world.store.table([part.files["rejects"]]).to_pylist()
    assert [(row["reason"], Path(row["uri"]).name) for row in rejects] == [("forgotten", "1.png")]
    # Its copy now bears the group alone, and says no more whose copy it was.
    judged = world.store.table([world.store.part("dedup", "d").files["duplicates"]]).to_pylist()  # type: ignore[union-attr]
    (left,) = (row for row in judged if row["image_id"] == COPY)
    assert left["group_id"] == COPY and left["matched_id"] is None
    # The generation is what it was, less one.
    monkeypatch.setattr(generations, "GONE", 0.2)
    previous = world.store.artifact("dedup", "pool", "f-dedup")
    (generation,) = generations_of(world.store, previous, sorted(set(IDS) - {GONE}))
    assert len(generation.ids) == 6 and (generation.nodes < 0).sum() == 1
    assert generation.key == digest(generations.STAGE, generations.VERSION, sorted(IDS))
    # Nothing is left to do a second time, and a source that still has it is not believed.
    again = forget(world.store, [GONE], with_copies=False)
    assert not any(again.rows.values()) and "nothing in the store referred to it" in again.warnings[0]
    (piece,) = pieces(world.folder / "pool")
    tables, counts = ingest_slice("pool", piece, Ingest(), forgotten(world.store))
    assert tables["images"].num_rows == 5 and counts["files"] == 6
    assert tables["rejects"]["reason"].to_pylist() == ["forgotten"]


def test_blurred_images_go_with_what_they_were_made_of(world: World) -> None:
    """Two take-downs from one tar of blurred images, the first one's first."""
    store, blurred = world.store, [picture(90 + n) for n in range(3)]
    ids, of = [id_of(data) for data in blurred], IDS[3:]
    offsets = []
    with store.writing("parts/blur_faces/b/blurred.tar") as sink, open_tar(sink) as tar:
        for image_id, data in zip(ids, blurred, strict=True):
            offsets.append(tar.offset + 512)
            add_member(tar, f"{image_id}.png", data)
    file = File("parts/blur_faces/b/blurred.tar", 3, sink.size_bytes, sink.sha256())
    images = store.table([store.part("ingest", "p").files["images"]]).slice(0, 3)  # type: ignore[union-attr]
    tables = {
        "images": images.set_column(0, "image_id", pa.array(ids)),
        "faces": pa.table({"image_id": ids, "derived_from": of, "faces": [1] * 3}, schema=records.FACES),
    }
    store.commit_part("blur_faces", "b", tables, files={"blurred": file})
    for asked, n in ((of[0], 0), (ids[1], 1)):
        done = forget(store, [asked], with_copies=False)
        assert set(done.image_ids) == {of[n], ids[n]}
        data = store.read(file.path) or b""
        assert [id_of(data[at : at + len(b)]) == i for at, b, i in zip(offsets, blurred, ids, strict=True)] == [
            k > n for k in range(3)
        ]
        with tarfile.open(store.path(file.path)) as read:
            assert [member.name for member in read] == ["forgotten"] * (n + 1) + [f"{i}.png" for i in ids[n + 1 :]]


def test_what_killed_runs_left_is_swept(world: World) -> None:
    left = ["shards/a/shard-000009.tar", "shards/a/shard-000000.tar." + "0" * 32, "parts/embed/k/abc-vectors.parquet"]
    stays = ["shards/a/NOTES.txt", "parts/train/k/checkpoint.bin"]
    for relative in (*left, *stays):
        world.store.put_absent(relative, GONE.encode())
    forget(world.store, [GONE], with_copies=False)
    assert [world.store.read(relative) is not None for relative in (*left, *stays)] == [False] * 3 + [True] * 2


def test_copies_go_along_where_asked(world: World) -> None:
    done = forget(world.store, [GONE], with_copies=True)
    assert set(done.image_ids) == {GONE, COPY} and done.copies == ()
    check(world, GONE, COPY)


@pytest.mark.parametrize("after", [0, 2, 5, 100])
def test_a_take_down_that_was_cut_short_is_completed_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls, replace = 0, Store.replace

    def failing(store: Store, copy: str, relative: str) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        replace(store, copy, relative)

    monkeypatch.setattr(Store, "replace", failing)
    if after < 100:
        with pytest.raises(KeyboardInterrupt):
            forget(world.store, [GONE], with_copies=False)
        with pytest.raises(HeldError, match="cut short"):
            refuse_during_take_down(world.store)
    monkeypatch.undo()
    forget(world.store, [GONE], with_copies=False)
    refuse_during_take_down(world.store)
    check(world, GONE)


def test_models_that_saw_it_are_named(world: World) -> None:
    trained = dataclasses.replace(world.artifacts["dedup/pool"], stage="train", set="all", tables={})
    world.store.commit_artifact(trained)
    (warning,) = forget(world.store, [GONE], with_copies=False).warnings
    assert "train ran before" in warning


def test_neither_an_unknown_url_nor_a_run_at_work_goes_unnoticed(world: World) -> None:
    with pytest.raises(LodesetError, match=r"https://x.org/9 is neither an image_id .* nor the URL of an image in"):
        forget(world.store, ["https://x.org/9"], with_copies=False)
    with claim(world.store, "ingest-pool-1", "a stage"), pytest.raises(HeldError, match="ingest-pool-1"):
        forget(world.store, [GONE], with_copies=False)
    with claim(world.store, "forget", "a take-down"), pytest.raises(HeldError, match="being deleted"):
        refuse_during_take_down(world.store)
    assert forgotten(world.store) == frozenset()


def test_the_address_of_a_dropped_copy_takes_the_kept_image_too(world: World) -> None:
    url = f"https://x.org/{IDS.index(COPY)}"
    done = forget(world.store, [url], with_copies=False)
    assert set(done.image_ids) == {COPY, GONE}
    assert not any(image_id in (COPY, GONE) for image_id, _ in in_shards(world))


def test_what_a_forgotten_copy_said_leaves_the_image_that_stands_for_it(world: World) -> None:
    forget(world.store, [COPY], with_copies=False)
    assert dict(in_shards(world))[GONE]["metadata_of_copies"] == [{"image_id": "d" * 32}]


def in_shards(world: World) -> list[tuple[str, dict[str, Any]]]:
    """The JSON of every image in every shard that is left."""
    found = []
    for path in Path(world.store.path("shards")).rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append((member.name.removesuffix(".json"), json.loads(file.read())))
    return found


@pytest.mark.parametrize(
    "where", ["parts/write_shards/s0/manifest.json", "shards/a/shard-000000.tar", "parts/ingest/p", "artifacts"]
)
def test_damage_holds_up_no_take_down(world: World, where: str) -> None:
    """What cannot be read goes whole, with what lists it; nothing that is left names the image."""
    root = Path(world.store.url)
    files = (
        [root / where]
        if (root / where).is_file()
        else sorted((root / where).rglob("*.parquet" if "parts" in where else "*.json"))
    )
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    done = forget(world.store, [GONE], with_copies=False)
    assert done.image_ids == (GONE,) and "`lodeset run` makes them again" in done.warnings[-1]
    assert not verify(world.store, deep=True).damage
    assert GONE in forgotten(world.store)
    for file in {file.path: file for part in every_part(world.store) for file in part.files.values()}.values():
        data_left = (root / file.path).read_bytes()
        text = (
            str(world.store.table([file]).to_pydict())
            if file.path.endswith(".parquet")
            else data_left.decode("latin-1")
        )
        assert GONE not in text, file.path
