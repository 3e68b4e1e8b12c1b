"""The images and the services of `docker/`: no engine builds them here, so everything that can be checked without one is."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfiles import FILES, ROOT, Stage, stages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lodeset.infra.deploy import pods

COMPOSE = ROOT / "docker/compose.yaml"
LOCK = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"
)


def executable(name: str) -> Path:
    """A program that a package brings, in the environment which holds the package."""
    import check_jsonschema

    return Path(check_jsonschema.__file__).parents[4] / "bin" / name


def test_linters_find_nothing() -> None:
    for command in (
        [str(executable("hadolint")), "--failure-threshold", "info", *map(str, FILES.values())],
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_only_what_is_there_and_not_ignored_is_copied(name: str) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored  # everything else stays away from the builder
    build, final = stages(FILES[name])
    copied = [source for text in build.of("COPY") for source in text.split()[:-1]]
    for source in copied:
        plain = source.rstrip("/")
        assert any(file == plain or file.startswith(f"{plain}/") for file in tracked), source
        assert any(fnmatch.fnmatch(plain, one) for one in allowed), source
    assert {source.rstrip("/") for source in copied} == set(allowed)
    assert final.of("COPY") == ["--from=build /usr/local /usr/local"]


@pytest.mark.parametrize("name", FILES)
def test_images_run_as_a_user_without_rights(name: str) -> None:
    final = stages(FILES[name])[-1]
    uid = pods.UID
    assert final.of("USER") == [f"{uid}:{uid}"] and final.instructions[-1][0] == "CMD"
    (made,) = [run for run in final.of("RUN") if "useradd" in run]
    assert f"--gid {uid} lodeset" in made and f"--uid {uid} --gid {uid}" in made and "nologin" in made
    home = next(text for text in final.of("ENV")).split()[0]
    assert home == "HOME=/home/lodeset" and f"--owner {uid} --group {uid} --mode 0700 /home/lodeset" in made
    (entry,) = final.of("ENTRYPOINT")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(entry) == ["lodeset"] and "lodeset" in scripts
    labels = " ".join(final.of("LABEL"))
    for label in ("title", "description", "version", "revision", "licenses", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize("name", FILES)
def test_nothing_secret_is_in_an_image(name: str) -> None:
    text = FILES[name].read_text().lower()
    assert not re.search(r"token|password|secret|credential", text)


def test_versions_are_those_of_the_lock_file() -> None:
    gpu = stages(FILES["gpu"])[0].arguments
    assert gpu["FAISS"] == LOCK["faiss-cpu"]  # one version of FAISS on all nodes
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for file in FILES.values():
        build, final = stages(file)
        assert final.arguments["VERSION"] == version
        assert build.base.startswith("python:3.11-")  # the lock file is for Python 3.11
        installs = [step for run in build.of("RUN") for step in run.split("&&") if "pip install" in step]
        assert len(installs) == 3
        for step in installs:
            assert "--constraint requirements.lock" in step or "--no-deps" in step


def test_the_lock_file_holds_everything_that_is_installed() -> None:
    """Followed through the metadata of the packages, extras included: an install step would take any version of others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (step,) = [run for run in stages(FILES["cpu"])[0].of("RUN") if "dependencies.py" in run]
    extras = step.partition(" > ")[0].split()[2:]
    assert "cpu" in extras
    named = [*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra])]
    locked = {canonicalize_name(name) for name in LOCK}
    waiting, seen = [Requirement(one) for one in named], set[tuple[str, str]]()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        assert name in locked, f"{need} is not in requirements.lock"
        for extra in ("", *need.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                wanted = map(Requirement, requires(name) or ())
                waiting += [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})]
    assert len(seen) > 100


def test_cuda_is_one_release() -> None:
    build, final = stages(FILES["gpu"])
    base = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-base-ubuntu24\.04", final.base)
    assert base is not None
    assert build.arguments["TORCH_INDEX"].endswith(f"/cu{base[1]}{base[2]}")
    assert any(f"torch.version.cuda == '{base[1]}.{base[2]}'" in run for run in final.of("RUN"))


def test_both_images_are_made_in_the_same_way() -> None:
    def common(stage: Stage) -> list[tuple[str, str]]:
        differing = ("torch", "requirements.txt", "pinned.py")
        return [
            (kind, text) for kind, text in stage.instructions if kind != "RUN" or all(d not in text for d in differing)
        ]

    (cpu, _), (gpu, _) = (stages(file) for file in FILES.values())
    assert common(cpu) == common(gpu)


def test_the_check_of_versions_finds_another(tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"

    def checked(text: str, *free: str) -> subprocess.CompletedProcess[str]:
        lock.write_text(text)
        command = [sys.executable, str(ROOT / "docker/pinned.py"), str(lock), *free]
        return subprocess.run(command, capture_output=True, text=True)

    assert checked("# nothing\n", "*").returncode == 0
    wrong = checked("NumPy==0.1\n", "[!n]*", "n[!u]*")
    assert wrong.returncode == 1 and f"numpy {LOCK['numpy']}: 0.1 in {lock}" in wrong.stderr
    assert "numpy" not in checked(f"numpy=={LOCK['numpy']}\n", "[!n]*", "n[!u]*").stderr


def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def test_services_may_do_little() -> None:
    final = stages(FILES["cpu"])[-1]
    for service in services().values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == final.of("USER")[0]
        # What must be writable is a volume: Ray's files, the home folder, the store.
        writable = {volume.split(":")[-1] for volume in service["volumes"] if not volume.endswith(":ro")}
        assert writable == {"/tmp", "/home/lodeset", "/data/store"}
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        environment = service["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in environment
        assert environment["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{service['secrets'][0]}"
    assert "file" in yaml.safe_load(COMPOSE.read_text())["secrets"]["ray_token"]


class Answers(BaseHTTPRequestHandler):
    status, text = 200, b"success"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.text)


@pytest.mark.parametrize(
    ("status", "text", "healthy"), [(200, b"success", True), (200, b"<html>", False), (503, b"Raylet failed", False)]
)
def test_a_service_is_healthy_when_ray_says_so(status: int, text: bytes, healthy: bool) -> None:
    handler = type("Handler", (Answers,), {"status": status, "text": text})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for service in services().values():
            kind, _, *arguments = service["healthcheck"]["test"]
            assert kind == "CMD"
            code = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{server.server_port}", arguments[-1])
            done = subprocess.run([sys.executable, arguments[0], code], capture_output=True)
            assert (done.returncode == 0) == healthy
        server.shutdown()
