"""Which images of a target set are gallery and test, and of which class, by what sources say and by folders."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from inline import artifact

from lodeset.pipeline.dag.stage import Outcome
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables import records
from lodeset.training.labelled import Target, read_target, unknown_classes


def ingested(store: Store, images: list[tuple[str, str, dict[str, str]]]) -> Artifact:
    """A set of images (uri, member, what is said)."""
    places, told = [], []
    for n, (uri, member, said) in enumerate(images):
        place = {"set": "t", "uri": uri, "member": member, "offset": n, "image_id": f"{n:032x}", "size_bytes": 1}
        places.append(place)
        label = said.get("label")
        extra = json.dumps({name: value for name, value in said.items() if name != "label"})
        if said:
            told.append({"image_id": f"{n:032x}", "source": uri, "label": label, "extra": extra})
    tables = {
        "locations": pa.Table.from_pylist(places, records.LOCATIONS),
        "metadata": pa.Table.from_pylist(told, records.METADATA),
    }
    files = store.commit_part("ingest", "t", tables).files
    return artifact("ingest", "t", Outcome({n: (f,) for n, f in files.items()}, Rows(len(images), len(images))))


def read(
    folder: Path, images: list[tuple[str, str, dict[str, str]]], label: str = "label", split: str = "split"
) -> tuple[Target, dict[str, int]]:
    store = Store(str(folder))
    return read_target(store, ingested(store, images), "t", label, split)


def said(*splits: str | None, label: str | None = "a") -> list[tuple[str, str, dict[str, str]]]:
    told = ({"label": label, "split": split} for split in splits)
    return [(f"/data/{n}.jpg", "", {k: v for k, v in one.items() if v is not None}) for n, one in enumerate(told)]


@pytest.mark.parametrize(
    ("gallery", "test"),
    [
        ("gallery", "test"),
        ("train", "validation"),
        ("Train", "VAL"),
        ("training", "test"),
        ("gallery", "query"),
        ("train ", "valid"),
    ],
)
def test_splits_are_understood_however_they_are_called(tmp_path: Path, gallery: str, test: str) -> None:
    target, left_out = read(tmp_path, said(gallery, test, gallery, None, "other"))
    assert target.splits == ("gallery", "test", "gallery") and left_out == {"other_split": 2}
    names = {"gallery": gallery, "test": test}
    assert target.understood == {needed: name for needed, name in names.items() if name != needed}


def test_of_several_names_the_first_counts(tmp_path: Path) -> None:
    target, left_out = read(tmp_path, said("train", "validation", "test", "train"))
    assert target.splits == ("gallery", "test", "gallery") and left_out == {"other_split": 1}
    assert target.ids[1] == f"{2:032x}"
    target, left_out = read(tmp_path / "more", said("gallery", "train", "test"))
    assert target.splits == ("gallery", "test") and left_out == {"other_split": 1}


def test_names_count_only_where_images_have_labels(tmp_path: Path) -> None:
    """As of a set whose published test images have no labels."""
    images = [*said("train", "validation"), ("/data/x.jpg", "", {"split": "test"})]
    target, left_out = read(tmp_path, images)
    assert target.splits == ("gallery", "test") and left_out == {"other_split": 1}


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        (
            ("fold1", "fold2"),
            r"no labeled image has split = 'gallery' or 'train' or 'training' \(split: 1 x 'fold1', 1 x 'fold2'\)",
        ),
        (("train", "train"), r"has split = 'test' or 'validation'.*\(split: 2 x 'train'\)"),
        ((None, None), r"\(split: 2 x None\)"),
    ],
)
def test_splits_that_say_nothing_are_refused(tmp_path: Path, splits: tuple[str, str], told: str) -> None:
    with pytest.raises(LodesetError, match=told):
        read(tmp_path, said(*splits))


def test_of_several_places_of_an_image_the_first_that_says_it_counts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = ingested(store, said("train", "test"))
    more = [
        {"image_id": f"{n:032x}", "source": "elsewhere", "label": label, "extra": extra}
        for n, label, extra in ((0, "late", '{"split": "test"}'), (1, None, None), (2, "c", None))
    ]
    table = store.table(made.tables["metadata"])
    nothing = [{"image_id": f"{n:032x}", "source": "before", "caption": "x"} for n in range(2)]
    tables = [pa.Table.from_pylist(rows, table.schema) for rows in (nothing, more)]
    part = store.commit_part("ingest", "more", {"metadata": pa.concat_tables([tables[0], table, tables[1]])})
    both = replace(made, tables={**made.tables, "metadata": (part.files["metadata"],)})
    target, _ = read_target(store, both, "t", "label", "split")
    assert target.labels == ("a", "a") and target.splits == ("gallery", "test")


def test_labels_that_nobody_has_are_refused_with_the_fields_there_are(tmp_path: Path) -> None:
    images = [(f"/data/{s}/{c}/1.jpg", "", {"split": s, "species": c}) for s in ("train", "test") for c in "ab"]
    with pytest.raises(LodesetError, match=r"none of its 4 images has kind: .*\(existing fields: split, species\)"):
        read(tmp_path, images, label="kind")
    target, _ = read(tmp_path / "right", images, label="species")
    assert target.labels == ("a", "b", "a", "b")
    with pytest.raises(LodesetError, match="none of its 1 images has label"):
        read(tmp_path / "flat", [("/data/1.jpg", "", {})])


FOLDERS = {
    "split/class": [
        f"/data/x/{split}/{cls}/{n}.jpg" for split in ("train", "val") for cls in ("cat", "dog") for n in range(2)
    ],
    "class/split": [
        f"/data/x/{cls}/{split}/{n}.jpg" for split in ("Train", "Test") for cls in ("cat", "dog") for n in range(2)
    ],
    "deeper": [
        f"/data/{split}/{cls}/sub/{n}.jpg" for split in ("gallery", "query") for cls in ("cat", "dog") for n in range(2)
    ],
    "archives": [
        f"/data/{split}.tar|{cls}/{n}.jpg" for split in ("train", "test") for cls in ("cat", "dog") for n in range(2)
    ],
    "in an archive": [
        f"/d.tar|set/{split}/{cls}/{n}.jpg" for split in ("train", "test") for cls in ("cat", "dog") for n in range(2)
    ],
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_folders_are_splits_and_classes(tmp_path: Path, layout: str) -> None:
    target, left_out = read(tmp_path, [(*path.partition("|")[::2], {}) for path in FOLDERS[layout]])
    assert target.labels == ("cat", "cat", "dog", "dog") * 2 and not left_out
    assert target.splits == ("gallery",) * 4 + ("test",) * 4


def test_folders_of_classes_alone_are_split_by_id(tmp_path: Path) -> None:
    sizes = {"cat": 23, "dog": 10, "valid": 5, "rare": 2, "single": 1}
    images = [(f"/data/{cls}/{n}.jpg", "", {}) for cls, count in sizes.items() for n in range(count)]
    target, left_out = read(tmp_path, [*images, ("/data/readme.png", "", {})])
    assert left_out == {"no_label": 1}
    assert Counter(target.labels) == sizes
    pairs = zip(target.labels, target.splits, strict=True)
    tests = Counter(label for label, split in pairs if split == "test")
    assert tests == {"cat": 4, "dog": 2, "valid": 1, "rare": 1}
    assert target.understood == {"label": "by folder", "split": "drawn: every 5th image of a class is test"}
    assert read(tmp_path / "again", [*images, ("/data/readme.png", "", {})])[0].splits == target.splits


@pytest.mark.parametrize(
    "places",
    [
        ["/d/shard-000.tar|1.jpg", "/d/shard-001.tar|2.jpg"],
        ["/d/train.parquet|image/0", "/d/test.parquet|image/0"],
        ["/d/train.tar|imgs/1.jpg", "/d/val.tar|imgs/2.jpg"],
        ["/d/train/imgs/1.jpg", "/d/val/imgs/2.jpg"],
    ],
)
def test_files_and_one_folder_are_no_classes(tmp_path: Path, places: list[str]) -> None:
    images = [(*path.partition("|")[::2], {}) for path in places]
    with pytest.raises(LodesetError, match=rf"none of its {len(images)} images has label"):
        read(tmp_path, images)


def test_what_a_source_says_counts_more_than_folders(tmp_path: Path) -> None:
    images = [
        (f"/data/train/{c}/{s}.jpg", "", {"label": c.upper(), "split": s}) for c in "ab" for s in ("train", "test")
    ]
    target, _ = read(tmp_path, images)
    assert target.labels == ("A", "A", "B", "B") and target.splits == ("gallery", "test") * 2
    folders = [(uri, member, {"split": one["split"]}) for uri, member, one in images]
    target, _ = read(tmp_path / "labels by folder", folders)
    assert target.labels == ("a", "a", "b", "b") and target.splits == ("gallery", "test") * 2


@pytest.mark.parametrize("labels", [("3", "3.0"), ("3.0", "3"), (" 3", "3.00")])
def test_a_class_is_one_whatever_its_number_was_kept_as(tmp_path: Path, labels: tuple[str, str]) -> None:
    target, _ = read(tmp_path, said("gallery", label=labels[0]) + said("test", label=labels[1]))
    assert target.labels == ("3", "3") and unknown_classes(target) is None
    custom = [
        (f"/{n}.jpg", "", {"kind": kind, "split": split})
        for n, (kind, split) in enumerate(zip(labels, ("gallery", "test"), strict=True))
    ]
    assert read(tmp_path / "other", custom, label="kind")[0].labels == ("3", "3")


def test_test_classes_that_the_gallery_lacks_are_told(tmp_path: Path) -> None:
    images = said("gallery", "gallery", label="cat") + said("test", "test", label="7") + said("test", label="cat")
    told = unknown_classes(read(tmp_path, images)[0])
    assert told is not None and "2 of 3 test images" in told and "'7' (2)" in told and "gallery has 'cat'" in told
