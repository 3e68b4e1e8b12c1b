"""What the page of a commit offers: a patch that says what was asked for, the exact images, and a plan; it writes nothing."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from inspected_world import inspected

from lodeset.infra.config import read
from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.pages import commit
from lodeset.infra.dashboard.pages.commit import within
from lodeset.infra.dashboard.patches import edited
from lodeset.infra.dashboard.site import Site
from lodeset.pipeline.stages.dedup.what_if import difference

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data, Path]]:
    folder = tmp_path_factory.mktemp("inspected")
    made, found = inspected(folder)
    with opened(made.store, found) as data:
        app = create_app(Site(opened=made, token=TOKEN, port=80, data=data))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with TestClient(app, base_url="http://127.0.0.1", headers=headers) as client:
            yield client, data, folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("value", [1.5, 6.0])
def test_the_lists_hold_the_images_that_the_value_changes(shown: tuple[TestClient, Data, Path], value: float) -> None:
    client, data, _ = shown
    dedup = data.dedup
    assert dedup is not None
    changed = difference(
        dedup.images, data.joins("min_score"), dedup.setting("min_score"), value, dedup.spec.keeper
    ).to_pylist()
    expected = {
        "leave": {r["image_id"] for r in changed if r["kept_before"] and not r["kept_after"]},
        "back": {r["image_id"] for r in changed if not r["kept_before"] and r["kept_after"]},
    }
    assert any(expected.values())
    where = {"setting": "min_score", "value": value}
    page = unescape(client.get("/commit", params=where).text)
    for side, images in expected.items():
        answer = client.get(f"/commit/{side}.txt", params=where)
        assert (
            answer.headers["content-type"].startswith("text/plain")
            and "attachment" in answer.headers["content-disposition"]
        )
        assert sorted(answer.text.splitlines()) == sorted(images)
        section = re.search(rf'<section id="{side}">(.*?)</section>', page, re.DOTALL)
        assert section is not None and f"({len(images)})" in section[1]
        lefts = re.findall(r'<div class="two">\s*<figure[^>]*>\s*<a href="/image/([0-9a-f]{32})"', section[1])
        assert set(lefts) == images  # pictured, the image first


def test_galleries_have_pages(shown: tuple[TestClient, Data, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, _ = shown
    monkeypatch.setattr(commit, "SIDE", 4)
    whole = client.get("/commit/back.txt?setting=min_score&value=8.5").text.split()
    assert len(whole) > 8
    seen: list[str] = []
    path = "/commit?setting=min_score&value=8.5"
    while path:
        page = unescape(client.get(path).text)
        section = re.search(r'<section id="back">(.*?)</section>', page, re.DOTALL)[1]
        seen += re.findall(r'<div class="two">\s*<figure[^>]*>\s*<a href="/image/([0-9a-f]{32})"', section)
        after = re.search(r'rel="next" href="([^"]+)#back"', section)
        path = after[1] if after else ""
    assert seen == whole
    monkeypatch.setattr(commit, "JOINS", 3)
    page = client.get("/commit?setting=min_score&value=8.5").text
    assert "only the images nearest to the line are pictured" in page
    assert len(client.get("/commit/back.txt?setting=min_score&value=8.5").text.split()) == len(whole)


def test_the_patch_says_what_was_asked_for(shown: tuple[TestClient, Data, Path], tmp_path: Path) -> None:
    client, _, folder = shown
    before = files_in(folder)
    answer = client.get("/commit/configuration.patch?setting=min_score&value=5.2")
    assert answer.headers["content-type"].startswith("text/x-diff")
    assert answer.headers["content-disposition"] == 'attachment; filename="min_score-5.2.patch"'
    page = unescape(client.get("/commit?setting=min_score&value=5.2").text)
    assert "+  min_score: 5.2" in page and "+  min_score: 5.2" in answer.text
    assert f"patch {folder}/lodeset.yaml min_score-5.2.patch" in page
    for command in ("plan", "run"):
        assert f"lodeset {command} {folder}/lodeset.yaml" in page
    client.get("/commit/plan?setting=min_score&value=5.2")
    assert files_in(folder) == before  # neither the store nor the configuration was written


def test_what_cannot_be_patched_is_run_with_an_override(shown: tuple[TestClient, Data, Path]) -> None:
    client, _, folder = shown
    config = folder / "lodeset.yaml"
    text = config.read_text()
    try:
        config.write_text("x: &d {min_score: 4}\ndedup: *d\n")
        page = unescape(client.get("/commit?setting=min_score&value=5.2").text)
        assert "cannot be patched" in page
        assert f"lodeset run {config} --set dedup.min_score=5.2" in page
        assert client.get("/commit/configuration.patch?setting=min_score&value=5.2").status_code == 409
        config.write_text(edited(text, ("dedup", "min_score"), 5.2))
        assert read(config).dedup.min_score == 5.2
        assert "already" in client.get("/commit?setting=min_score&value=5.2").text
        assert client.get("/commit/configuration.patch?setting=min_score&value=5.2").status_code == 404
        config.unlink()
        assert "cannot be read" in client.get("/commit?setting=min_score&value=5.2").text
    finally:
        config.write_text(text)


def test_the_file_is_read_again_for_the_page(shown: tuple[TestClient, Data, Path]) -> None:
    client, _, folder = shown
    config = folder / "lodeset.yaml"
    text, where = config.read_text(), "/commit?setting=min_score&value=5.2"
    assert "differs now" not in client.get(where).text and "instead of 4:" in client.get(where).text
    try:
        config.write_text(edited(text, ("dedup", "min_score"), 4.6))
        page = client.get(where).text
        assert "differs now from the configuration that this run was made with" in page and "instead of 4.6:" in page
        assert "-  min_score: 4.6" in page
        config.write_text(text + "nonsense: 1\n")
        page = unescape(client.get(where + "&priced=true").text)
        assert "is no valid configuration now" in page and "cannot start before that is mended" in page
        assert "cannot be planned here: lodeset.yaml is no valid" in page
    finally:
        config.write_text(text)


def test_the_plan_is_that_of_the_value(shown: tuple[TestClient, Data, Path]) -> None:
    client, _, folder = shown
    page = client.get("/commit/plan?setting=min_score&value=5.2").text
    assert "dedup/pool" in page and "stages would run" in page
    assert page.strip() in client.get("/commit?setting=min_score&value=5.2&priced=true").text
    assert 'hx-trigger="load"' in client.get("/commit?setting=min_score&value=5.2").text
    shutil.move(folder / "pool.tar", folder / "away.tar")
    try:
        assert "cannot be planned here" in client.get("/commit/plan?setting=min_score&value=5.2").text
    finally:
        shutil.move(folder / "away.tar", folder / "pool.tar")


def test_planning_has_a_limit(shown: tuple[TestClient, Data, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, _ = shown
    ended = threading.Event()
    monkeypatch.setattr(commit, "PLAN_S", 0.2)
    monkeypatch.setattr(commit.api, "plan", lambda opened: ended.wait(30))
    assert "took longer than 0.2 s" in client.get("/commit/plan?setting=min_score&value=5.2").text
    ended.set()
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_wrong_values_are_refused(shown: tuple[TestClient, Data, Path]) -> None:
    client, _, _ = shown
    for path in ("/commit", "/commit/configuration.patch", "/commit/back.txt", "/commit/plan"):
        assert client.get(f"{path}?setting=min_score&value=-7").status_code == 400
        assert client.get(f"{path}?setting=store&value=1").status_code == 400
    assert client.get("/commit/other.txt?setting=min_score&value=5").status_code == 404
    assert "dedup.min_score" in client.get("/commit").text  # without a value: what can be committed
