"""The tutorial runs from top to bottom in a kernel of its own, and shows what it says it shows."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.ipynb"
CELL_SECONDS = 600

pytestmark = pytest.mark.slow


def shown(notebook: Any, last_line: str) -> Any:
    """The value that the cell with this last line shows."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and c.source.splitlines()[-1].startswith(last_line))
    return ast.literal_eval(cell.outputs[-1]["data"]["text/plain"])


def test_the_tutorial_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    notebook = nbformat.read(TUTORIAL, as_version=4)
    committed = nbformat.read(TUTORIAL, as_version=4)
    settings = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=settings).execute()
    assert shown(notebook, "project.plan().to_run") == ()
    images, leaked = shown(notebook, "len(listed)")
    assert images > 0 and leaked == 0
    assert shown(notebook, "len(samples)")[0] == images
    assert shown(notebook, "more.plan().to_run") == ("retrieve/alpha", "retrieve/all", "write_shards/all")
    # What a reader sees who does not run it; other figures depend on the hardware.
    assert shown(committed, "rejects.select") == shown(notebook, "rejects.select")
