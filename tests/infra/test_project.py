"""The Python interface: what a notebook or a scheduler calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from builders import picture, write_folder
from PIL import Image

import lodeset

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # webdataset leaves shards open
]
COUNT = 24


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> lodeset.Project:
    """A finished run over some images, one of them twice."""
    folder = tmp_path_factory.mktemp("project")
    write_folder(folder / "pool", [(f"{n:02}.png", picture(n, width=96, height=96)) for n in range(COUNT)])
    (folder / "pool/twin.png").write_bytes((folder / "pool/00.png").read_bytes())
    (folder / "lodeset.yaml").write_text(
        "store: ./runs\npool: [pool/]\ndedup: {threshold: 0.99, reference_threshold: 0.99}\n"
    )
    project = lodeset.load(
        folder / "lodeset.yaml", overrides={"cluster.k": 2, "embed.semantic": {"kind": "patch_dictionary", "words": 16}}
    )
    events: list[str] = []
    plan = project.plan()
    assert "ingest/pool" in plan.to_run and "ingest/pool" in repr(plan) and "<td>ingest/pool</td>" in plan._repr_html_()
    status = project.run(watch=lambda event: events.append(event.kind))
    assert {"started", "done"} <= set(events)
    assert status.summary.run == 1 and "exact_duplicate 1" in repr(status) and "run 1" in status._repr_html_()
    return project


def test_a_second_plan_has_nothing_to_run(project: lodeset.Project) -> None:
    assert project.plan().to_run == ()
    assert str(COUNT) in repr(project.status()) and "lodeset.yaml" in repr(project)


def test_tables_are_arrow(project: lodeset.Project) -> None:
    assert project.tables()["images"] == ["ingest/pool"]
    images = project.table("images")
    assert images.num_rows == COUNT and "thumbnail" in images.column_names
    assert project.table("duplicates", where={"reason": "near"}).num_rows < COUNT
    with pytest.raises(lodeset.LodesetError, match="no table nothing in this run; its tables are:"):
        project.table("nothing")


def test_shards_are_a_list_for_webdataset(project: lodeset.Project) -> None:
    dataset = project.dataset()
    assert f"{dataset.images:,} images" in repr(dataset)
    keys = [sample["__key__"] for sample in webdataset.WebDataset(list(dataset), shardshuffle=False)]
    assert sorted(keys) == sorted(project.table("index")["image_id"].to_pylist()) and len(keys) == dataset.images


def test_neighbors_by_id_path_and_pixels(project: lodeset.Project) -> None:
    """The most similar image of each is the one that a plain product of all vectors finds."""
    vectors = project.table("vectors")
    ids, matrix = vectors["image_id"].to_pylist(), np.stack(vectors["vector"].to_pylist()).astype(np.float32)
    at = ids.index(
        project.table("locations", where={"uri": str(project.path.parent / "pool/05.png")})["image_id"][0].as_py()
    )
    products = matrix @ matrix[at]
    expected = [ids[n] for n in sorted(range(len(ids)), key=lambda n: (-products[n], ids[n])) if n != at][:3]
    assert project.neighbors(ids[at][:12], k=3)["image_id"].to_pylist() == expected
    assert project.neighbors(project.path.parent / "pool/05.png", k=3)["image_id"].to_pylist() == expected
    found = project.neighbors(Image.open(project.path.parent / "pool/05.png"), k=4)
    assert found["image_id"].to_pylist() == [ids[at], *expected] and found["similarity"][0].as_py() == pytest.approx(
        1, abs=1e-2
    )
    with pytest.raises(lodeset.LodesetError, match="neither an image of the last run nor a file that can be read"):
        project.neighbors("nowhere.png")


def test_neighbors_of_known_images_need_no_sources(project: lodeset.Project) -> None:
    image_id = project.table("vectors")["image_id"][0].as_py()
    expected, pool = project.neighbors(image_id, k=3), project.path.parent / "pool"
    pool.rename(pool.with_name("away"))
    try:
        assert project.neighbors(image_id, k=3) == expected
        with pytest.raises(lodeset.LodesetError, match="a new image cannot be embedded: "):
            project.neighbors(Image.new("RGB", (64, 64)))
    finally:
        pool.with_name("away").rename(pool)


def test_trace_and_report(project: lodeset.Project, tmp_path: Path) -> None:
    told = project.trace(str(project.path.parent / "pool/03.png"))
    assert told.image_id and told.steps
    page = project.report(tmp_path / "page.html")
    assert page.read_text().startswith("<!doctype html>")


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(lodeset.LodesetError, match=r"no configuration|not there|No such file|cannot be read"):
        lodeset.load(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_text("store: ./runs\npool: [pool/]\n")
    with pytest.raises(lodeset.LodesetError, match=r"cluster\.q.*unknown key"):
        lodeset.load(tmp_path / "c.yaml", overrides=["cluster.q=1"])
    with pytest.raises(lodeset.LodesetError, match="pool"):
        lodeset.load(tmp_path / "c.yaml").plan()


def test_the_package_loads_nothing_heavy() -> None:
    heavy = "import sys, lodeset; print([m for m in ('torch', 'ray', 'apache_beam', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
