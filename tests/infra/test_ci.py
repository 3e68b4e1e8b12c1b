"""The check of a changed configuration: its script does what it says, and linters find nothing in it and in the workflow."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import check_jsonschema
import pytest
import yaml
from builders import picture, write_folder
from commands import lodeset

TESTS = Path(__file__).parent.parent
FOLDER = TESTS.parent / "infra/ci"
SCRIPT, WORKFLOW = FOLDER / "check.sh", FOLDER / "github.yml"


def executable(name: str) -> str:
    """A program that a package brings, in the environment which holds the packages of the tests."""
    return str(Path(check_jsonschema.__file__).parents[4] / "bin" / name)


def lint(*command: str, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_linters_find_nothing() -> None:
    lint(executable("shellcheck"), str(SCRIPT))
    lint(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW))
    lint(executable("zizmor"), "--offline", "--no-progress", "--persona=auditor", str(WORKFLOW))
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    blocks = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for block in blocks:
        lint(executable("shellcheck"), "--shell=bash", "-", given=block)
    assert any("check.sh" in block for block in blocks)


def test_the_workflow_gives_each_job_what_it_needs() -> None:
    """What runs the pull request can write nothing; what can write runs nothing of it, and takes no text of it as code."""
    workflow = yaml.safe_load(WORKFLOW.read_text())
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {}
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "check": {"contents": "read"},
        "comment": {"pull-requests": "write"},
    }
    assert not [step for step in jobs["comment"]["steps"] if "uses" in step or "check.sh" in step["run"]]
    for job in jobs.values():
        assert job["timeout-minutes"] <= 60
        assert not [step for step in job["steps"] if "${{" in step.get("run", "")]


def run(config: Path, command: str, **environment: str) -> tuple[int, str, Path]:
    """Exit status and summary of the script, and its folder."""
    out, summary = config.parent / "out", config.parent / "step-summary.md"
    set_ = {"LODESET": command, "LODESET_OUT": str(out), "GITHUB_STEP_SUMMARY": str(summary), **environment}
    done = subprocess.run(
        [str(SCRIPT), str(config)],
        env={**os.environ, "PYTHONPATH": str(TESTS), **set_},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    told = (out / "summary.md").read_text() if (out / "summary.md").exists() else done.stderr
    if summary.exists():
        assert summary.read_text().endswith(told)
    return done.returncode, told, out


def test_a_sample_is_run_and_compared(tmp_path: Path, one_process: None) -> None:
    write_folder(tmp_path / "pool", [(f"{n:02}.png", picture(n, width=64, height=64)) for n in range(16)])
    config, store = tmp_path / "c.yaml", tmp_path / "store"
    tree = {
        "store": "s3://not-used/here",
        "pool": ["pool/"],
        "dedup": {"threshold": 0.99, "reference_threshold": 0.99, "verify": "none"},
        "cluster": {"k": 2},
        "embed": {"semantic": {"kind": "patch_dictionary", "words": 8}},
        "gates": [{"name": "enough", "measure": "kept", "error": "< 0.9 of accepted"}],
    }
    config.write_text(yaml.safe_dump(tree))
    sample = (config, "--limit", "12", "--set", f"store={store}")
    lodeset("run", *sample)
    lodeset("accept", *sample)
    # A change that loses images is found, and is not accepted.
    write_folder(tmp_path / "more", [(f"{n:02}.png", picture(100 + n, width=80, height=80)) for n in range(8)])
    config.write_text(yaml.safe_dump({**tree, "filter": {"min_side": 65}, "pool": ["pool/", "more/"]}))
    command = f"{sys.executable} {TESTS / 'inline_command.py'}"
    code, told, out = run(config, command, LODESET_STORE=str(store), LODESET_LIMIT="12", LODESET_ACCEPT="1")
    assert code == 3 and told.startswith("# lodeset: a gate was breached\n"), told
    assert "❌ error | enough | kept |" in told and "run 2 against run 1, the accepted one" in told
    assert "filter/pool" in (out / "plan.txt").read_text() and "filter/pool" in told
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert [suite.get("failures") for suite in ET.parse(out / "gates.xml").getroot()] == ["1"]
    assert len(list((store / "accepted").iterdir())) == 1


STUB = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
echo '~~~ of a plan'
case $1 in
  plan) exit "${PLAN:-0}" ;;
  run) exit "${RUN:-0}" ;;
  gates) [[ ${GATES:-0} == 2 ]] || echo '## Gates of run 1' >"$LODESET_OUT/gates.md"; exit "${GATES:-0}" ;;
esac
"""


@pytest.mark.parametrize(
    ("codes", "code", "title", "commands"),
    [
        ({}, 0, "a sample of 1000 images is as it should be", "plan run gates report"),
        ({"LODESET_ACCEPT": "1"}, 0, "a sample of 1000 images is as it should be", "plan run gates report accept"),
        ({"PLAN": "2"}, 2, "the plan failed", "plan"),
        ({"RUN": "1"}, 1, "the run of a sample of 1000 images failed", "plan run"),
        ({"RUN": "4"}, 4, "another run holds the store, or a rollback does", "plan run"),
        ({"RUN": "3", "GATES": "3", "LODESET_ACCEPT": "1"}, 3, "a gate was breached", "plan run gates report"),
        ({"RUN": "3", "GATES": "1"}, 3, "a gate was breached", "plan run gates report"),
        ({"GATES": "1", "LODESET_ACCEPT": "1"}, 1, "the gates could not be compared", "plan run gates report"),
        ({"GATES": "2"}, 0, "a sample of 1000 images is as it should be", "plan run gates report"),
    ],
)
def test_the_status_is_that_of_what_failed(
    tmp_path: Path, codes: dict[str, str], code: int, title: str, commands: str
) -> None:
    stub, log, config = tmp_path / "stub", tmp_path / "log", tmp_path / "with space.yaml"
    stub.write_text(STUB)
    stub.chmod(0o755)
    got, told, _ = run(config, str(stub), LOG=str(log), **codes)
    assert got == code and told.startswith(f"# lodeset: {title}\n"), told
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == commands.split()
    assert all(str(config) in line for line in lines)
    assert all("--limit 1000" in line for line in lines[1:]) and "--limit" not in lines[0]
    if codes.get("GATES") == "2" or (code in (1, 2, 4) and "GATES" not in codes):
        assert "No gates were compared." in told
    # Nothing of a plan ends the fence around it.
    assert "\n ~~~ of a plan\n" in told


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: check.sh CONFIG" in done.stderr
    assert done.stdout == ""
