"""Imports point one way: infra -> pruning -> training -> pipeline; algorithms import no engine; stages read typed values."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("pipeline", "training", "pruning", "infra")
ENGINES = ("ray", "apache_beam")


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return found


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


@pytest.mark.parametrize("package", ORDER)
def test_nothing_imports_what_stands_above_it(package: str) -> None:
    above = ORDER[ORDER.index(package) + 1 :]
    for file in files(package):
        for module in imported(file):
            assert not module.startswith(tuple(f"lodeset.{one}" for one in above)), (
                f"{file.relative_to(ROOT)} imports {module}"
            )


def test_every_import_names_lodeset() -> None:
    """A short name would find a folder of the user's, or make a second copy of a module."""
    for folder in (*ORDER, "lodeset", "tests", "benchmarks"):
        for file in files(folder):
            short = [module for module in imported(file) if module.split(".")[0] in ORDER]
            assert not short, f"{file.relative_to(ROOT)} imports {', '.join(short)}: write lodeset.{short[0]}"


def test_algorithms_import_no_engine_no_store_and_no_stage() -> None:
    for file in files("pipeline/algorithms"):
        for module in imported(file):
            assert module.split(".")[0] not in ENGINES, f"{file} imports {module}"
            assert not module.startswith(
                ("lodeset.pipeline.dag", "lodeset.pipeline.stages", "lodeset.pipeline.engines")
            ), f"{file} imports {module}"


def test_engines_are_started_in_one_place() -> None:
    """Others may use an engine's types; only `pipeline/engines` (and the doctor, which tests them) starts one."""
    for package in ORDER:
        for file in files(package):
            if file.parent.name != "engines":
                assert "ray.init(" not in file.read_text(), file
                assert "beam.Pipeline(" not in file.read_text(), file


@pytest.mark.parametrize("package", ORDER)
def test_what_a_stage_is_and_how_it_runs_is_read_by_attribute(package: str) -> None:
    """A misspelled key of a mapping is found only when it is read; `pipeline/dag` reads manifests, which are JSON."""
    untyped = re.compile(r"""\b(?:config|speed|details)\[["']""")
    for file in files(package):
        if "pipeline/dag" not in file.as_posix():
            found = [line.strip() for line in file.read_text().splitlines() if untyped.search(line)]
            assert not found, f"{file.relative_to(ROOT)}: {found[0]}"


def at_once(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What runs when a module is imported."""
    for node in nodes:
        yield node
        typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_once(ast.iter_child_nodes(node))


@pytest.mark.parametrize("package", ORDER)
def test_ray_is_imported_where_it_is_used(package: str) -> None:
    """It reads its cluster's token when it is imported, and that is there only once the cluster is.

    `infra/jobs/client.py` is a class of Ray's made safe; so it is imported as Ray is.
    """
    client = "lodeset.infra.jobs.client"
    for file in files(package):
        if file == ROOT / "infra/jobs/client.py":
            continue
        for node in at_once(ast.parse(file.read_text()).body):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "ray" or name == client for name in names), (
                f"{file.relative_to(ROOT)} imports ray at once"
            )
