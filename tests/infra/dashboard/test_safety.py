"""Who may ask the dashboard for something, and what browsers are told about its answers."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse, StreamingResponse

from lodeset.infra.cli.inspect import TOKEN_VARIABLE, _token
from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.pages import PAGES
from lodeset.infra.dashboard.safety import HEADERS, Safety
from lodeset.infra.dashboard.site import Site, base_path_of
from lodeset.infra.session import open_store
from lodeset.pipeline.errors import ConfigError, LodesetError

TOKEN = "a-token-of-the-tests"
PORT = 8123
HOST = f"http://127.0.0.1:{PORT}"
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A dashboard of a store that never saw a run."""
    config = tmp_path / "zoo.yaml"
    config.write_text("name: zoo\nstore: ./store\npool: [images/]\n")
    return Site(opened=open_store(config), token=TOKEN, port=PORT)


def client(site: Site, known: bool = True, **options: Any) -> TestClient:
    """A browser, so to say; `known` has the token."""
    headers = {"Authorization": f"Bearer {TOKEN}"} if known else {}
    return TestClient(create_app(site), base_url=HOST, headers=headers, follow_redirects=False, **options)


@pytest.fixture
def browser(site: Site) -> Iterator[TestClient]:
    with client(site) as made:
        yield made


def with_routes(site: Site) -> FastAPI:
    """The dashboard with routes that take bodies, fail or take long."""
    app = create_app(site)

    @app.post("/upload")
    async def upload(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    @app.get("/fails")
    def fails() -> None:
        raise KeyError("the inside of the program")

    @app.get("/refuses")
    def refuses() -> None:
        raise LodesetError(f"no such thing as {HOSTILE}: choose another")

    return app


def routed(site: Site) -> TestClient:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(with_routes(site), base_url=HOST, headers=headers, follow_redirects=False)


# -- the token


def test_without_the_token_nothing_is_shown(site: Site) -> None:
    with client(site, known=False) as stranger:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "Bearer \xe9".encode("latin-1")},
            {"Cookie": f"{site.cookie}=wrong"},
            {"Cookie": f"other={TOKEN}"},
        ):
            for path in ("/", "/runs/now", "/runs/1/report", "/nothing"):
                assert stranger.get(path, headers=headers).status_code == 401
        assert stranger.get("/?token=wrong").status_code == 401
        assert stranger.get(f"/?token={TOKEN}&token=wrong").status_code == 401
        assert stranger.post(f"/?token={TOKEN}", headers={"Origin": HOST}).status_code == 401


def test_the_first_visit_moves_the_token_into_a_cookie(site: Site) -> None:
    with client(site, known=False) as visitor:
        answer = visitor.get(f"/?run=3&token={TOKEN}&q=a%20b")
        assert (answer.status_code, answer.headers["location"]) == (303, "/?run=3&q=a+b")
        (morsel,) = SimpleCookie(answer.headers["set-cookie"]).values()
        assert (morsel.key, morsel.value) == (f"lodeset_{PORT}", TOKEN)
        assert morsel["httponly"]
        assert (morsel["samesite"], morsel["path"]) == ("strict", "/")
        assert visitor.get("/").status_code == 200  # the client has kept the cookie


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example/", "///evil.example"])
def test_the_redirect_leads_nowhere_else(site: Site, path: str) -> None:
    with client(site, known=False) as visitor:
        answer = visitor.get(f"{HOST}{path}?token={TOKEN}")
        assert answer.status_code == 303
        assert not answer.headers["location"].replace("\\", "/").startswith("//")


def test_a_token_of_the_environment_must_be_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert _token() != _token()
    assert len(_token()) >= 32
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert _token() == TOKEN
    for bad in ("short", "", "sixteen letters & more"):
        monkeypatch.setenv(TOKEN_VARIABLE, bad)
        with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
            _token()


# -- other sites


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"127.0.0.1.evil.example:{PORT}",
        "",
        f"localhost:{PORT}@x",
    ],
)
def test_an_unknown_host_is_refused(browser: TestClient, host: str) -> None:
    """A name that an attacker resolves to 127.0.0.1 must not reach the dashboard, even with the token."""
    assert browser.get("/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LOCALHOST:{PORT}", f"[::1]:{PORT}"])
def test_own_hosts_are_answered(browser: TestClient, host: str) -> None:
    assert browser.get("/", headers={"Host": host}).status_code == 200


def test_the_host_of_a_proxy_is_answered_where_it_is_given(site: Site) -> None:
    with client(dataclasses.replace(site, allowed_hosts=("Curate.example",))) as browser:
        assert browser.get("/", headers={"Host": "curate.example"}).status_code == 200
        assert browser.get("/", headers={"Host": "curate.example:8443"}).status_code == 200
        assert browser.get("/", headers={"Host": "x.curate.example"}).status_code == 421
        same = {"Host": "curate.example", "Origin": "https://curate.example", "Sec-Fetch-Site": "same-origin"}
        assert browser.post("/", headers=same).status_code == 405  # it got as far as the routes


NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    ("method", "headers", "answered"),
    [
        ("GET", {}, True),
        ("GET", {"Sec-Fetch-Site": "none", **NAVIGATION}, True),
        ("GET", {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, False),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, False),
        ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, False),  # another port of this machine
        ("GET", {"Origin": "http://evil.example"}, False),
        ("GET", {"Origin": f"http://127.0.0.1:{PORT + 1}"}, False),
        ("POST", {"Origin": HOST, "Sec-Fetch-Site": "same-origin"}, True),
        ("POST", {"Origin": HOST}, True),
        ("POST", {"Origin": "null", "Sec-Fetch-Site": "same-origin"}, True),  # a form, without a referrer
        ("POST", {"Origin": "null"}, False),
        ("POST", {"Origin": "null", "Sec-Fetch-Site": "cross-site", **NAVIGATION}, False),
        ("POST", {"Sec-Fetch-Site": "none", **NAVIGATION}, False),
        ("POST", {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, False),
        ("POST", {"Origin": f"file://127.0.0.1:{PORT}"}, False),
        ("POST", {}, False),
        ("DELETE", {"Origin": "http://evil.example"}, False),
    ],
)
def test_pages_of_other_sites_are_refused(site: Site, method: str, headers: dict[str, str], answered: bool) -> None:
    with TestClient(create_app(site), base_url=HOST, cookies={site.cookie: TOKEN}) as browser:
        status = browser.request(method, "/", headers=headers).status_code
    assert status == ((200 if method == "GET" else 405) if answered else 403)


def test_a_program_with_the_token_needs_no_origin(browser: TestClient) -> None:
    assert browser.post("/").status_code == 405


# -- what answers say


def test_every_answer_tells_the_browser_what_it_may_do(site: Site) -> None:
    with routed(site) as known, client(site, known=False) as stranger:
        answers = [
            *(known.get(page.path) for page in PAGES),
            *(
                known.get(path)
                for path in ("/nothing", "/refuses", "/fails", "/static/dashboard.css", "/?run=x", "/?run=99")
            ),
            known.get("/", headers={"Host": "evil.example"}),
            known.get("/", headers={"Origin": "http://evil.example"}),
            stranger.get("/"),
            stranger.get(f"/?token={TOKEN}"),
        ]
    assert {answer.status_code for answer in answers} == {200, 303, 400, 401, 403, 404, 421, 422, 500}
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == dict(HEADERS)
        assert answer.headers["cache-control"].startswith("private")
        assert "server" not in answer.headers


def test_the_policy_allows_nothing_that_a_page_brings_with_it() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not any(word in rule for rule in policy.values() for word in ("unsafe", "*", "http:", "https:"))


def test_names_from_outside_stay_text(site: Site) -> None:
    html = {"Accept": "text/html"}
    with routed(site) as browser:
        page = browser.get("/refuses", headers=html)
        assert page.status_code == 400
        assert "<script>alert" not in page.text
        assert "&lt;script&gt;alert" in page.text
        for path in (f"/{HOSTILE}", f"/?run={HOSTILE}"):
            assert "<img src=x" not in browser.get(path, headers=html).text
        plain = browser.get("/refuses", headers={"HX-Request": "true", **html})
        assert plain.headers["content-type"].startswith("text/plain")


def test_a_defect_shows_nothing_of_the_inside(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with routed(site) as browser, caplog.at_level(logging.ERROR, "lodeset"):
        answer = browser.get("/fails", headers={"Accept": "text/html"})
    assert answer.status_code == 500
    assert "inside" not in answer.text
    assert "Traceback" not in answer.text
    assert "the inside of the program" in caplog.text


# -- what requests cost


def behind(site: Site, inner: Any, **limits: Any) -> TestClient:
    """An application behind limits of the test's own."""

    def refusal(scope: Any, status: int, told: str) -> PlainTextResponse:
        return PlainTextResponse(told, status)

    limited = Safety(inner, site, refusal, **limits)
    return TestClient(limited, base_url=HOST, headers={"Authorization": f"Bearer {TOKEN}"})


def test_a_body_has_a_limit_whether_or_not_its_length_is_announced(site: Site) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"x" * 100

    browser = behind(site, with_routes(site), max_body_bytes=1000)
    assert browser.post("/upload", content=b"x" * 1000).text == "1000"
    assert browser.post("/upload", content=pieces(10)).text == "1000"
    assert browser.post("/upload", content=b"x" * 1001).status_code == 413
    assert browser.post("/upload", content=pieces(11)).status_code == 413
    assert browser.post("/upload", content=b"x", headers={"Content-Length": "-1"}).status_code == 413


def test_an_answer_that_does_not_come_is_given_up(site: Site) -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    def refusal(scope: Any, status: int, told: str) -> PlainTextResponse:
        return PlainTextResponse(told, status)

    headers = [(b"host", HOST.removeprefix("http://").encode()), (b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    # Without a client, whose own threads would be measured, too.
    began = time.monotonic()
    asyncio.run(Safety(never, site, refusal, silence_s=0.1)(scope, receive, send))
    assert sent[0]["status"] == 503 and b"longer than 0.1 s" in sent[1]["body"]
    assert time.monotonic() - began < 10


def test_a_long_answer_is_not_given_up_while_it_goes_on(site: Site) -> None:
    async def steadily(scope: Any, receive: Any, send: Any) -> None:
        async def pieces() -> AsyncIterator[str]:
            for _ in range(8):
                await asyncio.sleep(0.1)
                yield "x"

        await StreamingResponse(pieces())(scope, receive, send)

    assert behind(site, steadily, silence_s=0.5).get("/").text == "x" * 8


# -- behind a prefix


@pytest.mark.parametrize("stripped", [False, True])
def test_it_works_below_a_path(site: Site, stripped: bool) -> None:
    below = dataclasses.replace(site, base_path="/data/zoo")
    prefix = "" if stripped else "/data/zoo"
    with client(below, known=False) as browser:
        answer = browser.get(f"{prefix}/?token={TOKEN}")
        assert answer.headers["location"] == "/data/zoo/"
        assert "Path=/data/zoo" in answer.headers["set-cookie"]
    with client(below) as browser:
        page = browser.get(f"{prefix}/")
        assert page.status_code == 200
        assert 'href="/data/zoo/static/dashboard.css"' in page.text
        assert browser.get(f"{prefix}/static/dashboard.css").status_code == 200
        assert browser.get(f"{prefix}/runs/now").status_code == 200
        assert browser.get("/data/zoobar/").status_code == 404


def test_base_paths_are_read_as_people_write_them() -> None:
    assert [base_path_of(given) for given in ("", "/", "x", "/x/", "/a/b")] == ["", "", "/x", "/x", "/a/b"]
    for bad in ("/a b", "/a//b", "/../b", "/<x>", "https://x/y"):
        with pytest.raises(ConfigError, match="--base-path"):
            base_path_of(bad)
