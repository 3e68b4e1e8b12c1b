"""Two runs image by image: what is said to have changed is what plain tables say."""

from __future__ import annotations

import io
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dashboard_client import browsing
from fastapi.testclient import TestClient
from inspected_world import inspected, make

from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.difference import (
    ABSENT,
    CHANGES,
    Cause,
    causes,
    deciding,
    difference,
    droppers,
    responsible,
)
from lodeset.infra.session import Opened
from lodeset.pipeline.errors import LodesetError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Opened, Data, Data]]:
    folder = tmp_path_factory.mktemp("two")
    open_, first = inspected(folder)
    _, second = inspected(folder, decided=1)
    with opened(open_.store, first) as before, opened(open_.store, second) as after:
        yield open_, before, after


@pytest.fixture(scope="module")
def browser(runs: tuple[Opened, Data, Data]) -> Iterator[TestClient]:
    with browsing(runs[0], runs[2]) as client:
        yield client


def plain(data: Data) -> dict[tuple[str, str], dict[str, Any]]:
    written = data.artifact("write_shards/all")
    assert written is not None
    found = {(r["image_id"], r["set"]): r for r in data.rows("SELECT * FROM inspected")}
    for row in found.values():
        row["shard"] = row["shard"] and posixpath.join(written.details["folder"], row["shard"])
    return found


def test_it_counts_what_plain_tables_say(runs: tuple[Opened, Data, Data]) -> None:
    _, before, after = runs
    found, old, new = difference(before, after), plain(before), plain(after)
    keys = {*old, *new}
    pairs = [(old.get(k), new.get(k)) for k in keys]
    outcome = lambda row: row["outcome"] if row else ABSENT  # noqa: E731
    assert found.matrix == Counter((outcome(a), outcome(b)) for a, b in pairs)
    in_both = [(a, b) for a, b in pairs if a and b]
    expected = {
        "entered": sum(outcome(a) != "in_shard" and outcome(b) == "in_shard" for a, b in pairs),
        "left": sum(outcome(a) == "in_shard" and outcome(b) != "in_shard" for a, b in pairs),
        "new": sum(a is None for a, _ in pairs),
        "gone": sum(b is None for _, b in pairs),
        "outcome": sum(a["outcome"] != b["outcome"] for a, b in in_both),
        "group": sum((a["group_id"], a["group_size"]) != (b["group_id"], b["group_size"]) for a, b in in_both),
        "cluster": 0,  # of two fits
        "shard": sum(bool(a["shard"] and b["shard"] and a["shard"] != b["shard"]) for a, b in in_both),
    }
    assert found.counts == expected and not found.comparable
    assert all(expected[name] for name in ("entered", "left", "outcome", "group", "shard"))
    for was, now in (("near", "in_shard"), ("in_shard", "not_selected")):
        rows = found.which(was=[was], now=[now])
        names = before.rows("SELECT image_id FROM inspected ORDER BY row")
        ids = [names[row]["image_id"] for row in found.before[rows]]
        assert ids == sorted(k[0] for k in keys if outcome(old.get(k)) == was and outcome(new.get(k)) == now)


def test_what_one_run_lacks_is_new_or_gone(tmp_path: Path, runs: tuple[Opened, Data, Data]) -> None:
    _, before, _ = runs
    open_, other = inspected(tmp_path, images=60, seed=5)
    with opened(open_.store, other) as elsewhere:
        found = difference(before, elsewhere)
        counts = found.counts
        assert (counts["gone"], counts["new"]) == (before.details.images, elsewhere.details.images)
        back = difference(elsewhere, before)
        assert back.matrix == {(b, a): n for (a, b), n in found.matrix.items()}


def test_a_run_does_not_differ_from_itself(runs: tuple[Opened, Data, Data]) -> None:
    _, before, _ = runs
    found = difference(before, before)
    assert not any(found.counts.values())
    assert found.comparable
    assert sum(found.matrix.values()) == before.details.images
    with pytest.raises(LodesetError, match="choose one of entered"):
        found.which("color")


def test_causes_are_the_settings_upstream(runs: tuple[Opened, Data, Data]) -> None:
    _, before, after = runs
    old, new = dict(before.inspected.held.artifacts), dict(after.inspected.held.artifacts)
    assert {cause.stage for cause in causes(old, new)} == {
        id_ for id_ in new if id_.split("/")[0] not in ("ingest", "embed")
    }
    new["dedup/pool"] = replace(new["dedup/pool"], config={**new["dedup/pool"].config, "min_score": 3.0})
    told = {cause.stage: cause for cause in causes(old, new)}
    assert told["dedup/pool"] == Cause("dedup/pool", ("min_score 4.0 → 3.0",), ("filter/pool",))
    assert told["retrieve/all"].settings == ()
    only = [told["dedup/pool"]]
    assert responsible(list(told.values()), ["dedup/pool"], new)[-1:] == only
    assert told["dedup/pool"] not in responsible(list(told.values()), ["filter/pool"], new)
    # A stage with the same result explains nothing.
    new["dedup/pool"] = replace(new["dedup/pool"], content=old["dedup/pool"].content)
    alike = next(cause for cause in causes(old, new) if cause.stage == "dedup/pool")
    assert alike.alike and alike.settings
    assert alike not in responsible(causes(old, new), ["dedup/pool"], new)
    del new["retrieve/all"]
    gone = {cause.stage: cause.settings for cause in causes(old, new)}
    assert gone["retrieve/all"] == ("only in the earlier run",)
    assert deciding("near", "in_shard", {"near": "dedup", "in_shard": ""}) == "dedup/pool"
    assert deciding("not_selected", "in_shard", {"not_selected": "retrieve"}) == "retrieve/all"
    assert deciding(ABSENT, "near", {"near": "dedup"}) == "ingest/pool"


def test_droppers_are_the_stages_that_rows_name(runs: tuple[Opened, Data, Data]) -> None:
    _, before, _ = runs
    assert droppers(before) == {r["outcome"]: r["dropped_by"] for r in before.rows("SELECT * FROM inspected")}


def test_the_page_shows_each_cell_as_a_gallery(browser: TestClient, runs: tuple[Opened, Data, Data]) -> None:
    _, before, after = runs
    page = browser.get("/diff?run=2&with=1")
    assert page.status_code == 200
    assert "Run 2 compared with run 1" in page.text
    assert 'href="/?run=2" aria-current="page">Runs' in page.text
    for label, _ in list(CHANGES.values())[:4]:
        assert label in page.text
    count = difference(before, after).matrix["in_shard", "not_selected"]
    cell = browser.get("/diff?run=2&with=1&was=in_shard&now=not_selected")
    assert f"{count} image" in cell.text
    assert cell.text.count("<figure") == min(60, count)
    assert "was in shard" in cell.text
    # Without `with`, the run before it.
    assert browser.get("/diff").text.count("<figure") == page.text.count("<figure")


def test_the_page_pages_and_refuses_what_it_does_not_know(browser: TestClient) -> None:
    assert 'rel="next"' in browser.get("/diff?change=outcome").text
    assert 'rel="prev"' in browser.get("/diff?change=outcome&start=60").text
    assert browser.get("/diff?change=color").status_code == 400
    assert browser.get("/diff?run=9").status_code in (400, 404)


def test_a_run_that_nobody_inspected_says_how_to(tmp_path: Path) -> None:
    open_, made = inspected(tmp_path, images=60)
    make(tmp_path, 60, pictures=True, part=100, decided=3)
    with opened(open_.store, made) as data, browsing(open_, data) as client:
        page = client.get("/diff?run=2&with=1")
    assert page.status_code == 200
    assert "--run 2 --make-only" in page.text
    assert "dedup/pool" in page.text  # what differs is told without it


def test_one_run_alone_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    open_, made = inspected(tmp_path, images=60)
    with opened(open_.store, made) as data, browsing(open_, data) as client:
        assert "Only one run has finished" in client.get("/diff").text


def test_each_side_of_a_change_is_exported(browser: TestClient, runs: tuple[Opened, Data, Data]) -> None:
    _, before, after = runs
    found, old, new = difference(before, after), plain(before), plain(after)
    page = browser.get("/diff?run=2&with=1&change=outcome").text
    links = [unescape(one) for one in re.findall(r'href="([^"]*/diff/export[^"]*format=ids)"', page)]
    assert len(links) == 2
    changed = {key[0] for key in {*old} & {*new} if old[key]["outcome"] != new[key]["outcome"]}
    for link in links:
        assert {line for line in browser.get(link).text.splitlines() if line[0] != "#"} == changed
    for side, data, numbers in (("before", old, found.before), ("after", new, found.after)):
        answer = browser.get(f"/diff/export?run=2&with=1&change=outcome&side={side}&format=parquet")
        table = pq.read_table(io.BytesIO(answer.content))
        assert len(table) == sum(numbers[found.which("outcome")] >= 0)
        assert all(data[row["image_id"], row["set"]]["outcome"] == row["outcome"] for row in table.to_pylist())
    assert browser.get("/diff/export?run=2&with=1&side=after&change=color").status_code == 400
