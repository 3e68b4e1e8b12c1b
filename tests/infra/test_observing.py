"""Who is told of a run, and what."""

import http.server
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_stages
import yaml
from builders import picture, write_folder
from commands import lodeset

from lodeset.infra import api
from lodeset.infra.config import read
from lodeset.infra.observing import grafana, notify
from lodeset.infra.observing.config import Hook
from lodeset.infra.observing.notify import Notifier, notified
from lodeset.pipeline.dag import child
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Progress, Stage
from lodeset.pipeline.errors import ConfigError, GateError, HeldError, LodesetError

STAGE = Stage("embed", "pool", 1, "ray", toy_stages.count, {})
TO_FILE = "import os, sys; open(sys.argv[1], 'a').write(os.environ['LODESET_EVENT'] + ' ' + sys.stdin.read() + chr(10))"


def to_file(path: Path, *when: str, **knobs: Any) -> Hook:
    return Hook(when=when, command=(sys.executable, "-c", TO_FILE, str(path)), **knobs)


def told(path: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split(" ", 1)[0], json.loads(line.split(" ", 1)[1])) for line in lines]


def ends(hook: Hook, error: BaseException | None) -> None:
    with notified([hook], lambda event: None, name="zoo", store="s3://user:pw@host/zoo", config="zoo.yaml"):
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [(None, "done", 0), (LodesetError("the pool is dry"), "failed", 1), (GateError("too large"), "gate", 3)],
)
def test_a_command_is_told_how_a_run_ended(tmp_path: Path, error: Any, event: str, code: int) -> None:
    hook = to_file(tmp_path / "told", "done", "failed", "gate")
    if error is None:
        ends(hook, None)
    else:
        with pytest.raises(type(error)):
            ends(hook, error)
    ((word, message),) = told(tmp_path / "told")
    assert (word, message["event"], message["exit_code"], message["name"]) == (event, event, code, "zoo")
    assert "pw@" not in json.dumps(message)
    assert message["error"] == (str(error) if error else "")
    assert "`lodeset status zoo.yaml`" in message["text"]


@pytest.mark.parametrize("error", [HeldError("another run"), KeyboardInterrupt()])
def test_a_skipped_or_stopped_run_is_nothing_to_tell(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        ends(to_file(tmp_path / "told", "done", "failed", "gate", "stalled"), error)
    assert told(tmp_path / "told") == []


def test_only_what_was_asked_for_is_told(tmp_path: Path) -> None:
    ends(to_file(tmp_path / "told", "failed"), None)
    assert told(tmp_path / "told") == []


def test_a_run_that_stalls_is_told_once_until_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(notify.time, "monotonic", lambda: clock[0])
    notifier = Notifier([to_file(tmp_path / "told", "stalled", stalled_after=60)], "zoo", "store", "zoo.yaml")
    notifier.watch(Event("started", STAGE))

    def at(seconds: float, fraction: float | None = None) -> int:
        clock[0] = seconds
        if fraction is not None:
            notifier.watch(Event("progress", STAGE, Progress(fraction, 10)))
        notifier.look()
        return len(told(tmp_path / "told"))

    assert [at(59), at(61), at(90)] == [0, 1, 1]
    assert at(100, 0.5) == 1
    assert at(155, 0.5) == 1  # the same figures again are no progress
    assert [at(159), at(161), at(300)] == [1, 2, 2]
    assert told(tmp_path / "told")[0][1]["stages"] == ["embed/pool"]


class Receiver(http.server.BaseHTTPRequestHandler):
    received: list[dict[str, Any]]
    status: int = 200

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.status)
        if self.status == 302:
            self.send_header("Location", "http://127.0.0.1:9/secret")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[Receiver]]]:
    handler = type("Own", (Receiver,), {"received": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook-secret", handler
        server.shutdown()


def test_a_web_hook_is_posted_to(receiver: tuple[str, type[Receiver]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, handler = receiver
    monkeypatch.setenv("CHAT", url)
    for hook in (Hook(when=("done",), webhook=url), Hook(when=("done",), webhook_env="CHAT")):
        ends(hook, None)
    assert [message["event"] for message in handler.received] == ["done", "done"]


@pytest.mark.parametrize("status", [302, 403, 500])
def test_a_hook_that_fails_fails_no_run_and_shows_no_url(
    receiver: tuple[str, type[Receiver]], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    url, handler = receiver
    handler.status = status
    with caplog.at_level(logging.WARNING, "lodeset"):
        ends(Hook(when=("done",), webhook=url), None)
        ends(Hook(when=("done",), command=("false",)), None)
        ends(Hook(when=("done",), command=("/no/such/program",)), None)
        ends(Hook(when=("done",), webhook_env="NOT_SET"), None)
    assert len(caplog.messages) == 4
    assert str(status) in caplog.messages[0]
    assert "hook-secret" not in caplog.text
    assert len(handler.received) == 1


def test_a_hook_is_a_command_or_a_url(tmp_path: Path) -> None:
    path = tmp_path / "lodeset.yaml"
    for hook, why in (({}, "given: none"), ({"command": ["a"], "webhook": "http://b"}, "given: command, webhook"),
                      ({"webhook": "file:///etc/passwd"}, "http or https")):  # fmt: skip
        path.write_text(yaml.safe_dump({"pool": ["pool/"], "notify": [hook]}))
        with pytest.raises(ConfigError, match=why):
            read(path)


# -- logs, metrics, lineage, doctor


@pytest.fixture
def config(tmp_path: Path, one_process: None) -> Path:
    write_folder(tmp_path / "pool", [(f"{i}.png", picture(i)) for i in range(4)])
    path = tmp_path / "lodeset.yaml"
    path.write_text(yaml.safe_dump({"name": "zoo", "pool": ["pool/"]}))
    return path


def test_a_run_can_log_json_lines(config: Path) -> None:
    _, err = lodeset("run", config, "--until", "ingest", "--log", "json")
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {line["event"] for line in lines} >= {"started", "done"}
    done = next(line for line in lines if line["event"] == "done")
    assert (done["run"], done["stage"], done["set"], done["kept"], done["level"]) == (
        "zoo",
        "ingest",
        "pool",
        4,
        "info",
    )
    assert all(line["pid"] and line["host"] and line["time"] for line in lines)


SAMPLE = re.compile(r'^lodeset_[a-z_]+\{(?:[a-z_]+="(?:[^"\\]|\\.)*",?)+\} -?[0-9.e+-]+$')


def test_metrics_come_from_the_store(config: Path) -> None:
    before, _ = lodeset("metrics", config)
    assert 'lodeset_run_state{data_set="zoo",state="never run"} 1.0' in before.splitlines()
    lodeset("run", config, "--until", "ingest")
    lines = lodeset("metrics", config)[0].splitlines()
    assert 'lodeset_run_state{data_set="zoo",state="done"} 1.0' in lines
    assert 'lodeset_rows{data_set="zoo",stage="ingest",set="pool",outcome="kept"} 4.0' in lines
    assert 'lodeset_run_number{data_set="zoo"} 1.0' in lines
    samples = [line for line in lines if not line.startswith("#")]
    assert samples and all(SAMPLE.match(line) for line in samples)
    names = {line.split("{")[0] for line in samples}
    assert names == {line.split()[2] for line in lines if line.startswith("# TYPE")}


def test_the_board_shows_metrics_that_there_are(config: Path) -> None:
    source = Path(api.__file__).parent / "observing/metrics.py"
    known = {f"lodeset_{name}" for name in re.findall(r'^        \("([a-z_]+)", "', source.read_text(), re.M)}
    known |= {"ray_lodeset_units_total", "ray_lodeset_parts_total"}
    tree = json.loads(lodeset("metrics", config, "--grafana")[0])
    queries = [panel["targets"][0]["expr"] for panel in tree["panels"]]
    used = {name for query in queries for name in re.findall(r"(?:ray_)?lodeset_[a-z_]+", query)}
    assert used <= known
    assert len(used) >= 10
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in tree["panels"]}) == len(grafana.PANELS)


def test_what_a_stage_reports_reaches_whoever_listens_in_its_process() -> None:
    import cloudpickle
    from inline import as_task

    seen: list[tuple[str, float]] = []
    with child.reported_to(lambda stage, progress: seen.append((stage, progress.fraction))):
        child.perform(cloudpickle.dumps(as_task(STAGE)), lambda message: None)
    assert ("embed", 0.5) in seen


def test_lineage_is_told_of_every_stage(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openlineage.client")
    events = tmp_path / "events.jsonl"
    settings = tmp_path / "openlineage.yml"
    settings.write_text(yaml.safe_dump({"transport": {"type": "file", "log_file_path": str(events), "append": True}}))
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(settings))
    lodeset("run", config, "--until", "ingest", "--set", "lineage=true")
    found = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["eventType"] for event in found] == ["START", "COMPLETE"]
    assert {event["job"]["name"] for event in found} == {"zoo.ingest/pool"}
    assert len({event["run"]["runId"] for event in found}) == 1
    assert found[1]["outputs"][0]["name"] == "ingest/pool"


def test_doctor_tests_the_surroundings_of_a_configuration(config: Path) -> None:
    from lodeset.infra.doctor import examine_setting

    checks = {check.name: check for check in examine_setting(read(config))}
    assert set(checks) == {"store", "clock", "disk", "shared memory"}
    assert all(check.works for check in checks.values()), checks
    assert "conditional put kept" in checks["store"].told
    assert [path.name for path in (config.parent / "runs").iterdir() if path.name.startswith(".doctor")] == []


def test_doctor_names_a_store_that_keeps_no_conditional_put(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lodeset.infra.doctor import examine_setting
    from lodeset.pipeline.dag.store import Store

    def put(self: Store, relative: str, data: bytes) -> bool:
        Path(self.path(relative)).write_bytes(data)
        return True

    monkeypatch.setattr(Store, "put_absent", put)
    found = next(check for check in examine_setting(read(config)) if check.name == "store")
    assert not found.works
    assert "a conditional put is not kept" in found.told


def test_doctor_says_that_no_cluster_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lodeset.infra.doctor import examine_setting
    from lodeset.pipeline.engines import ray

    monkeypatch.setattr(ray, "_JOIN_S", 3.0)
    (tmp_path / "lodeset.yaml").write_text("pool: [pool/]\n")
    settings = read(tmp_path / "lodeset.yaml", ("resources.ray.address=127.0.0.1:9",))
    found = next(check for check in examine_setting(settings) if check.name == "Ray cluster")
    assert not found.works
    assert "127.0.0.1:9" in found.told
