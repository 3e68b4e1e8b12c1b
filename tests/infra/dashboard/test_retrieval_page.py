"""What became of each hit of a query is what plain rules say of the tables."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from dashboard_client import browsing
from fastapi.testclient import TestClient
from inline import in_one_process
from inspected_world import Maker, make

from lodeset.infra.dashboard import retrieval
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.making import inspect
from lodeset.infra.looking.held import configuration
from lodeset.infra.session import Opened, open_store
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, record
from lodeset.pipeline.dag.store import Rows
from lodeset.pipeline.tables import records

Rows_ = list[dict]


def asked(opened_: Opened) -> tuple[dict[str, Rows_], Rows_]:
    """A further run in which two sets ask with several hits a query; their matches by set, and what is selected."""
    store = opened_.store
    made = artifacts_of(store, store.run(1))
    maker = Maker(store, 9, dict(made))
    rng = np.random.default_rng(4)
    kept = [r["image_id"] for r in store.table(made["dedup/pool"].tables["duplicates"]).to_pylist() if r["kept"]]
    queries = sorted(store.table(made["ingest/flowers"].tables["images"])["image_id"].to_pylist())
    matches: dict[str, Rows_] = {}
    for name, asking in (("flowers", queries), ("weeds", queries[:2])):
        matches[name] = [
            {"image_id": image_id, "set": name, "mode": "sample", "query_id": query, "similarity": float(similarity)}
            for query in asking
            for image_id, similarity in zip(
                rng.choice(kept[:40], 12, replace=False).tolist(), np.float32(rng.random(12)), strict=True
            )
        ]
    best: dict[tuple[str, str], dict] = {}
    for row in sorted((r for some in matches.values() for r in some), key=lambda r: (-r["similarity"], r["query_id"])):
        best.setdefault((row["image_id"], row["set"]), row)
    # An image that weeds wants as well goes to flowers alone, and one of its images is its own.
    selected = [r for (i, s), r in best.items() if s == "flowers" or (i, "flowers") not in best]
    selected[0] = {**selected[0], "mode": "by_hand", "query_id": None, "similarity": None}
    selected.sort(key=lambda r: (r["image_id"], r["set"]))

    def table(rows: Rows_) -> pa.Table:
        return pa.Table.from_pylist([{**r, "cluster": None} for r in rows], schema=records.MATCHES)

    for name, rows in matches.items():
        half = len(rows) // 24 * 12
        details = {"asked": len(rows), "retrieved": len(rows), "distinct": len({r["image_id"] for r in rows})}
        maker.put(
            f"retrieve/{name}", {"matches": [table(rows[:half]), table(rows[half:])]}, Rows(len(rows), len(rows)),
            {"mode": "sample", "k": 12}, {"queries": "embed/flowers", "vectors": "embed/pool"}, details,
        )  # fmt: skip
    maker.put(
        "retrieve/all", {"selected": [table(selected)]}, Rows(len(selected), len(selected)), {}, {"retrieve:flowers": "retrieve/flowers"}
    )  # fmt: skip
    wanted = Wanted(opened_.config.name, None, "", configuration(opened_.config), tuple(maker.made))
    record(store, wanted, maker.made, {"lodeset": "0"}, time.time() - 60, time.time())
    return matches, selected


World = tuple[Data, TestClient, dict[str, Rows_], Rows_]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    open_ = open_store(make(tmp_path_factory.mktemp("retrieval"), 300, pictures=True, part=100))
    matches, selected = asked(open_)
    with in_one_process():
        made = inspect(open_, lambda event: None, 2)
    with opened(open_.store, made) as data, browsing(open_, data) as client:
        yield data, client, matches, selected


def plain(name: str, query: str, matches: Rows_, selected: Rows_) -> list[tuple[str, str, str]]:
    """image_id, state and who has it instead, the most similar first."""
    by_image = defaultdict(dict)
    for row in selected:
        by_image[row["image_id"]][row["set"]] = row
    found = []
    for row in sorted((r for r in matches if r["query_id"] == query), key=lambda r: -r["similarity"]):
        of = by_image.get(row["image_id"], {})
        if name not in of:
            found.append((row["image_id"], "given away" if of else "not selected", next(iter(of), "")))
        elif of[name]["mode"] == "by_hand":
            found.append((row["image_id"], "listed", ""))
        elif of[name]["query_id"] == query:
            found.append((row["image_id"], "taken", ""))
        else:
            found.append((row["image_id"], "collision", of[name]["query_id"]))
    return found


def test_the_state_of_every_hit(world: World) -> None:
    data, _, matches, selected = world
    states = set()
    for name, rows in matches.items():
        asking = sorted({row["query_id"] for row in rows})
        found = retrieval.hits(data, name, asking, 100)
        for query in asking:
            count, hits = found[query]
            assert count == 12
            assert [hit.rank for hit in hits] == list(range(1, 13))
            assert [(hit.image_id, hit.state, hit.by) for hit in hits] == plain(name, query, rows, selected)
            states |= {hit.state for hit in hits}
        few = retrieval.hits(data, name, asking[:1], 3)
        assert few[asking[0]] == (12, found[asking[0]][1][:3])
    assert states == {"taken", "collision", "given away", "listed"}
    assert retrieval.hits(data, "flowers", ["f" * 32], 9) == {"f" * 32: (0, [])}


def test_queries_are_paged_and_similarities_counted(world: World) -> None:
    data, _, matches, selected = world
    asking = sorted({row["query_id"] for row in matches["flowers"]})
    ids, total = retrieval.queries(data, "flowers", 2, 3)
    assert (ids, total) == (asking[2:5], len(asking))
    # A set without images of its own asks with images that a list names.
    assert retrieval.queries(data, "weeds", 0, 9) == (asking[:2], 2)
    counts = retrieval.similarities(data, "flowers", 10)
    values = [row["similarity"] for row in selected if row["set"] == "flowers" and row["similarity"] is not None]
    assert sum(count for _, _, count in counts) == len(values)
    expected, _ = np.histogram(np.float64(values), [*(low for low, _, _ in counts), max(values)])
    assert [count for _, _, count in counts] == expected.tolist()


def test_the_pages_show_them(world: World) -> None:
    _, client, matches, selected = world
    page = client.get("/retrieval?set=flowers").text
    asking = sorted({row["query_id"] for row in matches["flowers"]})
    assert [q for q in asking if f"/retrieval/flowers/{q}" in page] == asking[:12]
    query = asking[0]
    one = client.get(f"/retrieval/flowers/{query}").text
    shown = re.findall(r'data-title="([0-9a-f]{32})"', one)
    assert shown[0] == query
    assert shown[1:] == [image_id for image_id, _, _ in plain("flowers", query, matches["flowers"], selected)]
    for _, state, by in plain("flowers", query, matches["flowers"], selected):
        assert state != "collision" or f"/retrieval/flowers/{by}" in one
    export = re.search(r'href="([^"]*/export[^"]*format=ids)"', one)
    assert export is not None
    listed = [line for line in client.get(export[1]).text.splitlines() if line[0] != "#"]
    assert listed == sorted(shown[1:])
    leads = client.get(f"/retrieval?set=flowers&query={query}", follow_redirects=False)
    assert (leads.status_code, leads.headers["location"]) == (303, f"/retrieval/flowers/{query}")


def test_what_is_not_there_is_said(world: World) -> None:
    _, client, _, _ = world
    assert "there are: flowers, weeds" in client.get("/retrieval?set=trees").text
    assert client.get(f"/retrieval/flowers/{'f' * 32}").status_code == 404
    assert client.get("/retrieval/flowers/x").status_code == 422
    sneaky = client.get("/retrieval?set=flowers&query=//elsewhere.example/", follow_redirects=False)
    assert sneaky.headers["location"].startswith("/retrieval/flowers/")
