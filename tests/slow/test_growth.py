"""A pool that grows, shards that are compacted, images that are taken down: through the command line, on a small sample world."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import webdataset
import yaml
from builders import encoded, picture, write_tar
from commands import assert_digests_hold, by_image, copied, entries, indexed, lodeset, rows
from inline import in_one_process
from PIL import Image

pytestmark = [
    pytest.mark.slow,  # whole runs
    # Webdataset leaves the shards that it read open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def read_shards(entry: dict[str, Any]) -> dict[str, bytes]:
    """What plain webdataset reads from the shards, by image_id."""
    samples = webdataset.WebDataset(entry["tables"]["shards"], shardshuffle=False)
    return {s["__key__"]: next(v for k, v in s.items() if k not in ("__key__", "__url__", "json")) for s in samples}


@pytest.fixture(scope="module")
def grown(world: Path, finished: dict[str, dict[str, Any]]) -> Iterator[Path]:
    """A configuration after another run over the pool with one more tar, to look at.

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
    # Grain, since an image that was merely enlarged is never kept for its size.
    enlarged = np.asarray(near.resize((2 * near.width, 2 * near.height)), np.float32)
    grain = np.random.default_rng(0).normal(0, 8, enlarged.shape)
    larger = encoded(Image.fromarray((enlarged + grain).clip(0, 255).astype(np.uint8)))
    new = world / "pool/a-new.tar"
    write_tar(
        new,
        [*((f"{i}.png", picture(1_000 + i)) for i in range(7)), ("again.bin", again), ("larger.png", larger)],
    )
    # Everything that is kept goes in, so that what is new does.
    config = copied(world / "lodeset.yaml", "grown")
    tree = yaml.safe_load(config.read_text())
    tree["curated"].append({"name": "anything", "uri": str(new), "retrieve": {"mode": "sample", "k": 1}})
    config.write_text(yaml.safe_dump(tree))
    try:
        with in_one_process():
            lodeset("run", config)
        yield config
    finally:
        new.unlink()
        shutil.rmtree(world / "grown")


@pytest.fixture
def copy_of_grown(grown: Path, one_process: None) -> Iterator[Path]:
    """The same, to change."""
    yield copied(grown, "copy-of-grown")
    shutil.rmtree(grown.parent / "copy-of-grown")


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
    assert "since the previous run: " in lodeset("status", grown)[0]
    assert shards["details"]["written_bytes"] < 0.2 * shards["details"]["size_bytes"]
    assert {Path(p).name for p in earlier["tables"]["shards"]} <= {Path(p).name for p in shards["tables"]["shards"]}
    assert set(indexed(shards)) == {row["image_id"] for row in rows(after["retrieve/all"], "selected")}
    told = {row["image_id"]: row["change"] for row in rows(shards, "changes")}
    now, then = ({row["image_id"] for row in rows(entry, "index")} for entry in (shards, earlier))
    assert told == {**dict.fromkeys(now - then, "added"), **dict.fromkeys(then - now, "removed")}
    assert set(by_image(shards, "tombstones")) == set(read_shards(shards)) - now

    # From scratch, the same images are copies of the same; only who is kept of them may differ.
    scratch = tmp_path / "scratch.yaml"
    scratch.write_text(grown.read_text().replace("./grown", str(tmp_path / "runs")))
    shutil.copy(scratch, world / "scratch.yaml")
    try:
        with in_one_process():
            lodeset("run", world / "scratch.yaml", "--until", "dedup")
        anew = by_image(entries(world / "scratch.yaml")["dedup/pool"], "duplicates")
    finally:
        (world / "scratch.yaml").unlink()
    assert {i: row["group_id"] for i, row in anew.items()} == {i: row["group_id"] for i, row in duplicates.items()}
    differ = {i for i, row in anew.items() if row["kept"] != duplicates[i]["kept"]}
    assert len({anew[i]["group_id"] for i in differ}) == 1


def test_compaction_leaves_what_is_selected_in_shards_of_its_own(copy_of_grown: Path) -> None:
    before = entries(copy_of_grown)["write_shards/all"]
    done = json.loads(lodeset("compact", copy_of_grown, "--json")[0])
    after = entries(copy_of_grown)["write_shards/all"]
    assert set(indexed(after)) == set(read_shards(after)) == set(indexed(before)) == set(by_image(before, "index"))
    assert done["superseded_bytes"] > 0 and not done["deleted"] and after["details"]["dead_bytes"] == 0
    deleted = json.loads(lodeset("compact", copy_of_grown, "--delete", "--json")[0])
    assert deleted["images"] == len(indexed(after)) and deleted["superseded_bytes"] == done["superseded_bytes"]
    listed = {Path(file) for file in after["tables"]["shards"]}
    kept = set((copy_of_grown.parent / "copy-of-grown/shards").glob("*/*.tar"))
    # Of the run before the set was added, whose artifact is of other sets, the shards stay.
    assert listed <= kept and len(kept) < len(listed) + before["details"]["shards"]
    assert "nothing to do" in lodeset("plan", copy_of_grown)[0]


def test_what_is_forgotten_is_gone_and_stays_away(copy_of_grown: Path) -> None:
    before = entries(copy_of_grown)
    held = indexed(before["write_shards/all"])
    places = {row["image_id"]: row["uri"] for row in rows(before["ingest/pool"], "locations")}
    image_id = min(held.keys() & places.keys())
    others = {i: data for i, data in held.items() if i != image_id}
    done = json.loads(lodeset("forget", copy_of_grown, image_id, "--json")[0])
    assert done["image_ids"] == [image_id] and done["shards"] >= 1 and done["rows"]["images"] >= 1
    after = entries(copy_of_grown)
    for entry in after.values():
        for files in entry["tables"].values():
            for file in files:
                if file.endswith(".parquet"):
                    table = ds.dataset(file).to_table()
                    assert not any(image_id in str(table[c].unique()) for c in table.column_names if "id" in c), file
    assert indexed(after["write_shards/all"]) == others
    store = copy_of_grown.parent / "copy-of-grown"
    assert not any(image_id.encode() in path.read_bytes() for path in store.glob("shards/*/*.tar") if path.is_file())
    assert_digests_hold(after, store)
    assert "nothing to do" in lodeset("plan", copy_of_grown)[0]
    assert "neither an image_id" in lodeset("forget", copy_of_grown, "https://nowhere.org/x", code=1)[1]
    # The source still has it, and is read again because it seems to have changed.
    source = Path(places[image_id])
    times = source.stat()
    os.utime(source)
    try:
        lodeset("run", copy_of_grown)
        again = entries(copy_of_grown)
        left = set(indexed(again["write_shards/all"]))
        lodeset("compact", copy_of_grown, "--delete")
        compacted = entries(copy_of_grown)["write_shards/all"]
    finally:
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert again["ingest/pool"]["rows"]["dropped"]["forgotten"] >= 1
    assert again["embed/pool"]["details"]["images_embedded"] == 0
    assert image_id not in left
    assert set(indexed(compacted)) == set(read_shards(compacted)) == left
