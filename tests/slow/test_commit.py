"""What the dashboard pictured is what the next run does: a value is tried, its patch downloaded, applied, and run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from commands import by_image, entries, lodeset, rows
from fastapi.testclient import TestClient

from lodeset.infra.config import read
from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import opened
from lodeset.infra.dashboard.making import inspect
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import open_store

pytestmark = pytest.mark.slow  # whole runs

TOKEN = "a-token-of-the-tests"


def kept(config: Path) -> dict[str, bool]:
    return {image_id: row["kept"] for image_id, row in by_image(entries(config)["dedup/pool"], "duplicates").items()}


def committed(config: Path, values: Sequence[float], side: str) -> tuple[float, dict[str, set[str]]]:
    """Puts the first of the values that moves an image to that side into the configuration, as the pages say; returns what they list."""
    made = open_store(config)
    with (
        opened(made.store, inspect(made, lambda event: None)) as data,
        TestClient(
            create_app(Site(opened=made, token=TOKEN, port=80, data=data)),
            base_url="http://127.0.0.1",
            headers={"Authorization": f"Bearer {TOKEN}"},
        ) as client,
    ):
        for value in values:
            where: dict[str, Any] = {"setting": "min_score", "value": value}
            lists = {one: set(client.get(f"/commit/{one}.txt", params=where).text.split()) for one in ("leave", "back")}
            if lists[side]:
                break
        page = unescape(client.get("/commit", params=where).text)
        for one, images in lists.items():
            section = re.search(rf'<section id="{one}">(.*?)</section>', page, re.DOTALL)
            assert section is not None
            assert (
                set(re.findall(r'<div class="two">\s*<figure[^>]*>\s*<a href="/image/([0-9a-f]{32})"', section[1]))
                == images
            )
        slider = client.get("/duplicates/line", params=where).text
        assert f"Would leave ({len(lists['leave'])})" in slider and f"Would come back ({len(lists['back'])})" in slider
        priced = client.get("/commit/plan", params=where).text
        assert "min_score" in priced and "ingest/pool" not in priced  # only what comes after dedup
        downloaded = config.with_suffix(".patch")
        downloaded.write_bytes(client.get("/commit/configuration.patch", params=where).content)
    subprocess.run(["patch", str(config), str(downloaded)], check=True, capture_output=True, timeout=20)
    downloaded.unlink()
    return value, lists


def test_the_images_that_left_and_came_back_are_those_of_the_page(copy: Path) -> None:
    """First with a stricter value, which frees images, and then with a looser one, which drops some."""
    for side, values in (("back", (6, 8, 11, 14, 16)), ("leave", (3, 2, 1, 0.5, 0))):
        before = kept(copy)
        value, lists = committed(copy, values, side)
        assert lists[side], f"no value of {values} moves an image"
        assert read(copy).dedup.min_score == value
        lodeset("run", copy)
        after = kept(copy)
        assert before.keys() == after.keys()
        assert {i for i in before if before[i] and not after[i]} == lists["leave"]
        assert {i for i in before if not before[i] and after[i]} == lists["back"]
        told = entries(copy)
        shards = {row["image_id"] for row in rows(told["write_shards/all"], "index")}
        assert not shards & {i for i, stays in after.items() if not stays}
