"""Pages about near-duplicates say what dedup stored, and what its own rules make of another value."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from inspected_world import inspected
from PIL import Image

from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.groups import CERTAINTY, Link, chain, groups
from lodeset.infra.dashboard.lines import line
from lodeset.infra.dashboard.overlays import _placed, difference, map_of
from lodeset.infra.dashboard.site import Site
from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.stages.dedup.what_if import Setting, counts

TOKEN = "a-token-of-the-tests"
ID = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data, Path]]:
    folder = tmp_path_factory.mktemp("inspected")
    made, found = inspected(folder)
    with opened(made.store, found) as data:
        app = create_app(Site(opened=made, token=TOKEN, port=80, data=data, base_path="/x"))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with TestClient(app, base_url="http://127.0.0.1/x", headers=headers) as client:
            yield client, data, folder


def linked_rows(data: Data) -> list[dict]:
    ids = data.dedup.images.ids
    rows = data.pairs.to_pylist()
    return [{**r, "a": ids[r["a"]], "b": ids[r["b"]]} for r in rows]


def tile(page: str, label: str) -> int:
    found = re.search(rf"<b>([\d,]+)</b><span>{label}", page)
    assert found, label
    return int(found[1].replace(",", ""))


def test_the_slider_tells_what_a_value_drops(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, _ = shown
    dedup = data.dedup
    assert dedup is not None
    setting, joins = dedup.setting("min_score"), data.joins("min_score")
    for value in (setting.low, 2.5, setting.now, 6.0, setting.high):
        page = client.get("/duplicates/line", params={"setting": "min_score", "value": value})
        told = counts(joins, setting, value, dedup.spec, dedup.pool)
        assert (tile(page.text, "images dropped"), tile(page.text, "of them leaks")) == (told.dropped, told.leaked)
        assert (tile(page.text, "groups of copies"), tile(page.text, "images in the largest")) == (
            told.groups,
            told.largest,
        )
        assert page.headers["hx-replace-url"] == f"/x/duplicates?setting=min_score&value={value}"
        whole = client.get("/duplicates", params={"setting": "min_score", "value": value}).text
        assert page.text.strip() in whole  # the same without scripts
    assert "the value of the run" in client.get("/duplicates").text


def test_pairs_nearest_to_the_line_are_those_on_either_side_of_it(shown: tuple[TestClient, Data, Path]) -> None:
    _, data, _ = shown
    found = line(data, "min_score")
    assert found is not None
    limits = {(r["a"], r["b"]): r["min_score_limit"] for r in linked_rows(data) if r["min_score_limit"] is not None}
    finite = sorted((v, k) for k, v in limits.items() if np.isfinite(v))
    for value in (1.0, 4.0, 9.0):
        linked, apart = found.nearest(value, 5)
        assert [p.limit for p in linked] == [v for v, _ in finite if v >= np.float32(value)][:5]
        assert [p.limit for p in apart] == [v for v, _ in finite if v < np.float32(value)][::-1][:5]
        assert all(limits[p.a, p.b] == p.limit for p in (*linked, *apart))
        assert found.moved(value) == sum(min(value, 4) <= v < max(value, 4) for v, _ in finite)
    inside = [v for v, _ in finite if found.setting.low <= v <= found.setting.high]
    assert sum(bar.count for bar in found.bars()) == len(inside)
    assert found.always() == sum(np.isposinf(v) for v in limits.values())


def test_a_value_that_would_stop_a_run_says_so(
    shown: tuple[TestClient, Data, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, data, _ = shown
    narrow = dataclasses.replace(data.dedup.spec, max_group=3)
    found = dataclasses.replace(line(data, "min_score"), dedup=dataclasses.replace(data.dedup, spec=narrow))
    monkeypatch.setattr("lodeset.infra.dashboard.pages.duplicates.line", lambda *_: found)
    assert "A run with this value would stop" in client.get("/duplicates/line?value=0").text
    assert "would stop" not in client.get(f"/duplicates/line?value={found.setting.high}").text


def test_wrong_values_are_refused_with_what_is_allowed(shown: tuple[TestClient, Data, Path]) -> None:
    client, _, _ = shown
    assert "from 0 to" in client.get("/duplicates?value=-3").text
    assert "what does: min_score" in client.get("/duplicates?setting=threshold").text
    assert client.get("/duplicates?value=nan").status_code == 422
    assert client.get("/duplicates/groups?order=x").status_code == 422
    assert client.get("/duplicates/pair?a=x&b=y").status_code == 422
    assert client.get(f"/duplicates/pair?a={'0' * 32}&b={'1' * 32}").status_code == 404
    assert client.get(f"/duplicates/group?of={'0' * 32}").status_code == 404


def test_groups_are_the_components_of_the_linked_pairs(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, _ = shown
    found = groups(data)
    assert found is not None
    pool = {r["image_id"]: r for r in data.rows("SELECT * FROM inspected WHERE set = 'pool' AND group_id IS NOT NULL")}
    expected: dict[str, set[str]] = {}
    for image_id, row in pool.items():
        expected.setdefault(row["group_id"], set()).add(image_id)
    told = {found.ids[n]: set(found.of(n)) & set(pool) for n in found.number.tolist()}
    assert told == expected
    sizes = [len(expected[found.ids[found.number[row]]]) for row in found.ordered("size")]
    assert sizes == sorted(sizes, reverse=True)
    # A group holds together exactly up to its weakest link.
    links = [r for r in linked_rows(data) if r["linked"]]
    number = {image_id: n for n, image_id in enumerate(found.ids)}
    for row, n in enumerate(found.number.tolist()):
        limit = float(found.weakest[row])
        inside = [r for r in links if found.group[number[r["a"]]] == n]

        def parts(above: float, inside: list[dict] = inside) -> int:
            kept = [r for r in inside if r["min_score_limit"] >= above]
            label = components(len(found.ids), *(np.array([number[r[c]] for r in kept], int) for c in ("a", "b")))
            return len({label[number[r[c]]] for r in inside for c in ("a", "b")})

        assert parts(limit) == 1
        assert np.isinf(limit) or parts(np.nextafter(np.float32(limit), np.float32(np.inf))) > 1
        assert {(one.a, one.b) for one in found.links(n)} == {(r["a"], r["b"]) for r in inside}
    seen: list[str] = []
    path = f"/duplicates/groups?order={CERTAINTY}"
    while path:
        page = unescape(client.get(path).text)
        seen += re.findall(r'aria-label="Group ([0-9a-f]{8})"', page)
        after = re.search(r'rel="next" href="/x([^"]+)"', page)
        path = after[1] if after else ""
    assert seen == [found.ids[found.number[row]][:8] for row in found.ordered(CERTAINTY)]


def test_a_group_tells_direct_links_from_those_through_others(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, _ = shown
    links = {frozenset((r["a"], r["b"])) for r in linked_rows(data) if r["linked"]}
    copies = data.rows("SELECT * FROM inspected WHERE outcome = 'near' AND group_id IS NOT NULL")
    ways = {frozenset((r["image_id"], r["matched_id"])) in links for r in copies}
    assert ways == {True, False}
    for row in copies:
        page = unescape(client.get("/duplicates/group", params={"of": row["image_id"]}).text)
        how = re.search(
            rf'<p class="small how">([^<]*)(?:<span[^<]*</span>)? · <a href="[^"]*b={row["image_id"]}"', page
        )
        assert how is not None
        direct = frozenset((row["image_id"], row["matched_id"])) in links
        assert how[1].strip() == ("direct" if direct else "through others")
        pair = unescape(client.get("/duplicates/pair", params={"a": row["image_id"], "b": row["matched_id"]}).text)
        assert ("How they are linked" in pair) != direct


def test_a_group_names_the_reference_images_in_it(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, _ = shown
    leaked = data.rows("SELECT * FROM inspected WHERE outcome = 'reference' AND dropped_by = 'dedup'")
    known = {r["image_id"] for r in data.rows("SELECT image_id FROM inspected WHERE set = 'test-set'")}
    for row in leaked:
        page = client.get("/duplicates/group", params={"of": row["image_id"]}).text
        members = re.findall(r'class="thumb ([a-z]*)">\s*<a href="/x/image/([0-9a-f]{32})"', page)
        assert {image_id for mark, image_id in members if mark == "leak"} == known & {i for _, i in members} != set()
        assert page.count('<p class="small how">in a reference set') == sum(mark == "leak" for mark, _ in members)
        assert not any(mark == "keeper" for mark, _ in members)  # all of the pool's are dropped


def test_chains_are_the_shortest() -> None:
    links = [Link(a, b, None, 0) for a, b in ("ab", "bc", "cd", "ae", "ed", "xy")]
    assert chain(links, "a", "d") == ["a", "e", "d"] and chain(links, "a", "a") == ["a"]
    assert chain(links, "a", "x") == []


def test_leaks_are_the_images_that_a_reference_set_drops(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, _ = shown
    page = unescape(client.get("/duplicates/leaks").text)
    expected = data.rows("SELECT * FROM inspected WHERE outcome = 'reference' AND dropped_by = 'dedup'")
    assert expected
    told = re.findall(r"/duplicates/pair\?a=([0-9a-f]{32})&b=([0-9a-f]{32})", page)
    assert sorted(told) == sorted((r["matched_id"], r["image_id"]) for r in expected)


def test_the_evidence_of_a_pair_is_the_stored_one(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, folder = shown
    rows = linked_rows(data)
    scored = next(r for r in rows if r["linked"] and r["score"] is not None)
    upright = next(r for r in rows if r["linked"] and r["score"] is None)
    for row, step in ((scored, "Thumbnails, aligned"), (upright, "Thumbnails, as they are")):
        page = client.get("/duplicates/pair", params={"a": row["b"], "b": row["a"]}).text
        assert re.search(r'class="decided"><b>([^<]*)</b>', page)[1] == step
        assert f"{row['phash_distance']} of 64 bits differ" in page
        assert ("any <span" in page) == np.isinf(row["min_score_limit"])
    where = {"a": scored["a"], "b": scored["b"]}
    for kind in ("aligned", "overlay", "difference"):
        answer = client.get(f"/duplicates/pair/{kind}.webp", params=where)
        image = Image.open(io.BytesIO(answer.content))
        assert (image.format, image.size, answer.headers["content-type"]) == ("WEBP", (96, 72), "image/webp")
    aligned = Image.open(io.BytesIO(client.get("/duplicates/pair/aligned.webp", params=where).content)).convert("RGB")
    second = Image.open(io.BytesIO(client.get(f"/picture/{scored['b']}.webp").content)).convert("RGB")
    assert np.abs(np.asarray(aligned, int) - np.asarray(second, int)).mean() < 8  # its map is the identity
    shutil.move(folder / "pool.tar", folder / "away.tar")
    try:
        gone = client.get("/duplicates/pair/overlay.webp", params=where)
        assert Image.open(io.BytesIO(gone.content)).size == (640, 640)  # a picture that says so
    finally:
        shutil.move(folder / "away.tar", folder / "pool.tar")


def test_an_aligned_image_lies_on_the_one_that_it_was_made_of() -> None:
    """The map leads from the copy's coordinates to the original's: a crop lies where it was cut out."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (12, 16, 3)).astype(np.uint8))
    whole = noise.resize((160, 120), Image.Resampling.BICUBIC)
    crop = whole.crop((40, 30, 120, 120)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((60, 70))
    # x: -1..1 of the crop is 120..40 of 160 pixels; y: 30..120 of 120.
    placed, inside = _placed(crop, whole.size, [-0.5, 0, 0.0, 0, 0.75, 0.25])
    seen = np.asarray(inside, bool)
    ys, xs = np.nonzero(seen)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (40, 119, 30, 119)
    far = np.abs(np.asarray(placed, int) - np.asarray(whole, int))[34:116, 44:116]
    assert far.mean() < 6
    ground, top = np.asarray(whole, np.float32), np.asarray(whole, np.float32) * 0.5 + 60
    assert difference(ground, top, np.ones((120, 160), bool)).max() < 1  # brightness and contrast do not count


def test_pairs_without_a_map_are_laid_over_each_other_as_they_were_turned() -> None:
    assert map_of(None, "identity") == [1, 0, 0, 0, 1, 0]
    assert map_of(None, "mirror") == [-1, 0, 0, 0, 1, 0]
    assert map_of([0.5, 0, 0, 0, 0, 0], "identity") is None  # flat: it cannot be turned round


def test_a_distance_links_more_the_larger_it_is(shown: tuple[TestClient, Data, Path]) -> None:
    """`phash_distance` rises where the other settings fall: what is near the line, and on which side, turns round."""
    _, data, _ = shown
    setting = Setting("phash_distance", now=3, low=0, high=4, step=1, falls=False)
    distance = np.array([0, 1, 2, 2, 3, 4, 4], np.float32)
    pairs = np.arange(len(distance))
    order = np.argsort(-distance, kind="stable")
    found = dataclasses.replace(
        line(data, "min_score"), setting=setting, a=pairs, b=pairs + 1, limit=-distance, order=order
    )
    linked, apart = found.nearest(2, 10)
    assert [p.limit for p in linked] == [2, 2, 1, 0] and [p.limit for p in apart] == [3, 4, 4]
    assert found.moved(2) == 1 and found.moved(4) == 2 and found.moved(3) == 0
    assert [bar.count for bar in found.bars()] == [1, 1, 2, 1, 2]
    assert found.value(2.0) == 2 and isinstance(found.value(2.0), int)
