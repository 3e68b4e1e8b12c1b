"""Jobs of a cluster: names, what is sent, what is said while waiting, and how following copes with what goes wrong."""

from __future__ import annotations

import asyncio
import importlib.metadata
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from builders import picture
from commands import lodeset

from lodeset.infra.config import read
from lodeset.infra.dag import build
from lodeset.infra.jobs import arrived, bundle, submissions
from lodeset.infra.jobs.bundle import resolved
from lodeset.infra.jobs.client import Head, token
from lodeset.infra.jobs.errors import Taken, Unknown, Unreachable
from lodeset.infra.jobs.follow import Ended, Waits, ended, follow
from lodeset.infra.jobs.held import jobs, stop
from lodeset.infra.jobs.names import CPUS, NAME, STOP, STORE, attempt_of, next_attempt
from lodeset.infra.jobs.pending import GIB, Asked, lacking
from lodeset.infra.jobs.submit import Options, entrypoint, identity, submit
from lodeset.infra.looking.now import now
from lodeset.infra.versions import LOCK
from lodeset.pipeline.dag.attempts import attempt
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import ConfigError, LodesetError

ROOT = Path(__file__).parents[2]


# -- names


@pytest.mark.parametrize(
    ("job", "run", "attempt"),
    [
        ("a-1", "a", 1),
        ("a-12", "a", 12),
        ("a-1-2", "a", None),
        ("a-1-2", "a-1", 2),
        ("a-x", "a", None),
        ("a", "a", None),
    ],
)
def test_a_job_belongs_to_one_run(job: str, run: str, attempt: int | None) -> None:
    assert attempt_of(job, run) == attempt


def test_the_next_attempt_is_after_all_of_the_run() -> None:
    assert next_attempt(["a-1", "a-10", "a-9", "b-70", "raysubmit_x", "a-1-99"], "a") == 11
    assert next_attempt([], "a") == 1


# -- what is sent


def _config(folder: Path, **keys: Any) -> Path:
    (folder / "pool").mkdir(exist_ok=True)
    (folder / "pool" / "one.png").write_bytes(picture(1))
    path = folder / "lodeset.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "pool": [{"uri": "pool/"}], **keys}))
    return path


def test_the_cluster_gets_what_this_machine_would_run(tmp_path: Path) -> None:
    path = _config(
        tmp_path, training={"recipe": "tiny", "steps": 7}, curated=[{"name": "c", "uri": "pool/", "include": True}]
    )
    sent = resolved(path, ("cluster.k=9",))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lodeset.yaml").write_text(sent.text)
    there, here = read(elsewhere / "lodeset.yaml"), read(path, ("cluster.k=9",))
    assert there.resources.ray_address == "auto"
    assert there.model_copy(update={"resources": here.resources}) == here
    assert [stage.spec for stage in build(there).values()] == [stage.spec for stage in build(here).values()]


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes_can_be_sent(recipe: Path, tmp_path: Path) -> None:
    sent = resolved(recipe)
    (tmp_path / "lodeset.yaml").write_text(sent.text)
    assert read(tmp_path / "lodeset.yaml") == sent.config


def test_paths_of_this_machine_are_told(tmp_path: Path) -> None:
    path = _config(tmp_path, store="s3://bucket/runs", reference=[{"name": "r", "uri": "https://host/r.tar"}])
    assert resolved(path).local == (("pool.0.uri", str(tmp_path / "pool")),)


@pytest.mark.parametrize(
    "keys",
    [
        {"store": "s3://key:secret@bucket/runs"},
        {"reference": [{"name": "r", "uri": "https://host/r.tar?X-Amz-Signature=abcdef"}]},
        {"resources": {"beam": {"runner": "FlinkRunner", "flink_token": "abcdef"}}},
    ],
)
def test_a_credential_is_not_sent(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="holds a credential") as refused:
        resolved(_config(tmp_path, **keys))
    assert "abcdef" not in str(refused.value) and "secret@" not in str(refused.value)


def test_a_bundle_is_small_reproducible_and_runs_by_itself(tmp_path: Path) -> None:
    sent = resolved(_config(tmp_path))
    one, two, folder = tmp_path / "1.tar.xz", tmp_path / "2.tar.xz", tmp_path / "unpacked"
    assert bundle.write(sent, one) == one.stat().st_size <= bundle.MAX_BYTES
    bundle.write(sent, two)
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as sent_files:
        sent_files.extractall(folder, filter="data")
    assert (folder / LOCK).read_text() == (ROOT / LOCK).read_text()
    # -I: without the lodeset that these tests import.
    look = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import lodeset, importlib.metadata as m, lodeset.infra.cli.main;"
        "print(lodeset.__path__[0], m.version('lodeset'), m.distribution('lodeset')._path.parent)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", look], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [f"{folder}/lodeset", importlib.metadata.version("lodeset"), str(folder)]


def test_a_bundle_that_is_too_large_is_refused_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_wheel", lambda: {"lodeset/large.npz": random.Random(0).randbytes(bundle.MAX_BYTES)})
    with pytest.raises(LodesetError, match=r"has 1,0\d\d,\d{3} bytes, and at most 1,048,576 .* is lodeset/large\.npz"):
        bundle.write(resolved(_config(tmp_path)), tmp_path / bundle.NAME)


def test_the_command_of_the_driver() -> None:
    command = entrypoint(Options(until="dedup", fresh=True, python="/opt/my python/bin/python"))
    assert command.endswith("&& exec '/opt/my python/bin/python' -m lodeset run lodeset.yaml --until dedup --fresh")


# -- on arrival


def test_a_job_looks_for_its_submission_in_the_store(tmp_path: Path) -> None:
    config = str(_config(tmp_path))
    with pytest.raises(ConfigError, match="not the one of the machine that submitted small-1"):
        arrived.check(config, "small-1")
    submissions.record(Store(str(tmp_path / "runs")), "small-1", "small", None, "http://head:8265", "digest")
    arrived.check(config, "small-1")


def test_other_versions_than_in_the_lock_file_are_told() -> None:
    lock = ["# a comment", "Ray==2.60.0", "torch==2.13.0", "numpy==2.4.0", "mypy==1.0"]
    installed = {"ray": "2.59.1", "torch": "2.13.0+cpu", "numpy": "2.4.0", "mypy": "2.0"}
    assert arrived.differing(lock, installed) == ["ray 2.59.1 (lock file: 2.60.0)"]


# -- what a job waits for


def _nodes(*nodes: dict[str, tuple[float, float]], **report: Any) -> dict[str, Any]:
    usage = {str(number): node for number, node in enumerate(nodes)}
    return {"clusterStatus": {"loadMetricsReport": {"usageByNode": usage}, "autoscalerReport": report}}


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        (Asked(), {}, "reports no node"),
        (
            Asked(8),
            _nodes({"CPU": (0, 4)}, {"CPU": (0, 2)}),
            "asks for 8 CPU on one node, and the largest of 2 has 4 CPU",
        ),
        (
            Asked(2),
            _nodes({"CPU": (3, 4)}, {"CPU": (1, 2)}),
            "waits for 2 CPU on one node; free on 2 nodes: 1 CPU; 1 CPU",
        ),
        (
            Asked(1, 4),
            _nodes({"CPU": (0, 4), "memory": (6 * GIB, 8 * GIB)}),
            "waits for 1 CPU and 4.0 GiB of memory on one node; free on 1 nodes: 4 CPU, 2.0 GiB of memory",
        ),
        (Asked(0, 64), _nodes({"CPU": (0, 4), "memory": (0, 8 * GIB)}), "asks for 64.0 GiB of memory on one node"),
        (
            Asked(8),
            _nodes({"CPU": (0, 4)}, pendingNodes=[1, 2], pendingLaunches={"big": 3}),
            "5 more nodes are being started",
        ),
        (Asked(8), _nodes({"CPU": (0, 4)}, failedNodes=[["n", "big"]]), "1 nodes failed to start"),
        (Asked(1), _nodes({"CPU": (0, 4)}), "the cluster has what it asks for"),
        (Asked(), _nodes({"CPU": (4, 4)}), "the cluster has what it asks for"),
    ],
)
def test_what_a_pending_job_lacks(asked: Asked, status: dict[str, Any], said: str) -> None:
    assert said in lacking(asked, status)


# -- following

FAST = Waits(poll=0.01, pending=0.05, again=0.02, unseen=0.3, unknown=0.1, reopen=0.005, longest=0.02, end=0.5)
LOG = "".join(f"line {number} é\n" for number in range(200)) + "the last, without an end"


def _seen(status: str, code: int | None = None, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "status": status, "driver_exit_code": code, "message": None, "error_type": None, "metadata": {},
            "submission_id": "small-1", "start_time": 1_000, "end_time": 2_000, **more,
        }
    )  # fmt: skip


@dataclass
class FakeHead:
    """A head that answers what it is told to, in turn; its last answer stays. Streams end after so many characters."""

    answers: list[Any]
    log: str = LOG
    cuts: list[int] = field(default_factory=list)
    cluster: dict[str, Any] = field(default_factory=dict)
    url: str = "http://head:8265"
    streams: int = 0
    stopped: list[str] = field(default_factory=list)

    def get_job_info(self, job: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_job_logs(self, job: str) -> str:
        return self.log

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.streams += 1
        end = self.cuts.pop(0) if self.cuts else len(self.log)
        for start in range(0, end, 37):
            yield self.log[start : min(start + 37, end)]
            await asyncio.sleep(0)
        if end < len(self.log):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def cluster_status(self) -> dict[str, Any]:
        return self.cluster

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        return True


def _followed(head: FakeHead, waits: Waits = FAST) -> tuple[Ended, list[str], list[str]]:
    shown: list[str] = []
    told: list[str] = []
    return follow(head, "small-1", shown.append, told.append, waits), shown, told


RUNNING = _seen("RUNNING")


@pytest.mark.parametrize("cuts", [[], [500, 1_200, 30], [0, 0, 0], [1, 2, 3, 4, 5], [len(LOG) - 1] * 3])
def test_every_line_is_shown_once_however_often_the_stream_is_cut(cuts: list[int]) -> None:
    head = FakeHead([RUNNING] * 30 + [_seen("SUCCEEDED", 0)], cuts=list(cuts))
    done, shown, _ = _followed(head)
    assert shown == LOG.split("\n") and done.exit_code == 0
    assert head.streams > len(cuts)


def test_the_end_of_a_log_is_shown_though_its_stream_never_comes() -> None:
    head = FakeHead(
        [RUNNING, _seen("FAILED", 7, error_type="JOB_ENTRYPOINT_COMMAND_ERROR", message="the log again")], cuts=[0] * 99
    )
    done, shown, _ = _followed(head)
    assert shown == LOG.split("\n")
    assert done == Ended("small-1", "FAILED", 7, "")


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (_seen("SUCCEEDED", 0), 0), (_seen("FAILED", 7), 7), (_seen("FAILED", 4), 4), (_seen("FAILED", -9), 137),
        (_seen("FAILED"), 1), (_seen("FAILED", 0), 1), (_seen("STOPPED"), 143), (_seen("STOPPED", 0), 143),
    ],
)  # fmt: skip
def test_exit_codes(seen: Any, code: int) -> None:
    assert ended("small-1", seen).exit_code == code


def test_what_ray_says_of_a_job_that_it_ended_is_told_without_secrets() -> None:
    done = ended("a-1", _seen("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="node lost, token=abcdef"))
    assert done.message == "node lost, token=***"


def test_an_interpreter_that_is_not_there_is_told() -> None:
    done = ended(
        "a-1", _seen("FAILED", 127, error_type="JOB_ENTRYPOINT_COMMAND_ERROR", message="sh: python: not found")
    )
    assert done.exit_code == 127 and "--python" in done.message


def test_a_head_that_goes_and_comes_back_is_no_failure() -> None:
    head = FakeHead([RUNNING, *[Unreachable("no answer")] * 5, RUNNING, _seen("SUCCEEDED", 0)])
    done, shown, told = _followed(head)
    assert done.exit_code == 0 and shown == LOG.split("\n")
    assert "says nothing about the job" in told[0] and "answers again" in told[1] and len(told) == 2


def test_a_head_that_stays_away_is_told_as_such_after_a_while() -> None:
    with pytest.raises(Unreachable, match=r"has not answered for .* it may be running\. Follow it again"):
        _followed(FakeHead([RUNNING, Unreachable("no answer")]))


def test_a_head_that_forgot_the_job_is_asked_again_before_it_is_believed() -> None:
    done, _, _ = _followed(FakeHead([RUNNING, Unknown("?"), Unknown("?"), RUNNING, _seen("SUCCEEDED", 0)]))
    assert done.exit_code == 0
    with pytest.raises(LodesetError, match=r"no longer knows small-1: the head was restarted.*submit again"):
        _followed(FakeHead([RUNNING, Unknown("?")]))


def test_a_job_that_was_never_there_is_said_at_once() -> None:
    with pytest.raises(Unknown, match="has no job small-1"):
        _followed(FakeHead([Unknown("?")]))


def test_it_is_said_once_what_a_pending_job_lacks() -> None:
    pending = _seen("PENDING", metadata={CPUS: "8"})
    head = FakeHead([pending] * 20 + [RUNNING, _seen("SUCCEEDED", 0)], cluster=_nodes({"CPU": (0, 4)}))
    _, _, told = _followed(head)
    assert [line for line in told if "small-1 has not begun for" in line and "largest of 1 has 4 CPU" in line] == told
    assert len(told) == 1


# -- submitting


class Accepting(FakeHead):
    """A head that takes jobs, unless `problems` come first."""

    def __init__(self, *there: Any, problems: tuple[Exception | None, ...] = ()) -> None:
        super().__init__([RUNNING])
        self.there, self.problems, self.taken = list(there), iter(problems), []

    def list_jobs(self) -> list[Any]:
        return self.there

    def submit_job(self, **asked: Any) -> None:
        problem = next(self.problems, None)
        if not isinstance(problem, Taken):
            about = {"submission_id": asked["submission_id"], "metadata": asked["metadata"]}
            self.there.append(_seen("PENDING", **about))
            self.taken.append(asked)
        if problem is not None:
            raise problem


def _submitted(head: Any, path: Path, *overrides: str, **options: Any) -> tuple[str, bool, bool]:
    """What was submitted, without the second that the bundle takes and the pauses."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lodeset.infra.jobs.submit._PAUSE_S", 0.0)
        patched.setattr(bundle, "write", lambda config, to: to.write_text(config.text))
        done = submit(head, resolved(path, overrides), Options(**options), lambda _: None)
    return done.job, done.new, done.same


def test_a_run_is_submitted_once(tmp_path: Path) -> None:
    path, head = _config(tmp_path), Accepting()
    assert _submitted(head, path, asked=Asked(2, 1)) == ("small-1", True, True)
    assert _submitted(head, path) == ("small-1", False, True)
    assert _submitted(head, path, "cluster.k=3") == ("small-1", False, False)
    (asked,) = head.taken
    assert asked["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert (asked["entrypoint_num_cpus"], asked["entrypoint_memory"]) == (2, GIB)
    assert asked["entrypoint"].startswith("python -m lodeset.infra.jobs.arrived lodeset.yaml small-1 && exec ")
    sent = submissions.newest(Store(str(tmp_path / "runs")), "small", None)
    assert sent is not None and (sent[0].job, sent[0].address) == ("small-1", head.url)


def test_status_knows_of_a_job_that_was_submitted_and_has_left_no_news(tmp_path: Path) -> None:
    path, store = _config(tmp_path), Store(str(tmp_path / "runs"))
    _submitted(Accepting(), path)
    found = now(store, "small", None)
    assert found.state == "never run" and "small-1 was submitted to http://head:8265" in found.why
    assert found.next_command(str(path), None) == "lodeset jobs logs small-1 --follow --address http://head:8265"
    assert not now(store, "small", 10).submitted and not now(store, "other", None).submitted
    with attempt(store, {}, lambda _: None, name="small"):
        pass
    assert not now(store, "small", None).submitted  # its news, or that of a later run
    time.sleep(0.01)
    _submitted(Accepting(), path)
    assert "small-2 was submitted" in now(store, "small", None).why


def test_another_store_or_name_is_another_run(tmp_path: Path) -> None:
    path, head = _config(tmp_path), Accepting()
    assert _submitted(head, path) == ("small-1", True, True)
    assert _submitted(head, path, f"store={tmp_path}/other") == ("small-2", True, True)
    assert _submitted(head, path, "name=large") == ("large-1", True, True)


def test_attempts_go_on_after_those_that_ended_and_after_a_restart_of_the_head(tmp_path: Path) -> None:
    path = _config(tmp_path)
    mine = identity(resolved(path))
    head = Accepting(_seen("FAILED", 7, submission_id="small-4", metadata=mine))
    assert _submitted(head, path)[0] == "small-5"
    assert _submitted(Accepting(), path)[0] == "small-6"  # the store knows


def test_a_name_that_another_took_in_between_is_not_an_error(tmp_path: Path) -> None:
    path = _config(tmp_path)
    assert _submitted(Accepting(problems=(Taken("!"),)), path) == ("small-2", True, True)


def test_a_job_whose_answer_was_lost_is_found_again(tmp_path: Path) -> None:
    path, head = _config(tmp_path), Accepting(problems=(Unreachable("lost"),))
    assert _submitted(head, path) == ("small-1", True, True)
    assert len(head.taken) == 1


def test_a_head_that_takes_no_jobs_ends_the_attempts(tmp_path: Path) -> None:
    class Broken(Accepting):
        def submit_job(self, **asked: Any) -> None:
            raise Unreachable("no agent")

    with pytest.raises(Unreachable, match="no agent"):
        _submitted(Broken(), _config(tmp_path))


def test_a_store_that_cannot_be_written_from_here_does_not_stop_a_submission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    head = Accepting()
    assert _submitted(head, _config(tmp_path, store=str(tmp_path / "file" / "runs")))[0] == "small-1"
    assert head.taken[0]["entrypoint"].startswith("python -m lodeset.infra.jobs.arrived lodeset.yaml && exec ")


# -- jobs of a head


def test_jobs_of_others_are_left_out() -> None:
    mine = {NAME: "small", STORE: "/runs", STOP: "9"}
    head = Accepting(
        _seen("SUCCEEDED", 0, metadata=mine),
        _seen("RUNNING", submission_id="small-2", metadata=mine, start_time=3_000, end_time=None),
        _seen("RUNNING", submission_id="raysubmit_x"),
        _seen("RUNNING", submission_id=None, metadata=None),
    )
    found = jobs(head)  # type: ignore[arg-type]
    assert [(job.job, job.status, job.exit_code) for job in found] == [
        ("small-2", "RUNNING", None),
        ("small-1", "SUCCEEDED", 0),
    ]


def test_a_stop_waits_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lodeset.infra.jobs.held._POLL_S", 0.0)
    running = _seen("RUNNING", metadata={STOP: "9"})
    head = FakeHead([running, running, Unreachable("no answer"), _seen("STOPPED")])
    stopped = stop(head, "small-1", lambda _: None)  # type: ignore[arg-type]
    assert stopped is not None and stopped.exit_code == 143
    assert head.stopped == ["small-1"]
    done = FakeHead([_seen("SUCCEEDED", 0)])
    assert stop(done, "small-1", lambda _: None) == Ended("small-1", "SUCCEEDED", 0, "")  # type: ignore[arg-type]
    assert not done.stopped


def test_a_job_that_has_not_begun_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lodeset.infra.jobs.held._POLL_S", 0.0)
    monkeypatch.setattr("lodeset.infra.jobs.held._PENDING_S", 0.01)
    told: list[str] = []
    assert stop(FakeHead([_seen("PENDING")]), "small-1", told.append) is None  # type: ignore[arg-type]
    assert "it will end then, without running" in told[-1]


def test_a_job_that_does_not_stop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lodeset.infra.jobs.held._POLL_S", 0.0)
    monkeypatch.setattr("lodeset.infra.jobs.held._MARGIN_S", 0.05)
    head = FakeHead([_seen("RUNNING", metadata={STOP: "0"})])
    with pytest.raises(LodesetError, match="was told to stop"):
        stop(head, "small-1", lambda _: None)  # type: ignore[arg-type]


# -- addresses and tokens


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "over http or https, not ray"),
        ("anyscale://x", "not anyscale"),
        ("http://", "a host is missing"),
        ("http://user:abcdef@head:8265", "a cluster takes a token"),
        ("http://head:port", "[Pp]ort"),
    ],
)
def test_what_is_no_address(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        Head(address)
    assert "abcdef" not in str(refused.value)


def test_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    _, err = lodeset("jobs", "list", code=2)
    assert "which cluster? Give the dashboard of its head" in err


def test_where_a_token_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the user\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH: cannot read"):
        token()
    (tmp_path / "absent").write_text("of a file")
    found = []
    for text in ("of the environment", ""):
        monkeypatch.setenv("RAY_AUTH_TOKEN", text)
        found.append(token())
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    found.append(token())
    assert [one.text for one in found if one is not None] == ["of the environment", "of a file", "of the user"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token() is None
