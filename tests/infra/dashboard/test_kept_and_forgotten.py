"""What was made to look at a run lives as long as the run, and holds nothing of a forgotten image."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from inline import in_one_process
from inspected_world import inspected, make

from lodeset.infra.dashboard.making import found, inspect
from lodeset.infra.session import Opened, open_store
from lodeset.infra.upkeep.forget import forget
from lodeset.infra.upkeep.gc import collect
from lodeset.pipeline.stages.inspect.graph import ABOUT_RUNS


@pytest.fixture
def world(tmp_path: Path) -> Opened:
    return inspected(tmp_path / "world", 120)[0]


def of_the_run(store: Opened) -> list[Path]:
    return [path for stage in ABOUT_RUNS for path in Path(store.store.path(f"parts/{stage}")).rglob("*.parquet")]


def test_it_stays_with_its_run_and_goes_with_it(world: Opened) -> None:
    sums = collect(world.store, {}, older_than=0.0, dry_run=True)
    assert sums.entries == () and of_the_run(world)
    for stage in ABOUT_RUNS:
        assert any(path.startswith(f"parts/{stage}/") for path in _paths(world))
    made = found(world)
    make(world.path.parent, 120, pictures=True, seed=1, part=100)  # another run, of other images
    left = collect(world.store, {}, keep=1, older_than=10**9, dry_run=True)
    gone = {entry.path for entry in left.entries if entry.kind == "dropped run"}
    assert made is not None and {file.path for file in made.artifact.files()} <= gone
    assert any(path.startswith("artifacts/thumbnails/") for path in gone)


def test_a_map_that_is_taken_over_stays_with_the_run_that_shows_it(world: Opened) -> None:
    """It is frozen: made of the vectors of a run that is gone."""
    make(world.path.parent, 120, pictures=True, seed=1, part=100)
    later = open_store(world.path)
    with in_one_process():
        made = inspect(later, lambda event: None)
    assert made.made["fit_map/pool"].fingerprint == found(world, 1).made["fit_map/pool"].fingerprint
    left = collect(world.store, {}, keep=1, older_than=0.0, dry_run=True)
    gone = {entry.path for entry in left.entries}
    needed = {file.path for artifact in made.made.values() for file in artifact.files()}
    assert needed and not needed & gone


def _paths(world: Opened) -> list[str]:
    root = Path(world.store.path(""))
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


def test_a_forgotten_image_is_in_none_of_it(world: Opened) -> None:
    made = found(world)
    assert made is not None
    table = world.store.table(made.artifact.tables["inspected"])
    row = next(r for r in table.to_pylist() if r["group_id"] and r["outcome"] == "near")
    gone = row["image_id"]
    others = [path for path in of_the_run(world) if "thumbnails" in str(path)]
    forget(world.store, [gone], with_copies=False)
    for path in of_the_run(world):
        assert gone.encode() not in pq.read_table(path).to_pandas().to_csv().encode(), path
    assert sum(path.exists() for path in others) == len(others) - 1, "pictures of other parts stay"
    again = open_store(world.path)
    assert found(again) is None
    with in_one_process():
        anew = inspect(again, lambda event: None)
    ids = world.store.table(anew.artifact.tables["inspected"])["image_id"].to_pylist()
    assert gone not in ids and len(ids) == table.num_rows - 1
