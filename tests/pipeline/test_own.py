"""What lodeset made itself is never a source."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from builders import picture, write_folder, write_tar

from lodeset.pipeline import own
from lodeset.pipeline.config import Source
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.listing import expand


def names(*uris: object, left_out: list[str] | None = None) -> list[str]:
    return [f.relative for f in expand([Source(uri=str(uri)) for uri in uris], "pool", left_out)]


def store_at(url: str) -> Store:
    """A store as a run leaves it, as far as a listing can tell."""
    store = Store(url)
    store.prepare()
    for stage in ("ingest", "embed"):
        store.commit_part(stage, "k", {"t": pa.table({"a": [1]})})
        store.put_absent(f"artifacts/{stage}/pool/f/manifest.json", b"{}")
    store.put_absent("shards/x/shard-000000.tar", b"x" * 2_000)
    return store


def test_a_store_below_a_source_is_left_out_and_told(tmp_path: Path) -> None:
    write_folder(tmp_path, [("1.png", picture(1)), ("a/2.png", picture(2))])
    before = names(tmp_path)
    store_at(str(tmp_path / "runs"))
    store_at(str(tmp_path / "a" / "deep" / "other"))
    left_out: list[str] = []
    assert names(tmp_path, left_out=left_out) == before == ["1.png", "a/2.png"]
    assert left_out == [str(tmp_path / "runs"), str(tmp_path / "a/deep/other")]
    assert names(tmp_path / "**" / "*.png") == ["1.png", "2.png"]


def test_shards_that_were_copied_without_their_store_are_known_by_what_lies_beside_them(tmp_path: Path) -> None:
    pool = write_folder(tmp_path / "pool", [("1.png", picture(1)), ("mine/index.parquet", b"x"), ("mine/a.tar", b"x")])
    for name in ("shard-000000.tar", "index.parquet", "tombstones.parquet", "changes.parquet"):
        write_folder(pool / "given" / "v1", [(name, b"x")])
    assert names(pool) == ["1.png", "mine/a.tar", "mine/index.parquet"]
    with pytest.raises(LodesetError, match="was made by lodeset"):
        names(pool / "given" / "v1" / "shard-000000.tar")
    remote = fsspec.filesystem("memory")
    for path in pool.rglob("*.*"):
        if path.is_file():
            remote.pipe_file(f"/copied/{path.relative_to(pool)}", b"x")
    assert names("memory://copied") == ["1.png", "mine/a.tar", "mine/index.parquet"]


def test_a_copied_moved_or_linked_store_is_still_one(tmp_path: Path) -> None:
    store_at(str(tmp_path / "runs"))
    pool = write_folder(tmp_path / "pool", [("1.png", picture(1))])
    shutil.copytree(tmp_path / "runs", pool / "copy")
    shutil.copytree(tmp_path / "runs", pool / "unmarked", ignore=shutil.ignore_patterns(own.MARK))
    shutil.copytree(tmp_path / "runs" / "shards", pool / "beside" / "shards")
    (pool / "link").symlink_to(tmp_path / "runs" / "shards")
    (pool / "shard.tar").symlink_to(tmp_path / "runs" / "shards" / "x" / "shard-000000.tar")
    assert names(pool) == ["1.png", "beside/shards/x/shard-000000.tar"], "shards without a mark are anybody's"
    (tmp_path / "runs").rename(pool / "moved")
    assert "moved/shards/x/shard-000000.tar" not in names(pool)


@pytest.mark.parametrize(
    "uri", ["runs", "runs/shards", "runs/shards/x/shard-000000.tar", "runs/shards/*/*.tar", "link/x"]
)
def test_a_source_inside_a_store_is_refused(tmp_path: Path, uri: str) -> None:
    store_at(str(tmp_path / "runs"))
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "shards")
    with pytest.raises(LodesetError, match=r"made by lodeset .*runs.*index.parquet"):
        names(tmp_path / uri)


def test_images_beside_a_store_s_own_folders_are_sources(tmp_path: Path) -> None:
    """`store: .` in a folder that holds images: only what the store made is left out."""
    write_folder(tmp_path / "d", [("images/1.png", picture(1)), ("2.png", picture(2))])
    store_at(str(tmp_path / "d"))
    assert names(tmp_path) == ["d/2.png", "d/images/1.png"]
    assert names(tmp_path / "d" / "images") == ["1.png"]
    with pytest.raises(LodesetError, match="made by lodeset"):
        names(tmp_path / "d" / "shards")
    (tmp_path / "d" / own.MARK).unlink()
    assert names(tmp_path) == ["d/2.png", "d/images/1.png"]


def test_the_store_s_folder_is_no_set(tmp_path: Path) -> None:
    from lodeset.infra.config import read
    from lodeset.pipeline.errors import ConfigError
    from lodeset.pipeline.graph import build

    write_folder(tmp_path, [("1.png", picture(1))])
    (tmp_path / "c.yaml").write_text("store: .\npool: .\n")
    with pytest.raises(ConfigError, match="one folder"):
        build(read(tmp_path / "c.yaml"))


def test_what_runs_and_the_demo_leave_is_left_out(tmp_path: Path) -> None:
    pool = write_folder(tmp_path / "pool", [("1.png", picture(1))])
    own.mark(pool / "trained", "run")
    own.mark(pool / "model", "model")
    write_folder(pool / "world", [("pool/9.png", picture(9))])
    own.mark(pool / "world", "demo", filled=True)
    for folder in ("trained/index", "model"):
        write_tar(pool / folder / "a.tar", [])
    (pool / "report.HTML").write_text(f"<!doctype html><head>{own.PAGE}</head>")
    (pool / "page.html").write_text("<!doctype html><head></head>")
    assert names(pool) == ["1.png", "page.html"]
    assert names(pool / "world" / "pool") == ["9.png"], "the sample world's own configuration names it"
    for uri in ("trained", "trained/index", "model/a.tar", "report.HTML", "world"):
        with pytest.raises(LodesetError, match="made by lodeset"):
            names(pool / uri)


def test_a_folder_with_other_things_in_it_is_not_marked(tmp_path: Path) -> None:
    write_folder(tmp_path, [("1.png", picture(1))])
    own.mark(tmp_path, "run")
    assert names(tmp_path) == ["1.png"]


def test_pages_carry_the_mark() -> None:
    from importlib import resources

    pages = [
        p
        for p in resources.files("lodeset.infra.report").iterdir()
        if p.name.endswith(".jinja") and "<head>" in p.read_text()
    ]
    assert len(pages) >= 3
    assert all(own.PAGE in page.read_text() for page in pages)


def test_stores_on_other_file_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        for name in ("1.png", "a/2.png"):
            memory.pipe_file(f"/own-test/{name}", picture(1))
        store_at("memory://own-test/runs")
        store_at("memory://own-test/a/old").delete(own.MARK)
        assert names("memory://own-test") == ["1.png", "a/2.png"]
        for uri in ("memory://own-test/runs/shards", "memory://own-test/runs/shards/x/*.tar"):
            with pytest.raises(LodesetError, match="made by lodeset"):
                names(uri)
    finally:
        memory.rm("/own-test", recursive=True)


def test_all_that_a_store_holds_is_known_as_its_own(tmp_path: Path) -> None:
    """A folder that a later version puts beside these must be named, or a shared folder's listing would take it in."""
    from lodeset.infra.looking.summary import CARDS, REPORTS
    from lodeset.pipeline.dag.store import DAMAGED, RUNS
    from lodeset.pipeline.stages import standing
    from lodeset.pipeline.tables import forgotten
    from lodeset.training.stages.train import folder_of

    used = {"parts", "artifacts", "claims", "logs", REPORTS, CARDS, DAMAGED, RUNS, forgotten.FOLDER, standing.ROOT}
    assert used <= set(own.FOLDERS)
    assert folder_of(Store(str(tmp_path)), "f" * 64).relative_to(tmp_path).parts[0] in own.FOLDERS
