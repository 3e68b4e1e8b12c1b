"""Samples are random, repeatable and of what they say; verdicts give an interval, a file, and a place beside the run."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from builders import picture
from commands import lodeset
from fastapi.testclient import TestClient
from inline import in_one_process
from inspected_world import inspected
from PIL import Image
from starlette.requests import Request

from lodeset.infra.api import audit
from lodeset.infra.audits import CONFIDENCE, Estimate, Kept, drop_audits, interval, parsed, wilson
from lodeset.infra.config import read
from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.making import inspect
from lodeset.infra.dashboard.pages.audit import LINKED, _largest
from lodeset.infra.dashboard.samples import decision, decisions, sample
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import Opened, open_store
from lodeset.pipeline.errors import LodesetError

TOKEN = "a-token-of-the-tests"
NEAR = "drop/dedup/pool/near"
BLURRY = "drop/filter/pool/blurry"
FORM = {"Content-Type": "application/x-www-form-urlencoded", "Origin": "http://127.0.0.1"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data, Opened]]:
    made, found = inspected(tmp_path_factory.mktemp("inspected"))
    with opened(made.store, found) as data:
        app = create_app(Site(opened=made, token=TOKEN, port=80, data=data))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with TestClient(app, base_url="http://127.0.0.1", headers=headers) as client:
            yield client, data, made


def downloaded(client: TestClient, data: Data, of: str, wrong: int, size: int = 20, **more: str) -> dict:
    """The file of a sample whose first `wrong` verdicts are `wrong`, whose last is `unsure`, and the others `right`."""
    ids = [one.id for one in sample(data, decision(data, of), size)]
    told = ["wrong"] * wrong + ["right"] * (len(ids) - wrong - 1) + ["unsure"]
    fields = {f"v-{id_}": verdict for id_, verdict in zip(ids, told, strict=True)}
    answer = client.post("/audit/verdicts.json", params={"of": of, "size": size}, data={**fields, **more}, headers=FORM)
    assert answer.status_code == 200, answer.text
    assert "attachment" in answer.headers["content-disposition"]
    return answer.json()


def test_every_decision_is_offered_as_often_as_the_run_took_it(shown: tuple[TestClient, Data, Opened]) -> None:
    client, data, _ = shown
    told = {one.id: one.count for one in decisions(data)}
    filtered, dedup = data.artifact("filter/pool"), data.artifact("dedup/pool")
    assert filtered is not None and dedup is not None
    expected = {f"drop/filter/pool/{r}": n for r, n in filtered.rows.dropped.items()}
    expected |= {f"drop/dedup/pool/{r}": n for r, n in dedup.rows.dropped.items()}
    selected = data.artifact("retrieve/all")
    assert selected is not None
    expected["selection/retrieve/all/flowers"] = selected.rows.kept
    assert {id_: n for id_, n in told.items() if "not_selected" not in id_} == expected
    page = unescape(client.get("/audit").text)
    for id_ in told:
        assert f"of={id_.replace('/', '%2F')}&size=20" in page


def test_samples_are_of_their_decision_repeatable_and_nested(shown: tuple[TestClient, Data, Opened]) -> None:
    _, data, _ = shown
    for one in decisions(data):
        ids = [item.id for item in sample(data, one, 50)]
        assert len(ids) == len(set(ids)) == min(50, one.count)
        assert [item.id for item in sample(data, one, 20)] == ids[:20]
        rows = {r["image_id"]: r for r in data.rows("SELECT * FROM inspected WHERE set = 'pool'")}
        if one.kind == "drop":
            assert {(rows[i]["outcome"], rows[i]["dropped_by"]) for i in ids} == {(one.reason, one.stage.split("/")[0])}
        else:
            assert all(one.reason in rows[i]["selected_for"] for i in ids)
    near = decision(data, NEAR)
    whole = [item.id for item in sample(data, near, near.count)]
    assert whole != sorted(whole)  # drawn, not the first ones
    assert all(item.other for item in sample(data, near, 20))  # with their keepers
    with pytest.raises(LodesetError, match="decided nothing that is called"):
        decision(data, "drop/dedup/pool/x")


def test_the_interval_is_wilsons() -> None:
    """Against the definition: the shares p from which the found one is no more than 1.96 standard errors away."""
    for found, of in ((0, 20), (1, 20), (7, 50), (50, 50), (33, 100)):
        shares = np.linspace(0, 1, 1_000_001)
        inside = shares[(found / of - shares) ** 2 <= CONFIDENCE**2 * shares * (1 - shares) / of + 1e-15]
        assert wilson(found, of) == pytest.approx((inside.min(), inside.max()), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    told = Estimate.of({"a" * 32: "wrong", "b" * 32: "right", "c" * 32: "unsure"}, 1_000)
    assert (told.rate, told.unsure) == (0.5, 1)


def test_the_interval_knows_how_many_there_are() -> None:
    """Of draws without replacement it holds the true share as often as it says, and what was not drawn is all that is uncertain."""
    rng, held = np.random.default_rng(0), []
    for count, wrong, of in ((40, 8, 30), (60, 30, 20), (400, 20, 100), (5_000, 1_500, 60)):
        drawn = rng.hypergeometric(wrong, count - wrong, of, 2_000)
        around = [interval(int(found), of, count) for found in drawn]
        held.append(np.mean([low <= wrong / count <= high for low, high in around]))
    assert min(held) > 0.9 and 0.94 < np.mean(held) < 0.98  # few numbers can be drawn, so none is met exactly
    assert interval(3, 20, 20) == (0.15, 0.15) and interval(0, 0, 5) == (0.0, 1.0)
    low, high = interval(3, 20, 10**9)
    assert (low, high) == pytest.approx(wilson(3, 20), abs=1e-6)
    told = Estimate.of({f"{n:032x}": "wrong" if n < 3 else "right" for n in range(18)}, 20)
    assert told.between[0] >= 3 and told.between[1] <= 5  # of the two others, at most two


def test_what_was_wrongly_dropped_becomes_a_list(shown: tuple[TestClient, Data, Opened]) -> None:
    client, data, _ = shown
    ids = [one.id for one in sample(data, decision(data, BLURRY), 20)]
    fields = {f"v-{ids[0]}": "wrong", f"v-{ids[1]}": "wrong", f"v-{ids[2]}": "right"}
    page = client.post("/audit/result", params={"of": BLURRY, "size": 20}, data=fields, headers=FORM).text
    found = re.search(r'href="([^"]*/commit/list[^"]*)"', page)
    assert found is not None
    listed = client.get(unescape(found[1]).replace("/commit/list?", "/commit/list/ids.txt?")).text.split()
    assert {word for word in listed if re.fullmatch("[0-9a-f]{32}", word)} == set(ids[:2])
    patch = client.get(unescape(found[1]).replace("/commit/list?", "/commit/list/configuration.patch?"))
    assert patch.status_code == 200 and "keep:" in patch.text


def test_only_images_of_the_pool_become_a_list_and_its_link_stays_short(shown: tuple[TestClient, Data, Opened]) -> None:
    client, data, _ = shown
    told = Estimate(right=0, wrong=300, unsure=0, count=300, rate=1.0, low=1.0, high=1.0)
    wrong = [f"{n:032x}" for n in range(300)]
    of = decision(data, BLURRY)
    request = Request(
        {"type": "http", "app": client.app, "headers": [], "query_string": b"run=1", "path": "/", "method": "GET"}
    )
    pages = {}
    for set_ in ("pool", "birds"):
        answer = render.page(
            request, "audit_told.html.jinja", of=dataclasses.replace(of, set=set_), told=told, size=300, wrong=len(wrong),
            linked=wrong[:LINKED],
        )  # fmt: skip
        pages[set_] = bytes(answer.body).decode()
    found = re.search(r'href="([^"]*/commit/list[^"]*)"', pages["pool"])
    assert found is not None and len(unescape(found[1])) < 8_000
    assert f"Keep by hand the first {LINKED} of 300 that are wrong" in pages["pool"]
    assert "/commit/list" not in pages["birds"]


def test_the_latest_run_speaks_where_samples_are_equally_large() -> None:
    def kept(**verdicts: str) -> Kept:
        told = {key * 32: verdict for key, verdict in verdicts.items()}
        return Kept(of="x", count=9, size=2, verdicts=told, stage="filter/pool", fingerprint="f")

    old, new = kept(a="wrong", b="wrong"), kept(a="right", b="right")
    for order in ([("9-f.json", old), ("10-0.json", new)], [("10-0.json", new), ("9-f.json", old)]):
        assert _largest(order)["x"].wrong == 0
    more = kept(a="wrong", b="wrong", c="wrong")
    assert _largest([("renamed.json", more), ("10-0.json", new)])["x"].wrong == 3


def test_verdicts_are_estimated_as_they_come(shown: tuple[TestClient, Data, Opened]) -> None:
    client, data, _ = shown
    ids = [one.id for one in sample(data, decision(data, BLURRY), 20)]
    fields = {f"v-{ids[0]}": "wrong", f"v-{ids[1]}": "right", f"v-{ids[2]}": "unsure"}
    where = {"of": BLURRY, "size": 20}
    part = client.post("/audit/result", params=where, data=fields, headers={**FORM, "HX-Request": "true"}).text
    assert "50.0 % wrong" in part
    assert "1 right, 1 wrong, 1 unsure" in part and "<html" not in part
    page = client.post("/audit/result", params=where, data=fields, headers=FORM).text
    assert part.strip() in page and "<html" in page  # without scripts
    wrong = ({"v-" + "0" * 32: "right"}, {f"v-{ids[0]}": "maybe"})
    assert [client.post("/audit/result", params=where, data=one, headers=FORM).status_code for one in wrong] == [
        400,
        400,
    ]
    assert client.post("/audit/result", params=where, content=b"\xff\xfe", headers=FORM).status_code == 400
    assert client.post("/audit/verdicts.json", params=where, headers=FORM).status_code == 400  # none yet


def test_the_file_holds_what_was_judged_in_all_samples(shown: tuple[TestClient, Data, Opened]) -> None:
    client, data, _ = shown
    first = downloaded(client, data, BLURRY, 2)
    both = downloaded(client, data, NEAR, 1, earlier=json.dumps(first["samples"][0]))
    assert [one["of"] for one in both["samples"]] == [BLURRY, NEAR] and both["run"] == 1
    again = downloaded(client, data, BLURRY, 3, earlier=json.dumps(first["samples"][0]))
    assert [list(one["verdicts"].values()).count("wrong") for one in again["samples"]] == [3]  # the newer verdicts
    answer = client.post(
        "/audit/verdicts.json", params={"of": BLURRY, "size": 20}, data={"earlier": "<script>"}, headers=FORM
    )
    assert answer.status_code == 400


def test_verdicts_are_kept_once_beside_the_run_and_in_its_report(
    shown: tuple[TestClient, Data, Opened], tmp_path: Path, one_process: None
) -> None:
    client, data, made = shown
    file = tmp_path / "verdicts.json"
    file.write_text(json.dumps(downloaded(client, data, BLURRY, 2)))
    told = json.loads(lodeset("audit", made.path, file, "--json")[0])
    assert told["new"] and re.fullmatch(r"audits/1-[0-9a-f]{16}\.json", told["path"])
    (one,) = told["samples"]
    judged = len(sample(data, decision(data, BLURRY), 20)) - 1
    assert (one["wrong"], one["right"], one["unsure"]) == (2, judged - 2, 1)
    assert (one["low"], one["high"]) == pytest.approx(interval(2, judged, one["count"]))
    out, _ = lodeset("audit", made.path, file)
    assert "was kept before as" in out and len(made.store.names("audits")) == 1
    lodeset("report", made.path, "--out", tmp_path / "report.html")
    assert BLURRY in (tmp_path / "report.html").read_text()
    page = client.get("/audit").text
    assert told["path"].rpartition("/")[2] in page
    drop_audits(made.store, ["f" * 32])
    assert len(made.store.names("audits")) == 1
    drop_audits(made.store, [next(iter(json.loads(file.read_text())["samples"][0]["verdicts"]))])
    assert made.store.names("audits") == []  # a forgotten image takes the audits with it that name it


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tree: tree.update(run=9), "9"),
        (lambda tree: tree["samples"][0].update(of="drop/x"), "decided nothing that is called drop/x"),
        (lambda tree: tree["samples"][0].update(count=1), "the verdicts say 1"),
        (lambda tree: tree["samples"][0]["verdicts"].update({"f" * 32: "right"}), "are they of another run"),
        (lambda tree: tree["samples"][0]["verdicts"].update({"f" * 32: "maybe"}), "no verdicts of the dashboard"),
        (lambda tree: tree["samples"][0].update(verdicts={}), "has no verdict"),
        (lambda tree: tree["samples"].append(tree["samples"][0]), "twice"),
        (lambda tree: tree.update(extra=1), "no verdicts of the dashboard"),
    ],
)
def test_verdicts_that_are_not_of_this_run_are_refused(
    shown: tuple[TestClient, Data, Opened], tmp_path: Path, change: object, why: str
) -> None:
    client, data, made = shown
    tree = downloaded(client, data, NEAR, 1)
    change(tree)  # type: ignore[operator]
    file = tmp_path / "verdicts.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(LodesetError, match=re.escape(why)):
        audit(made, file)
    assert made.store.names("audits") == []


def test_a_file_that_is_none_is_told() -> None:
    for text in ("", "[]", "{", '{"format": 2}'):
        with pytest.raises(LodesetError, match="x holds no verdicts"):
            parsed(text, "x")
    with pytest.raises(LodesetError, match="cannot read the verdicts"):
        audit(None, "/nonexistent/x.json")  # type: ignore[arg-type]


def test_judging_shows_the_image_its_reason_and_its_keeper(shown: tuple[TestClient, Data, Opened]) -> None:
    client, data, _ = shown
    for of, others in ((NEAR, True), (BLURRY, False)):
        page = unescape(client.get("/audit/judge", params={"of": of, "size": 20}).text)
        items = re.findall(r'<li class="item card" data-id="([0-9a-f]{32})">(.*?)</li>', page, re.DOTALL)
        drawn = sample(data, decision(data, of), 20)
        assert [id_ for id_, _ in items] == [one.id for one in drawn]
        for (id_, text), one in zip(items, drawn, strict=True):
            pictures = re.findall(r"/picture/([0-9a-f]{32})\.webp", text)
            assert pictures == [id_, one.other] if others else pictures == [id_]
            assert text.count('type="radio"') == 3
        assert "<img src=x" not in page.replace("&", "")  # the hostile name of the world stays text


def test_rejected_files_are_shown_by_name_and_reason(tmp_path: Path) -> None:
    """And as pictures only where they can be decoded: here one was rejected for its size alone."""
    pool = tmp_path / "pool"
    pool.mkdir()
    for n in range(4):
        (pool / f"{n}.png").write_bytes(picture(n, width=24, height=24))
    (pool / "large.png").write_bytes(picture(9, width=60, height=60))
    (pool / "<b>broken.png").write_bytes(b"\x89PNG and no more")
    config = tmp_path / "zoo.yaml"
    config.write_text("store: ./store\npool: [pool/]\ningest: {max_pixels: 2000}\n")
    with in_one_process():
        lodeset("run", config, "--until", "ingest")
        made = open_store(config)
        found = inspect(made, lambda event: None)
    wider = dataclasses.replace(made, config=read(config, ("ingest.max_pixels=10000",)))
    with (
        opened(made.store, found) as data,
        TestClient(
            create_app(Site(opened=wider, token=TOKEN, port=80, data=data)),
            base_url="http://127.0.0.1",
            headers={"Authorization": f"Bearer {TOKEN}"},
        ) as client,
    ):
        told = {one.reason: one for one in decisions(data) if one.kind == "reject"}
        assert {reason: one.count for reason, one in told.items()} == {"corrupt": 1, "too_many_pixels": 1}
        sides = {}
        for reason, one in told.items():
            (item,) = sample(data, one, 20)
            page = client.get("/audit/judge", params={"of": one.id, "size": 20}).text
            assert item.id in page and "<b>broken" not in page
            where = {"of": one.id, "size": 20, "id": item.id}
            sides[reason] = Image.open(io.BytesIO(client.get("/audit/rejected.webp", params=where).content)).size
            assert client.get("/audit/rejected.webp", params={**where, "id": "0" * 32}).status_code == 404
        assert sides == {"too_many_pixels": (60, 60), "corrupt": (320, 320)}  # the latter says that there is no picture
        assert "run has not looked for near-duplicates" in client.get("/duplicates").text  # and dedup has not run
        assert client.get("/duplicates/groups").status_code == client.get("/duplicates/leaks").status_code == 200
