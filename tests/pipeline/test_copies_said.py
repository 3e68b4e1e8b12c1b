"""What dropped copies said is told with the image that stands for them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.stages.copies import MOST, said_of_copies, stands_for
from lodeset.pipeline.stages.write_shards import _told
from lodeset.pipeline.tables import records


def said(source: str, **fields: Any) -> dict[str, Any]:
    return {**dict.fromkeys(records.METADATA.names), "source": source, **fields}


def test_copies_are_told_with_the_kept_image_and_nothing_twice() -> None:
    rows = {
        "a": [said("1", caption="own"), said("2", caption="elsewhere"), said("3", caption="own")],
        "b": [said("4", url="https://b"), said("5", url="https://b"), said("6", label="cat")],
        "c": [said("7", caption="of another group")],
    }
    found = said_of_copies(["a", "z"], {"a": ["b", "silent"]}, rows)
    assert [(row["image_id"], row["copy_id"], row["caption"], row["url"], row["label"]) for row in found] == [
        ("a", "a", "elsewhere", None, None),
        ("a", "b", None, "https://b", None),
        ("a", "b", None, None, "cat"),
    ]
    assert pa.Table.from_pylist(found, schema=records.COPIES).num_rows == 3


def test_only_copies_of_kept_images_have_somebody_who_stands_for_them(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s"))
    names = ("image_id", "kept", "reason", "matched_id")
    rows = [
        ("a", True, "unique", None),
        ("b", False, "near", "a"),
        ("c", False, "included", "i"),
        ("d", False, "reference", "r"),
    ]
    table = pa.Table.from_pylist(
        [{**dict.fromkeys(records.DUPLICATES.names), **dict(zip(names, row, strict=True))} for row in rows],
        schema=records.DUPLICATES,
    )
    part = store.commit_part("dedup", "d", {"duplicates": table})
    artifact = Artifact(
        "dedup", "pool", 1, "f", {}, {}, {"duplicates": (part.files["duplicates"],)}, Rows(4, 1, {"near": 3})
    )
    assert stands_for(store, artifact) == {"a": ["b"], "i": ["c"]}


def test_the_json_of_an_image_tells_what_its_copies_said() -> None:
    copies = said_of_copies(["a"], {"a": ["b"]}, {"b": [said("1", url="https://u:secret@b", extra='{"likes": 3}')]})
    tree = json.loads(_told({"image_id": "a"}, None, copies, []))
    (copy,) = tree["metadata_of_copies"]
    assert copy["image_id"] == "b" and copy["extra"] == {"likes": 3} and "secret" not in copy["url"]
    many = {f"{n:03d}": [said("1", caption=str(n))] for n in range(2 * MOST)}
    told = json.loads(_told({"image_id": "a"}, None, said_of_copies(["a"], {"a": list(many)}, many), []))
    assert len(told["metadata_of_copies"]) == MOST
    assert "metadata_of_copies" not in json.loads(_told({"image_id": "a"}, said("1", caption="x"), (), []))
