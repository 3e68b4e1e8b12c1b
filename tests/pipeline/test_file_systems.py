"""Mounts without hard links, buckets that are not there, drivers that have no credentials: each has one right answer."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lodeset.pipeline.dag import files
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote import retries

NO_LINKS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EACCES]


@pytest.fixture
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("no_links", NO_LINKS, indirect=True)
def test_without_hard_links_a_manifest_has_one_winner_and_is_never_seen_in_half(tmp_path: Path, no_links: None) -> None:
    store, path = Store(str(tmp_path)), tmp_path / "a" / "manifest.json"
    whole = {str(n).encode() * 200_000 for n in range(6)}
    wins, seen, ended = [], set(), threading.Event()

    def put(data: bytes) -> None:
        if store.put_absent("a/manifest.json", data):
            wins.append(data)

    def look() -> None:
        while not ended.is_set():
            if path.exists():
                seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    writers = [threading.Thread(target=put, args=(data,)) for data in whole]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ended.set()
    reader.join()
    assert len(wins) == 1
    assert seen <= {path.read_bytes()} == set(wins)
    assert not store.put_absent("a/manifest.json", b"later")
    assert store.names("a") == ["manifest.json"]


@pytest.mark.parametrize("no_links", [errno.EPERM, errno.EXDEV], indirect=True)
def test_without_hard_links_a_named_file_is_kept_when_it_is_written_again(tmp_path: Path, no_links: None) -> None:
    store = Store(str(tmp_path))
    files = set()
    for _ in range(3):
        with store.writing("a/shard.tar") as sink:
            sink.write(b"bytes")
        files.add((sink.sha256(), (tmp_path / "a/shard.tar").stat().st_ino))
    assert len(files) == 1
    assert store.names("a") == ["shard.tar"]


@pytest.mark.parametrize("no_links", [errno.ENOSYS], indirect=True)
def test_a_name_reserved_by_one_who_died_is_given_to_the_next(
    tmp_path: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ABANDONED_S", 0.2)
    (tmp_path / "manifest.json.reserved").touch()
    started = time.monotonic()
    assert Store(str(tmp_path)).put_absent("manifest.json", b"{}")
    assert 0.2 < time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]


def test_other_errors_of_a_link_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(LodesetError, match="is full"):
        Store(str(tmp_path)).put_absent("a", b"{}")
    assert not list(tmp_path.iterdir())


class NoCredentialsError(Exception):
    """As botocore has it: no OSError."""

    __module__ = "botocore.exceptions"


class Objects(MemoryFileSystem):
    """An object store as s3fs is one: `makedirs` makes buckets, and nothing can be written where there is none."""

    protocol = "objects"
    root_marker = ""
    cachable = False
    buckets: ClassVar[set[str]] = set()
    failure: Exception | None = None
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("objects://").strip("/")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.buckets.add(path.partition("/")[0])

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._reach(path)
        if mode == "create" and path in self.store:
            raise FileExistsError(path)
        self.store[path] = value

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        self._reach(path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return bytes(self.store[path])

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._reach(path)
        return [name for name in self.store if name.startswith(path)]

    def rm_file(self, path: str) -> None:
        del self.store[path]

    def _reach(self, path: str) -> None:
        if self.failure is not None:
            raise self.failure
        if path.partition("/")[0] not in self.buckets:
            raise FileNotFoundError("The specified bucket does not exist")


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Objects]]:
    fsspec.register_implementation("objects", Objects, clobber=True)
    for name, value in (("buckets", {"mine"}), ("store", {}), ("failure", None)):
        monkeypatch.setattr(Objects, name, value)
    yield Objects


def test_a_mistyped_bucket_is_told_and_not_made(objects: type[Objects]) -> None:
    for url in ("objects://mien/runs", "objects://mien"):
        with pytest.raises(LodesetError, match=r"`mien` was found.*lodeset makes no buckets"):
            Store(url).prepare()
    assert objects.buckets == {"mine"}
    store = Store("objects://mine/runs")
    store.prepare()
    assert store.put_absent("a/manifest.json", b"{}") and not store.put_absent("a/manifest.json", b"[]")
    assert objects.store["mine/runs/a/manifest.json"] == b"{}"


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (NoCredentialsError("Unable to locate credentials"), "give credentials that may use it"),
        (PermissionError("Access Denied"), "give credentials that may use it"),
        (ValueError("Invalid endpoint: htp:/x"), "check the network, the address and the endpoint"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "check the network"),
        (TimeoutError(), "check the network"),
        (RuntimeError("secret='abc' is wrong"), "RuntimeError: secret='...' is wrong"),
    ],
)
def test_what_a_driver_raises_is_a_sentence(
    objects: type[Objects], failure: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.failure = failure
    monkeypatch.setenv(retries.PATIENCE, "0")
    store = Store("objects://mine/runs")
    for call in (store.prepare, lambda: store.put_absent("a", b""), lambda: store.read("a"), lambda: store.names("a")):
        with pytest.raises(LodesetError, match="the store objects://mine/runs cannot be reached") as caught:
            call()
        assert told.replace("...", "***") in str(caught.value)


def test_a_driver_that_cannot_be_had_is_told() -> None:
    for url, told in (
        ("gs://u:hidden@bucket/x", "Please install gcsfs"),
        ("foo://u:hidden@bucket/x", "Protocol not known: foo"),
        ("github://x", "org"),
    ):
        with pytest.raises(LodesetError, match=told) as caught:
            Store(url)
        assert "hidden" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_told() -> None:
    with pytest.raises(LodesetError, match=r"/proc/nowhere cannot be made .*choose another `store:`"):
        Store("/proc/nowhere").prepare()
