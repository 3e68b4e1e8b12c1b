"""ingest as a stage: what it reads does not depend on slices, and what it draws is exactly what was asked for."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import encoded, id_of, picture, pixels, write_folder, write_parquet, write_tar
from PIL import Image

from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import ingest_stage
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.sources.members import joined
from lodeset.pipeline.sources.slices import Slice, cut, members_of, split_loose
from lodeset.pipeline.stages.ingest import draw
from lodeset.pipeline.stages.ingest import run as ingest
from lodeset.pipeline.tables import records

# What importing Beam warns of is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def ran(store: Store, *paths: Path, set_: str = "pool", **knobs: Any) -> Outcome:
    """The stage in this process."""
    stage = ingest_stage(Ingest(**knobs), {}, set_, [Source(uri=str(path)) for path in paths])
    fingerprint = f"{knobs.get('limit')}{[str(p) for p in paths]}"
    outcome = ingest.run(Context(store, stage, fingerprint, {}, 1, lambda _: None))
    assert outcome.rows.balanced()
    return outcome


def column(store: Store, outcome: Outcome, table: str, name: str) -> list[Any]:
    return list(store.table(outcome.tables[table], [name])[name].to_pylist())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_two_sets_over_one_tar_hold_every_image_once(tmp_path: Path, store: Store) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", picture(n % 8)) for n in range(16)])
    expected = sorted(id_of(picture(n)) for n in range(8))
    for set_ in ("pool", "test"):
        outcome = ran(store, path, set_=set_, slice_mb=0.01)
        assert outcome.details["parts"] > 2
        assert sorted(column(store, outcome, "images", "image_id")) == expected, set_
        assert outcome.rows.dropped == {"exact_duplicate": 8}


# -- slices


def rows(pieces: list[Slice]) -> dict[str, list[dict[str, Any]]]:
    """What the parts of these slices hold together, in the order of their keys; of `images` the first of each id."""
    tables = [ingest.ingest_slice("pool", piece, Ingest())[0] for piece in pieces]
    out = {}
    for name in ingest.TABLES:
        found = pa.concat_tables([t[name] for t in tables]).to_pylist()
        out[name] = sorted(({k: str(v) for k, v in row.items()} for row in found), key=lambda row: sorted(row.items()))
    out["images"] = list({row["image_id"]: row for row in out["images"]}.values())
    return out


def shuffled(seed: int) -> list[tuple[str, bytes]]:
    """Samples whose members lie anywhere in the archive: repeated names, bad sidecars, sidecars alone, several images."""
    draw = random.Random(seed)
    members = [(f"d{n % 2}/{n}.png", picture(n % 9)) for n in range(12)]
    members += [(f"d{n % 2}/{n}.alt.png", picture(20 + n)) for n in range(0, 12, 5)]
    members += [(f"d{n % 2}/{n}.cls", b"%d" % n) for n in range(14)]
    members += [(f"d{n % 2}/{n}.json", b"{" if n % 3 else b'{"caption": "c%d"}' % n) for n in range(0, 14, 2)]
    members += draw.choices(members, k=4)
    draw.shuffle(members)
    return members


@pytest.mark.parametrize("seed", range(6))
def test_what_a_tar_says_does_not_depend_on_how_it_is_cut(tmp_path: Path, seed: int) -> None:
    (file,) = expand([Source(uri=str(write_tar(tmp_path / "a.tar", shuffled(seed))))], "pool")
    members = joined(members_of(file))
    cuts = [cut(file, members, slice_bytes) for slice_bytes in (1, 5_000, 20_000, 10**7)]
    assert len(cuts[0]) == len(members) > len(cuts[1]) > len(cuts[2]) > len(cuts[3]) == 1
    whole = rows(cuts[-1])
    assert whole["metadata"] and {r["reason"] for r in whole["rejects"]} >= {"bad_metadata", "metadata_without_image"}
    keys = [(r["uri"], r["member"], r["offset"]) for r in whole["rejects"]]
    assert len(set(keys)) == len(keys)
    for pieces in cuts[:-1]:
        assert rows(pieces) == whole


def test_labels_after_all_images_belong_to_them(tmp_path: Path) -> None:
    images = [(f"{n}.png", picture(n)) for n in range(10)]
    labels = [(f"{n}.cls", b"%d" % n) for n in range(10)]
    (file,) = expand([Source(uri=str(write_tar(tmp_path / "a.tar", images + labels)))], "pool")
    found = rows(cut(file, joined(members_of(file)), 4_000))
    assert {(r["image_id"], r["label"]) for r in found["metadata"]} == {(id_of(picture(n)), str(n)) for n in range(10)}
    assert found["rejects"] == []


def test_a_folder_says_the_same_however_it_is_cut(tmp_path: Path) -> None:
    more = [("a", picture(31)), ("a-b.png", picture(32)), ("a.png", picture(33)), ("a.txt", b"of both")]
    files = expand([Source(uri=str(write_folder(tmp_path / "pool", shuffled(0) + more)))], "pool")
    whole = rows(split_loose(files, 10**7))
    assert whole["metadata"] and whole["rejects"]
    assert [r["image_id"] for r in whole["metadata"] if r["caption"] == "of both"] == sorted(
        id_of(picture(n)) for n in (31, 33)
    )
    for slice_bytes in (1, 3_000):
        assert rows(split_loose(files, slice_bytes)) == whole


# -- the draw


def sources(folder: Path, seed: int = 0) -> list[Path]:
    """Two tars of one name and with the same members' names, a Parquet file, and loose files with sidecars; 40 images."""
    paths = []
    for place in ("a", "b"):
        members = []
        for n in range(10):
            data = picture(seed := seed + 1)
            members += [(f"{n}.png", data), (f"{n}.txt", b"caption")]
        paths.append(write_tar(folder / place / "p.tar", members))
    paths.append(write_parquet(folder / "q.parquet", [picture(seed := seed + 1) for _ in range(10)]))
    loose = [(f"{n}{kind}.png", picture(seed := seed + 1)) for n in range(5) for kind in ("", ".alt")]
    paths.append(write_folder(folder / "loose", loose + [(f"{n}.txt", b"caption") for n in range(7)]))
    return paths


@pytest.mark.parametrize("limit", [1, 10, 39])
def test_a_limit_takes_exactly_as_many(tmp_path: Path, store: Store, limit: int) -> None:
    outcome = ran(store, *sources(tmp_path), limit=limit)
    assert outcome.rows.taken == outcome.rows.kept == limit
    uris = column(store, outcome, "locations", "uri")
    captioned = sum(not uri.endswith(".parquet") for uri in uris)
    assert captioned == (len(column(store, outcome, "metadata", "caption")) if captioned else 0)


def test_a_limit_counts_nothing_that_is_known_to_be_no_image(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "pool"
    path = write_tar(folder / "a.tar", [(f"{n}.png", picture(n)) for n in range(5)])
    with tarfile.open(path, "a") as tar:
        for n in range(30):
            entry = tarfile.TarInfo(f"link{n}.png")
            entry.type, entry.linkname = tarfile.SYMTYPE, "0.png"
            tar.addfile(entry)
    with path.open("ab") as file:
        file.write(b"damage" * 1_000)
    write_folder(folder, [(f"{n}.png", picture(n)) for n in range(5, 10)])
    for n in range(30):
        (folder / f"lost{n}.png").symlink_to("nowhere")
    for limit in (1, 9):
        assert ran(store, folder, limit=limit).rows == Rows(limit, limit)
    assert ran(store, folder, limit=10).rows.dropped == {"not_a_file": 60, "unreadable_archive": 1}, (
        "all: nothing drawn"
    )


def test_a_limit_above_what_is_there_takes_everything(tmp_path: Path, store: Store) -> None:
    outcome = ran(store, *sources(tmp_path), limit=40)
    assert (outcome.rows.kept, outcome.rows.dropped) == (40, {"metadata_without_image": 2})


def test_a_larger_draw_holds_a_smaller_one_and_moved_data_gives_the_same(tmp_path: Path, store: Store) -> None:
    paths = sources(tmp_path / "here")
    ids = [set(column(store, ran(store, *paths, limit=n), "images", "image_id")) for n in (8, 16)]
    assert ids[0] < ids[1]
    moved = sources(tmp_path / "there")
    assert set(column(store, ran(store, *moved, limit=8), "images", "image_id")) == ids[0]
    both = [{uri.split("/")[-2] for uri in column(store, ran(store, *paths, limit=16), "locations", "uri")}]
    assert {"a", "b"} <= both[0], "tars of one name are drawn from on their own"


def test_what_is_said_of_an_image_does_not_depend_on_which_others_are_drawn(tmp_path: Path, store: Store) -> None:
    """Of many images of one name, in a folder and in a tar; a bad sidecar is told by the first that is drawn."""
    members = [(f"v{n % 3}.{n:02}.png", picture(n)) for n in range(30)]
    members += [("v0.txt", b"zero"), ("v1.txt", b"one"), ("v1.json", b"{"), ("v2.json", b"{")]
    folder, path = write_folder(tmp_path / "loose", members), write_tar(tmp_path / "a.tar", members)
    told = {id_of(picture(n)): ("zero", "one")[n % 3] for n in range(30) if n % 3 < 2}
    for source, limit in ((folder, 1), (folder, 29), (path, 4), (path, None)):
        outcome = ran(store, source, limit=limit)
        ids = column(store, outcome, "images", "image_id")
        assert len(ids) == (limit or 30)
        said = store.table(outcome.tables["metadata"], schema=records.METADATA).to_pylist()
        assert {row["image_id"]: row["caption"] for row in said} == {i: told[i] for i in ids if i in told}
        bad = {n % 3 for n in range(30) if id_of(picture(n)) in ids} & {1, 2}
        assert outcome.rows.dropped.get("bad_metadata", 0) == len(bad)


@pytest.mark.parametrize("limit", [None, 7])
def test_the_driver_lists_no_archive(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Workers list each file once, and read that list when they draw and when they cut."""
    paths = sources(tmp_path)[:3]
    called: list[str] = []
    for module, name in ((ingest, "members"), (draw, "members"), (draw, "members_of")):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    ran(store, *paths, limit=limit)
    assert not called
    assert len(store.names(f"parts/{draw.LISTING}")) == len(paths)
    ran(store, *paths, limit=limit)
    assert len(store.names(f"parts/{draw.LISTING}")) == len(paths), "read again, not listed again"


def test_keys_are_kept_in_the_order_of_the_files(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image in several files belongs to the first, however the files are grouped."""
    monkeypatch.setattr(ingest, "_KEYS_FILES", 2)
    paths = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.png", picture(n)), ("x.png", picture(99))]) for n in range(5)]
    paths.insert(2, write_tar(tmp_path / "empty.tar", []))
    outcome = ran(store, *paths, slice_mb=0.001, on_unreadable="count")
    assert column(store, outcome, "images", "image_id") == [id_of(picture(n)) for n in (0, 99, 1, 2, 3, 4)]
    assert [uri[-5] for uri in column(store, outcome, "locations", "uri")] == list("0011223344")


# -- nothing to read


@pytest.mark.parametrize("set_", ["pool", "flowers"])
@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([], "archives are empty"),
        ([("x.png", b"broken"), ("e.png", b"")], r"2 files .*empty 1, not_an_image 1, e\.g\. "),
    ],
)
def test_a_set_without_images_is_told(
    tmp_path: Path, store: Store, set_: str, members: list[tuple[str, bytes]], told: str
) -> None:
    with pytest.raises(LodesetError, match=f"`{set_}` has no readable image in the .*{told}"):
        ran(store, write_tar(tmp_path / "a.tar", members), set_=set_)


def test_one_hostile_file_stops_nothing(tmp_path: Path, store: Store) -> None:
    """Through the engine, beside a good image: what a store must hold and a digest must take."""
    parquet = write_parquet(tmp_path / "pool/a.parquet", [picture(9)])
    data = bytearray(parquet.read_bytes())
    data[4:60] = b"\xff" * 56
    parquet.write_bytes(data)
    files = [("good.png", picture(1)), ("caf\udce9.png", picture(2)), ("caf\udce9.json", b'{"caption": "\\ud800"}')]
    files += [("deep.png", picture(3)), ("deep.json", b'{"a":' * 900 + b"1" + b"}" * 900), ("x.tar", b"no tar")]
    write_folder(tmp_path / "pool", files)
    outcome = ran(store, tmp_path / "pool")
    assert outcome.rows.kept == 3
    assert outcome.rows.dropped == {"bad_metadata": 1, "unreadable_archive": 2}
    assert column(store, outcome, "metadata", "caption") == ["\\ud800"]
    assert str(tmp_path / "pool" / "caf\\xe9.png") in column(store, outcome, "locations", "uri")


def test_what_was_taken_with_reserve_is_told_of_each_image(tmp_path: Path, store: Store) -> None:
    whole, cut = picture(1), encoded(pixels(2), "JPEG")[:-2]
    twelve = encoded(Image.fromarray(np.maximum(pixels(3)[..., 0].astype(np.uint16), 200) * 16))
    path = write_tar(tmp_path / "a.tar", [("0.png", whole), ("1.jpg", cut), ("2.png", twelve)])
    outcome = ran(store, path)
    told = {
        i: (used, missing)
        for i, used, missing in zip(
            *(column(store, outcome, "images", name) for name in ("image_id", "sample_range", "truncated")), strict=True
        )
    }
    assert told == {
        id_of(whole): (None, None),
        id_of(cut): (None, 0.0),
        id_of(twelve): ("0 to 4095 (the image's own)", None),
    }
    warnings = " ".join(outcome.details["warnings"])
    assert (
        "1 image has more than 8 bits" in warnings
        and "1 image was kept although the end of the file is missing" in warnings
    )
    assert ran(Store(str(tmp_path / "b")), path, truncated="reject").rows.dropped == {"truncated": 1}
