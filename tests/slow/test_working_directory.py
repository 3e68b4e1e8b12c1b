"""A user's working directory may hold folders and files that bear our names: runs do not import them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from builders import picture, write_folder

pytestmark = pytest.mark.slow  # runs of an engine each

ROOT = Path(__file__).parents[2]
FOLDERS = ("pipeline", "training", "pruning", "infra")
LOADED = "raise RuntimeError('the user\\'s own module was imported')\n"
# The packages that lodeset needs, without lodeset.
INSTALLED = sysconfig.get_path("purelib")


def hostile(folder: Path, *, file: bool = True) -> Path:
    """A working directory with everything that could be taken for a part of lodeset, a configuration and some images."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        for module in ("__init__", "config", "graph", "errors"):
            (folder / name / f"{module}.py").write_text(LOADED)
    if file:
        (folder / "lodeset.py").write_text(LOADED)
    write_folder(folder / "images", [(f"{n}.png", picture(n)) for n in range(12)])
    words = "embed: {semantic: {kind: patch_dictionary, words: 8}}"
    (folder / "c.yaml").write_text(f"store: ./store\npool: [images/]\n{words}\nresources: {{cpus: 2}}\n")
    return folder


def ran(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(told: str) -> None:
    entries = {f"{entry['stage']}/{entry['set']}": entry for entry in json.loads(told)["artifacts"]}
    assert entries["embed/pool"]["rows"] == {"in": 12, "kept": 12, "dropped": {}}


RUN = ("run", "c.yaml", "--until", "embed", "--json")


def test_an_editable_install(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lodeset")
    check(ran([str(script), *RUN], hostile(tmp_path / "here")))


def test_a_wheel_brings_one_package_that_runs_anywhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*FOLDERS, "lodeset"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    ran([*pip, str(tmp_path / "wheels"), str(source)], tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lodeset"}
    assert {"lodeset/py.typed", "lodeset/infra/report/style.css", "lodeset/pipeline/graph.py"} <= set(names)
    # Its packages are found by a path, as in any virtual environment; the editable one is not.
    start = (
        f"import sys; sys.path[:] = [{str(tmp_path / 'site')!r}, *(p for p in sys.path if p)]; "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        f"import lodeset; assert lodeset.__file__.startswith({str(tmp_path / 'site')!r}); "
        "sys.argv[0] = 'lodeset'; from lodeset.__main__ import main; main()"
    )
    check(ran([sys.executable, "-P", "-c", start, *RUN], hostile(tmp_path / "here")))


def test_python_m_lodeset(tmp_path: Path) -> None:
    """`python -m` runs a `lodeset.py` that lies here: that is what it is for. Folders of our names change nothing."""
    check(ran([sys.executable, "-m", "lodeset", *RUN], hostile(tmp_path / "here", file=False)))


def test_a_notebook(tmp_path: Path) -> None:
    """A kernel has the folder of its notebook on its import path."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    folder = hostile(tmp_path / "here", file=False)
    cell = (
        "import lodeset\nproject = lodeset.load('c.yaml')\nproject.run(until='embed')\n"
        "print(project.status()['embed/pool']['rows'])\nproject.plan()"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    outputs = notebook.cells[0].outputs
    assert any("'kept': 12" in output.get("text", "") for output in outputs)
    assert any("<table>" in output.get("data", {}).get("text/html", "") for output in outputs)
