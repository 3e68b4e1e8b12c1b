"""The page of the runs: figures are those of the artifacts, beside those of the run before, and a run at work is followed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import toy_stages
from fastapi.testclient import TestClient
from inline import InThisProcess, no_ray

from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.pages.runs import RUNS_SHOWN
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import Opened, open_store
from lodeset.pipeline.dag import attempts
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.runner import Event, Runner
from lodeset.pipeline.dag.runs import Wanted, record
from lodeset.pipeline.dag.stage import Context, Outcome, Progress, Stage
from lodeset.pipeline.dag.store import Artifact, Rows

TOKEN, PORT = "a-token-of-the-tests", 8123
HOSTILE = "<script>alert(1)</script>"
ORDER = ("ingest/pool", "dedup/pool", "write_shards/all")


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    config = tmp_path / "zoo.yaml"
    config.write_text("name: zoo\nstore: ./store\npool: [images/]\n")
    made = open_store(config)
    made.store.prepare()
    return made


@pytest.fixture
def browser(opened: Opened) -> Iterator[TestClient]:
    site = Site(opened=opened, token=TOKEN, port=PORT, base_path="/x")
    with TestClient(
        create_app(site), base_url=f"http://127.0.0.1:{PORT}/x", headers={"Authorization": f"Bearer {TOKEN}"}
    ) as client:
        yield client


def artifact(opened: Opened, id_: str, rows: Rows, seconds: float, fingerprint: str) -> Artifact:
    stage, _, set_ = id_.partition("/")
    order = opened.store.next_order(stage, set_)
    made = Artifact(stage, set_, 1, fingerprint, {}, {}, {}, rows, {}, {}, seconds, time.time(), order)
    return opened.store.commit_artifact(made)


def finish(opened: Opened, made: Mapping[str, Artifact]) -> None:
    wanted = Wanted("zoo", None, "", {"number": len(opened.store.run_numbers())}, ORDER)
    record(opened.store, wanted, made, {}, time.time() - 10, time.time())


def two_runs(opened: Opened) -> None:
    """The second takes ingest over, drops more, and writes no shards."""
    ingest = artifact(opened, "ingest/pool", Rows(1000, 990, {"corrupt": 10}), 5.0, "a" * 16)
    dedup = artifact(opened, "dedup/pool", Rows(990, 900, {"near": 90}), 3.0, "b" * 16)
    shards = artifact(opened, "write_shards/all", Rows(900, 900, {}), 2.0, "c" * 16)
    finish(opened, {"ingest/pool": ingest, "dedup/pool": dedup, "write_shards/all": shards})
    again = artifact(opened, "dedup/pool", Rows(990, 850, {"near": 120, HOSTILE: 20}), 2.0, "d" * 16)
    finish(opened, {"ingest/pool": ingest, "dedup/pool": again})


def text(page: str) -> str:
    """What a reader sees, on one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_a_store_without_a_run_says_what_to_do(browser: TestClient, opened: Opened) -> None:
    page = text(browser.get("/").text)
    assert "No stage of this configuration has finished yet" in page
    assert f"lodeset plan {opened.path}" in page


def test_a_run_is_shown_beside_the_run_before(browser: TestClient, opened: Opened) -> None:
    two_runs(opened)
    page = text(browser.get("/").text)
    assert "Run 2" in page and "compared with run 1" in page
    assert "ingest/pool as in the run before 1,000 990" in page
    assert "dedup/pool 990 850 900" in page  # kept, and what the run before kept
    assert "near 120" in page and "2.0 s 3.0 s" in page and "495 330" in page  # seconds and images/s, of both runs
    assert "write_shards/all not finished" in page
    assert "left without near-duplicates and leaks 850 -50" in page
    assert "All stages together took 7.0 s" in page


def test_the_first_run_is_compared_with_nothing(browser: TestClient, opened: Opened) -> None:
    two_runs(opened)
    page = text(browser.get("/?run=1").text)
    assert "Run 1" in page and "compared with" not in page and "as in the run before" not in page
    assert "in shards 900" in page
    assert 'aria-current="true"><th scope="row"><a href="/x/?run=1">' in browser.get("/?run=1").text


def test_names_of_reasons_stay_text(browser: TestClient, opened: Opened) -> None:
    two_runs(opened)
    page = browser.get("/").text
    assert HOSTILE not in page and "&lt;script&gt;alert(1)" in page


def test_a_run_that_is_not_there_is_one_sentence(browser: TestClient, opened: Opened) -> None:
    two_runs(opened)
    answer = browser.get("/?run=7", headers={"Accept": "text/html"})
    assert answer.status_code == 400 and "7" in text(answer.text)


def test_many_runs_are_pages_that_lose_none(browser: TestClient, opened: Opened) -> None:
    made = {"ingest/pool": artifact(opened, "ingest/pool", Rows(3, 3, {}), 1.0, "a" * 16)}
    for _ in range(RUNS_SHOWN + 3):
        finish(opened, made)
    seen: list[int] = []
    path: str | None = "/"
    while path is not None:
        page = browser.get(path).text
        seen += [int(n) for n in re.findall(r'<th scope="row"><a href="/x/\?run=(\d+)">', page)]
        more = re.search(r'rel="next" href="/x([^"]+)"', page)
        path = more[1].replace("&amp;", "&") if more else None
    assert seen == list(range(RUNS_SHOWN + 3, 0, -1))


def test_a_report_opens_alone_and_can_run_nothing(browser: TestClient, opened: Opened) -> None:
    two_runs(opened)
    assert "/runs/2/report" not in browser.get("/").text
    assert browser.get("/runs/2/report").status_code == 404
    opened.store.put_absent("reports/000002.html", b"<style>p{}</style><p>report</p>")
    assert "/runs/2/report" in browser.get("/").text
    answer = browser.get("/runs/2/report")
    policy = answer.headers["content-security-policy"]
    assert answer.content.endswith(b"<p>report</p>")
    assert policy.startswith("sandbox; default-src 'none'") and "script" not in policy


def test_a_run_at_work_is_followed(browser: TestClient, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "LOCAL_S", 0.02)
    stage = Stage("sort", "pool", 1, "beam", half, {"k": 1}, {}, max_cpus=1)
    seen: list[str] = []

    def look(event: Event) -> None:
        if event.kind == "progress":
            time.sleep(0.3)  # until the next news
            seen.append(browser.get("/runs/now").text)

    with (
        claim(opened.store, attempts.claim_name("zoo", None), "zoo"),
        attempts.attempt(opened.store, {stage.id: stage}, look, name="zoo") as told,
    ):
        Runner(opened.store, 1, no_ray, told, launch=InThisProcess).run({stage.id: stage})
    assert "A run is at work" in text(seen[0]) and "sort/pool" in seen[0]
    assert 'value="0.5"' in seen[0] and "2 of 4 parts" in text(seen[0])
    assert 'hx-trigger="every 2s, refresh"' in seen[0]
    after = browser.get("/runs/now").text
    assert "at work" not in after and 'hx-trigger="every 15s, refresh"' in after


def half(context: Context) -> Outcome:
    context.report(Progress(0.5, 100, "images", "sort", 2, 4))
    time.sleep(0.05)
    return Outcome({}, Rows(0, 0))


def test_a_run_that_failed_says_why_and_a_later_one_is_offered(browser: TestClient, opened: Opened) -> None:
    stage = Stage("water", "pool", 1, "beam", toy_stages.user_error, {"k": 1}, {}, max_cpus=1)
    with (
        pytest.raises(Exception, match="water"),
        claim(opened.store, attempts.claim_name("zoo", None), "zoo"),
        attempts.attempt(opened.store, {stage.id: stage}, lambda event: None, name="zoo") as told,
    ):
        Runner(opened.store, 1, no_ray, told, launch=InThisProcess).run({stage.id: stage})
    assert "The last run did not finish" in text(browser.get("/").text)
    two_runs(opened)
    assert "Run 2 has finished" in text(browser.get("/runs/now?shown=1").text)
    assert "has finished" not in text(browser.get("/runs/now?shown=2").text)
