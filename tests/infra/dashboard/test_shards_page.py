"""The pages about shards go by the index, and read one member at a time."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_client import browsing
from fastapi.testclient import TestClient
from inspected_world import inspected

from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.pages import shards
from lodeset.infra.session import Opened
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.tar_writing import add_member

HOSTILE = {"image_id": "x", "caption": "</pre><script>alert(1)</script>"}


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as sink:
        for name, data in members.items():
            add_member(sink, name, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Opened, Data, TestClient]]:
    open_, made = inspected(tmp_path_factory.mktemp("shards"))
    with opened(open_.store, made) as data, browsing(open_, data) as client:
        yield open_, data, client


def test_shards_are_those_of_the_index(world: tuple[Opened, Data, TestClient]) -> None:
    _, data, client = world
    rows = [row for row in data.rows("SELECT * FROM inspected") if row["shard"]]
    page = client.get("/shards").text
    for name, images in Counter(row["shard"] for row in rows).items():
        assert re.search(rf'shard={name}">{name}</a></th><td class="n">{images}<', page)
    for label, images in Counter(row["label"] for row in rows).most_common(3):
        assert re.search(rf'<bdi>{label}</bdi></th><td class="n">{images}<', page)


def test_members_come_in_the_order_in_which_they_lie(world: tuple[Opened, Data, TestClient]) -> None:
    _, data, client = world
    rows = sorted((r["shard_offset"], r["image_id"]) for r in data.rows("SELECT * FROM inspected") if r["shard"])
    page = client.get("/shards/members?shard=shard-000000.tar").text
    assert re.findall(r'data-title="([0-9a-f]{32})"', page) == [image_id for _, image_id in rows[: shards.MEMBERS]]
    assert [int(n.replace(",", "")) for n in re.findall(r"<span>at ([\d,]+)</span>", page)] == [
        offset for offset, _ in rows[: shards.MEMBERS]
    ]
    rest = client.get(f"/shards/members?shard=shard-000000.tar&start={shards.MEMBERS}").text
    assert re.findall(r'data-title="([0-9a-f]{32})"', rest) == [
        image_id for _, image_id in rows[shards.MEMBERS : 2 * shards.MEMBERS]
    ]
    assert client.get("/shards/members?shard=../../etc/passwd").status_code == 404


def test_the_json_behind_an_image_is_read_and_stays_text(world: tuple[Opened, Data, TestClient]) -> None:
    open_, data, client = world
    (first,) = data.rows("SELECT * FROM inspected WHERE shard IS NOT NULL ORDER BY shard_offset LIMIT 1")
    assert client.get(f"/shards/json/{first['image_id']}").status_code == 400  # the file is not there
    written = data.artifact("write_shards/all")
    assert written is not None
    path = Path(open_.store.path(f"{written.details['folder']}/{first['shard']}"))
    path.parent.mkdir(parents=True)
    path.write_bytes(tar({"a.jpg": b"x" * first["shard_bytes"], "a.json": json.dumps(HOSTILE).encode()}))
    page = client.get(f"/shards/json/{first['image_id']}").text
    assert "&lt;/pre&gt;&lt;script&gt;" in page and "<script>alert" not in page
    (outside,) = data.rows("SELECT * FROM inspected WHERE outcome = 'near' LIMIT 1")
    assert client.get(f"/shards/json/{outside['image_id']}").status_code == 404


def test_only_json_of_a_limited_size_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def written(name: str, data: bytes) -> str:
        (tmp_path / "one.tar").write_bytes(tar({"a.jpg": b"x" * 700, name: data}))
        return "one.tar"

    assert shards.read_json(store, written("a.json", b'{"b": 1}'), 512, 700) == {"b": 1}
    for name, data, told in (
        ("a.txt", b"{}", "is no JSON"),
        ("a.json", b" " * (shards.JSON_BYTES + 1), "is no JSON"),
        ("a.json", b"{", "cannot be read as JSON"),
        ("a.json", b"[" * 100_000, "cannot be read as JSON"),
    ):
        with pytest.raises(LodesetError, match=told):
            shards.read_json(store, written(name, data), 512, 700)
    with pytest.raises(LodesetError, match="has no member at byte"):
        shards.read_json(store, written("a.json", b"{}"), 512, 50_000)
    with pytest.raises(LodesetError, match="is not in the store"):
        shards.read_json(store, "two.tar", 512, 700)
