import errno
import gc
import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.file_system import Remote

TABLE = pa.table({"x": [1, 2, 3]})


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    made = Store(url)
    made.prepare()
    return made


def test_put_absent_has_one_winner(store: Store) -> None:
    wins = []
    barrier = threading.Barrier(8)

    def put(number: int) -> None:
        barrier.wait()
        if store.put_absent("a/manifest.json", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=put, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if store.local:
        assert len(wins) == 1
    assert store.read("a/manifest.json") in [str(n).encode() for n in wins]
    assert not store.put_absent("a/manifest.json", b"later")
    assert store.names("a") == ["manifest.json"]


def test_first_part_wins_and_leaves_no_other_files(store: Store) -> None:
    first = store.commit_part("embed", "k", {"vectors": TABLE}, {"images": 3})
    second = store.commit_part("embed", "k", {"vectors": TABLE.slice(1)}, {"images": 2})
    assert second == first
    assert store.table([first.files["vectors"]]).equals(TABLE)
    assert len(store.names("parts/embed/k")) == 2
    assert set(store.committed("embed", ["k", "other"])) == {"k"}


def test_a_late_attempt_takes_nothing_from_the_winner(store: Store) -> None:
    shard = store.write_named("shards/f/shard-0.parquet", TABLE)
    first = store.commit_part("write_shards", "k", {"entries": TABLE}, files={"shard": shard})
    again = store.write_named("shards/f/shard-0.parquet", TABLE)
    assert store.commit_part("write_shards", "k", {"entries": TABLE}, files={"shard": again}) == first
    assert store.names("shards/f") == ["shard-0.parquet"]
    assert store.table([first.files["shard"]]).equals(TABLE)


def test_an_attempt_that_died_is_not_seen(store: Store) -> None:
    store.write_named("parts/embed/k/dead-vectors.parquet", TABLE)
    assert store.part("embed", "k") is None
    assert store.committed("embed", ["k"]) == {}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="half"), store.writing("a/b.tar") as sink:
        sink.write(b"some")
        raise ValueError("half way")
    assert store.names("a") == []


def test_a_named_file_is_kept_when_it_is_written_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for _ in range(2):
        with store.writing("a/shard.tar") as sink:
            sink.write(b"bytes")
    inode = (tmp_path / "a/shard.tar").stat().st_ino
    with store.writing("a/shard.tar") as sink:
        sink.write(b"bytes")
    assert (tmp_path / "a/shard.tar").stat().st_ino == inode
    assert store.names("a") == ["shard.tar"]


class Bucket(AbstractFileSystem):
    """An object store: a file is there once it is closed."""

    protocol = "bucket"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "type": "file", "size": len(self.objects[path])}

    def _open(self, path: str, mode: str = "rb", **_: object) -> "BucketFile":
        return BucketFile(self, path, mode)


class BucketFile(AbstractBufferedFile):
    def _initiate_upload(self) -> None:
        pass

    def _upload_chunk(self, final: bool = False) -> bool:
        if final:
            self.fs.objects[self.path] = self.buffer.getvalue()
        return final


def test_an_object_store_never_gets_half_a_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.fs, store.local = Remote(Bucket()), False
    with pytest.raises(ZeroDivisionError), store.writing("a/half.tar") as sink:
        sink.write(b"half")
        raise ZeroDivisionError
    gc.collect()
    assert store.fs.objects == {}
    with store.writing("a/whole.tar") as sink:
        sink.write(b"whole")
    assert list(store.fs.objects.values()) == [b"whole"]


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "gs://bucket/x"])
def test_a_store_that_no_driver_opens(url: str) -> None:
    with pytest.raises(LodesetError, match=r"cannot be opened: .*choose another `store:`"):
        Store(url)


def test_artifacts_round_trip(store: Store) -> None:
    part = store.commit_part("dedup", "k", {"duplicates": TABLE})
    artifact = Artifact(
        "dedup",
        "pool",
        1,
        "f" * 64,
        {"k": 64},
        {},
        {"duplicates": (part.files["duplicates"],)},
        Rows(3, 2, {"near": 1}),
    )
    assert store.commit_artifact(artifact) == artifact
    assert store.artifact("dedup", "pool", "f" * 64) == artifact
    assert store.history("dedup", "pool") == [artifact]
    assert store.artifact("dedup", "pool", "0" * 64) is None


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "is full"),
        (errno.EROFS, "cannot be read or written"),
        (errno.EACCES, "cannot be read or written"),
    ],
)
def test_what_a_file_system_says_becomes_what_a_user_can_do(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, "system words")

    monkeypatch.setattr(store.fs, "makedirs", fail)
    with pytest.raises(LodesetError, match=told):
        store.commit_part("embed", "k", {"vectors": TABLE})
    with pytest.raises(LodesetError, match=told):
        store.put_absent("x", b"")


def test_a_store_that_goes_away_while_it_is_written_is_one_sentence(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.prepare()
    with pytest.raises(LodesetError, match="moved, unmounted or cleaned up while parts/x/file was written"):  # noqa: SIM117
        with store.writing("parts/x/file") as sink:
            sink.write(b"half")
            (tmp_path / "store").rename(tmp_path / "elsewhere")
    with (
        pytest.raises(FileNotFoundError),
        store.writing("parts/x/other") as sink,
    ):  # of something else: not the store's fault
        (tmp_path / "no such source").read_bytes()


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LodesetError, match="not a folder"):
        Store(str(tmp_path / "file")).prepare()


def test_damage_is_told(store: Store) -> None:
    part = store.commit_part("embed", "k", {"vectors": TABLE})
    store.fs.pipe_file(store.path(part.files["vectors"].path), b"not parquet")
    with pytest.raises(LodesetError, match="damaged"):
        store.table([part.files["vectors"]])
    store.delete(part.files["vectors"].path)
    with pytest.raises(LodesetError, match="missing"):
        store.table([part.files["vectors"]])
    store.put_absent("artifacts/x/y/z/manifest.json", json.dumps({})[:1].encode())
    with pytest.raises(LodesetError, match="damaged"):
        store.artifact("x", "y", "z")


def test_a_named_file_that_was_damaged_gives_way(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.writing("a/shard.tar") as sink:
        sink.write(b"bytes")
    (tmp_path / "a/shard.tar").write_bytes(b"bites")
    with store.writing("a/shard.tar") as sink:
        sink.write(b"bytes")
    assert (tmp_path / "a/shard.tar").read_bytes() == b"bytes" and store.names("a") == ["shard.tar"]
