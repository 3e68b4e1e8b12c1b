"""The gallery shows what its address says, and every count on it is that of the table."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_client import browsing, shown
from fastapi.testclient import TestClient
from inspected_world import HOSTILE

from lodeset.infra.dashboard.data import Data
from lodeset.infra.session import open_store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data]]:
    with shown(tmp_path_factory.mktemp("inspected")) as made:
        yield made


def ids_on(text: str) -> list[str]:
    return re.findall(r'data-title="([0-9a-f]{32})"', text)


def test_pages_lead_from_one_to_the_next_and_anywhere(world: tuple[TestClient, Data]) -> None:
    client, data = world
    expected = [r["image_id"] for r in data.rows("SELECT * FROM inspected WHERE set = 'pool' ORDER BY image_id")]
    found, path = [], "/images?set=pool"
    while path:
        text = client.get(path).text
        found += ids_on(text)
        after = re.search(r'rel="next" href="([^"]+)"', text)
        path = html.unescape(after.group(1)) if after else ""
    assert found == expected
    assert ids_on(client.get("/images?set=pool&page=3").text) == expected[120:180]
    assert expected[200] in ids_on(client.get("/images?set=pool&position=201").text)
    beyond = client.get("/images?set=pool&page=999").text
    assert "There is no page 999" in beyond and not ids_on(beyond)


def test_filters_count_what_they_lead_to(world: tuple[TestClient, Data]) -> None:
    client, data = world
    text = client.get("/images").text
    links = re.findall(r'<li><a href="([^"]+)"><span>([^<]+)</span><b>([\d,]+)</b>', text)
    counts = Counter(r["outcome"] for r in data.rows("SELECT outcome FROM inspected"))
    assert {(name.replace(" ", "_"), int(n)) for href, name, n in links if "outcome=" in href} == set(counts.items())
    for href, _, count in links:
        there = client.get(html.unescape(href)).text
        assert f"<p>{count} meet every condition</p>" in there
    both = client.get("/images?outcome=near&outcome=in_shard&label=class-1").text
    assert 'aria-label="Remove the condition Label class-1"' in both
    (without,) = re.findall(r'href="([^"]+)" aria-label="Remove the condition Label class-1"', both)
    assert html.unescape(without) == "/images?outcome=in_shard&outcome=near"


def test_order_text_and_hostile_names(world: tuple[TestClient, Data]) -> None:
    client, data = world
    sharpest = data.rows("SELECT image_id FROM inspected ORDER BY sharpness DESC, image_id LIMIT 60")
    assert ids_on(client.get("/images?order=sharpest").text) == [r["image_id"] for r in sharpest]
    hostile = data.rows("SELECT image_id FROM inspected WHERE member = ? ORDER BY image_id, set", [HOSTILE])
    answer = client.get("/images", params={"text": HOSTILE[:12]})
    assert ids_on(answer.text) == [row["image_id"] for row in hostile]
    assert "<img src=x" not in answer.text and html.escape(HOSTILE[:12]) in answer.text.replace("&#34;", "&quot;")
    assert "No image meets all of these" in client.get("/images?text=nothing-like-this").text
    assert client.get("/images?order=wrong").status_code == 400
    assert client.get("/images?page=0").status_code == 422


def test_before_a_run_there_is_a_command(tmp_path: Path) -> None:
    config = tmp_path / "zoo.yaml"
    config.write_text("name: zoo\nstore: ./store\npool: [images/]\n")
    with browsing(open_store(config)) as client:
        for path in ("/images", "/map"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "No run has finished yet" in answer.text and "lodeset run" in answer.text
