"""A dashboard that is open while images or runs are deleted shows none of them, and what is made again is read again."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
from dashboard_client import browsing
from inline import in_one_process
from inspected_world import inspected

from lodeset.infra.dashboard import chosen, vectors
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.groups import groups
from lodeset.infra.dashboard.making import inspect
from lodeset.infra.dashboard.pages import pictures
from lodeset.infra.session import Opened, open_store
from lodeset.infra.upkeep.forget import forget
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.errors import LodesetError


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "CHECK_S", 0.0)
    monkeypatch.setattr(pictures, "LIST_S", 0.0)


def test_pictures_of_forgotten_images_are_refused_and_pages_say_what_makes_them_again(tmp_path: Path) -> None:
    store, made = inspected(tmp_path, 120)
    with opened(store.store, made) as data, browsing(store, data) as client:
        gone, stays = (
            row["image_id"] for row in data.rows("SELECT image_id FROM inspected WHERE set = 'pool' LIMIT 2")
        )
        tags = {}
        for path in (f"/thumb/{gone}.webp", f"/picture/{gone}.webp", f"/thumb/{stays}.webp"):
            answer = client.get(path)
            tags[path] = {"If-None-Match": answer.headers["etag"]}
            assert answer.status_code == 200 and answer.headers["cache-control"] == "private, no-cache"
            assert client.get(path, headers=tags[path]).status_code == 304
        assert client.get("/images").status_code == 200
        forget(Store(store.store.url), [gone], with_copies=False)  # as another process does
        for path in ("/images", f"/image/{stays}", "/export?format=csv", "/export?format=ids", "/map"):
            answer = client.get(path)
            assert answer.status_code == 503, path
            assert f"lodeset inspect {store.path} --run 1 --make-only" in answer.text
        again = open_store(store.path)
        with in_one_process():
            inspect(again, lambda event: None)
        assert client.get("/images").status_code == 200
        assert gone not in client.get("/export?format=ids").text and stays in client.get("/export?format=ids").text
        for path, tag in tags.items():
            assert client.get(path, headers=tag).status_code == (304 if stays in path else 410)
            assert client.get(path).status_code == (200 if stays in path else 410)


@pytest.mark.parametrize("path", ["/images", "/export?format=csv", "/export?format=ids"])
def test_a_file_that_goes_while_it_is_read_is_no_defect(tmp_path: Path, path: str) -> None:
    store, made = inspected(tmp_path, 60)
    with opened(store.store, made) as data, browsing(store, data) as client:
        for file in made.artifact.tables["inspected"] + made.artifact.tables["by_cluster"]:
            Path(store.store.path(file.path)).unlink()
        answer = client.get(path)
        assert answer.status_code == 503 and "--make-only" in answer.text


@pytest.fixture
def remote(tmp_path: Path) -> Opened:
    """A store that counts as one elsewhere, so that files are copied."""
    store, _ = inspected(tmp_path, 60)
    store.store.local = False
    return store


def _data(store: Opened) -> Data:
    made = chosen.found(store, 1)
    assert made is not None
    return Data(store.store, made)


def test_runs_that_nobody_reads_any_longer_leave_nothing(remote: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "OPEN", 1)
    monkeypatch.setattr(chosen, "_open", lambda store, number, gone: _data(store))
    runs = chosen.Opened(None)
    data = runs.get(remote, 1)
    data.warm()
    assert data.thumbnail(0, 0) and groups(data) and vectors.vectors_of(data, 30.0).width
    folders = [data._folder, data._scratch]
    seen = weakref.ref(data)
    runs.get(remote, 2)
    gc.collect()
    assert all(folder.is_dir() for folder in folders) and data.rows("SELECT 1 AS one FROM inspected LIMIT 1")
    del data
    gc.collect()
    assert seen() is None and not any(folder.exists() for folder in folders)


def test_a_file_is_fetched_once_and_is_whole_before_anybody_reads_it(
    remote: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(remote)
    file = data.inspected.made["thumbnails/all"].tables["thumbnails"][0]
    begun, go, fetched = threading.Event(), threading.Event(), []
    fetch = Store.fetch

    def slow(store: Store, file: File, to: Path) -> None:
        fetched.append(to)
        to.write_bytes(b"half")
        begun.set()
        assert go.wait(30)
        fetch(store, file, to)

    monkeypatch.setattr(Store, "fetch", slow)
    sizes: list[int] = []
    readers = [threading.Thread(target=lambda: sizes.append(data.path_of(file).stat().st_size)) for _ in range(3)]
    for one in readers:
        one.start()
    assert begun.wait(30)
    assert not sizes and not (data._folder / file.path).exists()
    go.set()
    for one in readers:
        one.join(30)
    assert sizes == [file.size_bytes] * 3 and len(fetched) == 1


def test_another_run_is_read_while_the_files_of_one_are_fetched(
    remote: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(store: Opened, number: int, gone: bool) -> Data:
        if number == 7:
            begun.set()
            assert go.wait(30)
        return _data(store)

    monkeypatch.setattr(chosen, "_open", slow)
    runs = chosen.Opened(None)
    waits = threading.Thread(target=runs.get, args=(remote, 7))
    waits.start()
    try:
        assert begun.wait(30) and runs.get(remote, 1).details.images
    finally:
        go.set()
        waits.join(30)


def test_vectors_that_could_not_be_read_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = inspected(tmp_path, 60)
    with opened(store.store, made) as data:
        with monkeypatch.context() as broken:

            def fails(*_: object) -> None:
                raise LodesetError("the store cannot be reached")

            broken.setattr(vectors, "read_vectors", fails)
            with pytest.raises(LodesetError, match="cannot be reached"):
                vectors.vectors_of(data, 30.0)
        found = vectors.vectors_of(data, 30.0)
        assert found.width and vectors.vectors_of(data) is found
