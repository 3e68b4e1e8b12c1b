"""A selection becomes a list by hand, and the next run does what the page said."""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import id_of, picture, write_folder
from commands import by_image, entries, lodeset
from dashboard_client import browsing, shown
from fastapi.testclient import TestClient
from inline import in_one_process

from lodeset.infra import api
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.making import inspect
from lodeset.infra.dashboard.pages.lists import unchanged
from lodeset.infra.dashboard.regrouped import regrouped
from lodeset.infra.dashboard.selection import inside, polygon
from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.copies.keepers import keepers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data]]:
    with shown(tmp_path_factory.mktemp("inspected")) as made:
        yield made


@pytest.fixture
def config_of_world(world: tuple[TestClient, Data]) -> Path:
    path: Path = world[0].app.state.site.opened.path  # type: ignore[attr-defined]
    return path


def ids_on(text: str) -> list[str]:
    return re.findall(r'data-title="([0-9a-f]{32})"', text)


def test_exactly_the_pictured_images_are_in_the_list(world: tuple[TestClient, Data]) -> None:
    client, data = world
    pool = data.rows("SELECT * FROM inspected WHERE set = 'pool' AND label = 'class-3' ORDER BY image_id")
    text = client.get("/commit/list?as=drop&label=class-3").text
    counts = Counter(row["outcome"] for row in pool)
    assert f"<b>{len(pool)}</b><span>images in the list</span>" in text
    assert f"<b>{counts['in_shard']}</b><span>kept until now, so they leave</span>" in text
    assert counts["not_selected"] and f"<b>{counts['not_selected']}</b> not selected anyway" in text
    ids = client.get("/commit/list/ids.txt?as=drop&label=class-3").text.splitlines()[2:]
    assert ids == [row["image_id"] for row in pool] == ids_on(text.partition("<h2>Exactly these</h2>")[2])
    keep = client.get("/commit/list?as=keep&label=class-3").text
    refused = counts["reference"] + counts["no_vector"]
    back = len(pool) - counts["in_shard"] - counts["not_selected"] - refused
    assert f"<b>{back}</b><span>dropped until now, so they come back</span>" in keep


def kept_by_dedup(data: Data, without: set[str], by_hand: set[str]) -> dict[str, bool]:
    """Which images of the pool dedup would keep, judged anew over all pairs: in a world without included sets."""
    assert data.dedup is not None
    images = data.dedup.images
    nodes = [n for n, image_id in enumerate(images.ids) if image_id not in without or images.reference[n]]
    number = {node: n for n, node in enumerate(nodes)}
    linked = [
        (number[p["a"]], number[p["b"]])
        for p in data.pairs.to_pylist()
        if p["linked"] and p["a"] in number and p["b"] in number
    ]
    a, b = (np.array([pair[side] for pair in linked], np.int64) for side in (0, 1))
    component = components(len(nodes), a, b)
    some = images.chosen(np.array(nodes))
    wanted = np.array([image_id in by_hand for image_id in some.ids])
    keeper = keepers(component, some.looks, data.dedup.spec.keeper, wanted)
    leaks = {int(component[n]) for n in range(len(nodes)) if some.reference[n]}
    return {
        image_id: int(component[n]) not in leaks and bool(keeper[n] == n or wanted[n])
        for n, image_id in enumerate(some.ids)
        if some.pool[n]
    }


@pytest.mark.parametrize("as_", ["drop", "keep"])
def test_the_copies_that_come_back_or_leave_are_pictured(world: tuple[TestClient, Data], as_: str) -> None:
    client, data = world
    before = kept_by_dedup(data, set(), set())
    listed = {i for i, kept in before.items() if kept == (as_ == "drop")}
    listed = set(sorted(listed)[::2])
    after = kept_by_dedup(data, *((listed, set()) if as_ == "drop" else (set(), listed)))
    back = {i for i, kept in after.items() if kept and not before[i] and i not in listed}
    leave = {i for i, kept in after.items() if not kept and before[i] and i not in listed}
    found = regrouped(data, sorted(listed), drop=as_ == "drop")
    assert {one.image_id for one in found.back} == back and {one.image_id for one in found.leave} == leave
    assert back if as_ == "drop" else leave
    assert all(one.other in listed for one in (found.back if as_ == "drop" else found.leave))
    some = sorted(listed)[:40]
    page = client.get("/commit/list", params={"as": as_, "image_id": some}).text
    few = regrouped(data, some, drop=as_ == "drop")
    moved, title = (few.back, "Come back") if as_ == "drop" else (few.leave, "Leave")
    assert moved and f"<h2>{title} ({len(moved)})</h2>" in page
    section = page.partition(f"<h2>{title} (")[2].partition("</section>")[0]
    assert ids_on(section) == [i for one in moved[:60] for i in (one.image_id, one.other)]


def test_lists_that_change_nothing_say_why() -> None:
    for as_, outcome, why in (
        ("keep", "reference", "which comes first"),
        ("keep", "blocked_url", "blocked"),
        ("keep", "no_vector", "without a vector"),
        ("keep", "by_hand", "on both"),
        ("keep", "in_shard", "already"),
        ("drop", "blurry", "dropped anyway"),
        ("drop", "not_selected", "not selected anyway"),
        ("curated", "near", "do not come back"),
        ("curated", "in_shard", "already"),
        ("drop", "embedded", "ended before"),
    ):
        assert why in unchanged(as_, outcome), (as_, outcome)
    for as_, outcome in (
        ("keep", "blurry"),
        ("keep", "near"),
        ("keep", "included"),
        ("drop", "in_shard"),
        ("curated", "kept"),
    ):
        assert unchanged(as_, outcome) == ""


def test_a_second_list_overwrites_no_first(world: tuple[TestClient, Data], config_of_world: Path) -> None:
    """Each gets a name that neither the file nor its folder has, though the dashboard was started before."""
    client, _ = world
    config, before = config_of_world, config_of_world.read_text()
    lists = config.parent / "lists"

    def offered(as_: str) -> str:
        patch = client.get(f"/commit/list/configuration.patch?as={as_}&cluster=1")
        assert patch.status_code == 200
        return str(re.findall(r"lists/([\w-]+)\.txt", patch.text)[-1])

    try:
        assert offered("drop") == "run-1-drop"
        config.write_text(before + "by_hand: {drop: [lists/run-1-drop.txt]}\n")
        lists.mkdir()
        (lists / "run-1-drop.txt").write_text("")
        (lists / "run-1-drop-2.txt").write_text("")
        assert offered("drop") == "run-1-drop-3"
        again = client.get("/commit/list/configuration.patch?as=drop&name=run-1-drop&cluster=1")
        assert again.status_code == 409 and "already" in again.text
        page = client.get("/commit/list?as=drop&name=run-1-drop-2&cluster=1").text
        assert "would overwrite it. run-1-drop-3 is free" in page
        for name in ("flowers", "pool", "test-set"):
            assert client.get(f"/commit/list/configuration.patch?as=curated&name={name}&cluster=1").status_code == 409
        assert "differs now from the configuration" in page
    finally:
        config.write_text(before)
        shutil.rmtree(lists, ignore_errors=True)


def test_other_sets_have_no_lists(world: tuple[TestClient, Data]) -> None:
    client, _ = world
    assert "no image of the pool" in client.get("/commit/list?set=flowers").text
    assert client.get("/commit/list/ids.txt?set=flowers").status_code == 404
    both = client.get("/commit/list?set=flowers&set=pool").text
    assert "<b>6</b><span>selected images of other sets</span>" in both
    for wrong in ("name=../x", "name=a%22b", "as=other", "name=" + "a" * 61):
        assert client.get(f"/commit/list?{wrong}").status_code == 422


def test_a_curated_set_is_one_more_section(world: tuple[TestClient, Data]) -> None:
    client, data = world
    config = data.inspected.held
    assert config.run is not None
    patch = client.get("/commit/list/configuration.patch?as=curated&name=birds&cluster=1").text
    (added,) = [line[1:] for line in patch.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert yaml.safe_load(added) == [
        {"name": "birds", "pool_ids": "lists/birds.txt", "include": True, "retrieve": {"mode": "sample", "k": 4}}
    ]


# -- a run

CONFIG = """store: ./runs
pool: [pool/]   # all of them
filter: {min_side: 32}
dedup: {threshold: 0.99, reference_threshold: 0.99, verify: none}
embed: {semantic: {kind: patch_dictionary, words: 8}}
"""


def test_what_is_drawn_around_on_the_map_leaves_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lasso, list, patch, run: exactly these images leave, and `trace` says that a person decided."""
    folder, config = tmp_path / "data", tmp_path / "data" / "c.yaml"
    write_folder(folder / "pool", [(f"{n}.png", picture(n, width=64, height=64)) for n in range(14)])
    config.write_text(CONFIG)
    with in_one_process():
        lodeset("run", config, "--until", "retrieve")
        open_ = api.open_store(config)
        made = inspect(open_, lambda event: None)
        with opened(open_.store, made) as data, browsing(open_, data) as client:
            x, y = data.column("x"), data.column("y")
            middle = float(np.median(x))
            lasso = f"-9,-9;{middle},-9;{middle},9;-9,9"
            drawn = inside(polygon(lasso), x, y)
            asked = {"as": "drop", "name": "left-half", "lasso": lasso}
            page = client.get("/commit/list", params=asked).text
            assert 3 < drawn.sum() < 11 and f"<b>{drawn.sum()}</b><span>images in the list" in page
            planned = client.get("/commit/list/plan", params=asked).text
            assert f"by_hand.drop is new: {drawn.sum()} ids" in planned
            downloads = tmp_path / "downloads"
            downloads.mkdir()
            for path, name in (("ids.txt", "left-half.txt"), ("configuration.patch", "left-half.patch")):
                answer = client.get(f"/commit/list/{path}", params=asked)
                assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
                (downloads / name).write_bytes(answer.content)
        commands = [html.unescape(one) for one in re.findall(r'aria-label="command">([^<]+)</pre>', page)]
        for command in commands[:2]:  # the ones that put the list and the patch where they belong
            subprocess.run(shlex.split(command), cwd=downloads, check=True, capture_output=True, timeout=20)
        assert config.read_text() == CONFIG + "by_hand:\n  drop: [lists/left-half.txt]\n"
        before = set(by_image(entries(config)["retrieve/all"], "selected"))
        lodeset("run", config, "--until", "retrieve")
    after = entries(config)
    gone = before - set(by_image(after["retrieve/all"], "selected"))
    assert gone == set(ids_on(page)) == set(by_image(after["filter/pool"], "filtered"))
    assert before <= {id_of(picture(n, width=64, height=64)) for n in range(14)}
    told = lodeset("trace", config, min(gone))[0]
    assert "dropped by hand (list left-half.txt)" in " ".join(told.split())
