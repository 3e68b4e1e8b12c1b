"""Requests to remote file systems: what is repeated, what never is, what comes of answers that are wrong, and the cache."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import pickle
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from buckets import environment, s3_server
from fault_proxy import MODES, FaultProxy
from fsspec.implementations.memory import MemoryFileSystem

from lodeset.pipeline.config import Resources
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.errors import DamagedError, LodesetError
from lodeset.pipeline.remote import blocks, cache, retries
from lodeset.pipeline.remote.cache import Cache
from lodeset.pipeline.remote.file_system import Remote, file_system
from lodeset.pipeline.remote.retries import (
    REPEATS,
    WrongBytesError,
    patiently,
    repeated,
    repeated_in,
    summed_up,
    told_of,
    transient,
)
from lodeset.pipeline.remote.settings import configure
from lodeset.pipeline.remote.uploads import abort, orphaned_uploads


class Refusal(Exception):
    """An answer, as botocore has it."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(code or str(status))
        self.response = {"Error": {"Code": code or str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}


class ClientPayloadError(Exception):
    """As aiohttp has it."""


class SSLError(Exception):
    """As botocore has it."""


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which take no time here; a clock stands for them."""
    pauses: list[float] = []
    now = [1_000.0]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(retries, "_sleep", sleep)
    monkeypatch.setattr(retries.time, "monotonic", lambda: now[0])
    monkeypatch.setenv(retries.ANSWERED, "test")
    return pauses


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


@pytest.mark.parametrize(
    "error",
    [
        Refusal(503, "SlowDown"),
        Refusal(503),
        Refusal(500, "InternalError"),
        Refusal(400, "RequestTimeout"),
        Refusal(400, "IncompleteBody"),
        Refusal(409, "ConditionalRequestConflict"),
        Refusal(429),
        ConnectionResetError(),
        ClientPayloadError("Response payload is not completed"),
        OSError(errno.EBUSY, "Please reduce your request rate"),
        TimeoutError(),
        WrongBytesError("3 bytes came of 0..9"),
    ],
)
def test_what_may_pass_is_repeated(error: Exception, paused: list[float]) -> None:
    assert repeated(failing(error, error), "read x", "test") == "done"
    assert len(paused) == 2


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no such bucket"),
        PermissionError("Access Denied"),
        FileExistsError(),
        Refusal(403, "AccessDenied"),
        Refusal(404, "NoSuchBucket"),
        Refusal(412, "PreconditionFailed"),
        Refusal(409, "BucketAlreadyExists"),
        SSLError("certificate verify failed"),
        ValueError("Invalid endpoint"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_stays_is_not(error: Exception, paused: list[float]) -> None:
    with pytest.raises(type(error)):
        repeated(failing(error), "read x", "test")
    assert not paused and not transient(error)


def test_pauses_are_drawn_grow_and_end(paused: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.PATIENCE, "100")
    error = Refusal(503, "SlowDown")
    monkeypatch.setattr(retries, "_jitter", random.Random(0))
    with pytest.raises(Refusal):
        repeated(failing(*[error] * 10_000), "read x", "test")
    assert sum(paused) == pytest.approx(100)
    most = [min(20.0, 0.2 * 2**n) for n in range(len(paused))]
    assert all(0 <= pause <= limit for pause, limit in zip(paused, most, strict=True))
    assert len(set(paused)) == len(paused), (
        "no two alike: others that failed at the same moment do not come back together"
    )


def test_nobody_waits_long_for_an_address_that_never_answered(
    paused: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(retries.ANSWERED, "other")
    with pytest.raises(ConnectionRefusedError):
        repeated(failing(*[ConnectionRefusedError()] * 10_000), "read x", "test")
    assert sum(paused) == pytest.approx(retries.FIRST_S)
    with pytest.raises(FileNotFoundError):
        repeated(failing(FileNotFoundError()), "read x", "test")
    assert os.environ[retries.ANSWERED].split() == ["other", "test"], "a refusal is an answer"


def test_what_is_given_up_inside_is_not_begun_again_around(
    paused: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(retries.PATIENCE, "0")
    tries = []

    async def part() -> None:
        tries.append(1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        repeated(lambda: asyncio.run(patiently(part, "a part", "test")()), "an upload", "test")  # type: ignore[arg-type]
    assert len(tries) == 1 and not paused


def test_repeats_are_counted_by_stage_and_in_all(paused: list[float], caplog: pytest.LogCaptureFixture) -> None:
    refusal, folders = Refusal(503, "SlowDown"), list[str]()
    with caplog.at_level(logging.WARNING, logger="lodeset"), summed_up():
        folders.append(os.environ[REPEATS])
        with told_of("embed/pool"):
            repeated(failing(refusal, refusal), "read x", "test")
        repeated(failing(refusal), "read x", "test")
        total = repeated_in(Path(folders[0]))
    assert total.requests == 3 and total.seconds == pytest.approx(sum(paused), abs=0.01)
    assert "embed/pool: its store or a source was slow: 2 requests were repeated" in caplog.messages[-2]
    assert "the store or a source was slow: 3 requests were repeated" in caplog.messages[-1]
    assert not Path(folders[0]).exists() and REPEATS not in os.environ


# -- a file system


class Odd(MemoryFileSystem):
    """Answers wrong as often as it is told to."""

    protocol = "odd"
    cachable = False
    wrong: list[Callable[[bytes], bytes]] = []  # noqa: RUF012
    reads = 0

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        type(self).reads += 1
        data = bytes(super().cat_file(path, start=start, end=end))
        return self.wrong.pop(0)(data) if self.wrong else data


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch, paused: list[float]) -> Iterator[type[Odd]]:
    fsspec.register_implementation("odd", Odd, clobber=True)
    monkeypatch.setattr(Odd, "wrong", [])
    monkeypatch.setattr(Odd, "reads", 0)
    yield Odd
    MemoryFileSystem.store.clear()


def test_a_short_answer_is_asked_for_again(odd: type[Odd]) -> None:
    fs, path = file_system("odd://x/a")
    fs.pipe_file(path, bytes(range(100)))
    odd.wrong = [lambda data: data[:5], lambda data: b""]
    assert fs.cat_file(path, 10, 30) == bytes(range(10, 30)) and odd.reads == 3
    assert fs.cat_file(path, 90, 120) == bytes(range(90, 100)), "the file ends there"
    odd.wrong = [lambda data: data[:-1]]
    assert fs.cat_ranges([path, path], [0, 50], [10, 60]) == [bytes(range(10)), bytes(range(50, 60))]
    odd.wrong = [lambda data: bytes(range(100))]
    assert fs.cat_file(path, 3, 6) == bytes([3, 4, 5]), "a server that knows no ranges"


def test_files_are_read_in_blocks_of_the_right_length(odd: type[Odd], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 64)
    fs, path = file_system("odd://x/a")
    data = random.Random(0).randbytes(1_000)
    fs.pipe_file(path, data)
    odd.wrong = [lambda data: data[:-3], lambda data: data[1:]]
    with fs.open(path) as file:
        assert file.read() == data
        for start, size in ((0, 1), (63, 2), (500, 300), (999, 50), (5_000, 1), (64, 64)):
            file.seek(start)
            assert file.read(size) == data[start : start + size]
        assert file.seek(-10, io.SEEK_END) == 990 and file.read() == data[-10:]
    copy = pickle.loads(pickle.dumps(fs))
    assert isinstance(copy, Remote) and copy.cat_file(path) == data


def test_wrong_bytes_are_read_again_before_they_are_damage(odd: type[Odd]) -> None:
    store = Store("odd://x/store")
    with store.writing("parts/a") as sink:
        sink.write(b"content")
    file = File("parts/a", 0, sink.size_bytes, sink.sha256())
    odd.wrong = [lambda data: b"CONTENT"]
    assert store.bytes_of(file) == b"content"
    assert not store.names("damaged")
    store.overwrite("parts/a", b"CONTENT")
    before = odd.reads
    with pytest.raises(DamagedError, match="SHA-256 differs"):
        store.bytes_of(file)
    assert odd.reads == before + 2, "twice the same: that is what is stored"


# -- S3, on a bad day


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server("bucket") as address:
        yield address


@pytest.mark.parametrize("mode", MODES)
def test_a_store_on_s3_recovers(server: tuple[str, int], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.SILENCE, "0.3")
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    data = random.Random(0).randbytes(50_000)
    with (
        FaultProxy(server, {mode: 0.3}, seed=1, silence_s=1.0, late_s=0.05) as proxy,
        environment(AWS_ENDPOINT_URL=proxy.url),
    ):
        store = Store(f"s3://bucket/{mode}")
        store.prepare()
        for n in range(4):
            assert store.put_absent(f"a/{n}.json", data), "whoever was answered late has still won"
            assert not store.put_absent(f"a/{n}.json", data[1:])
        with store.writing("b/table") as sink:
            sink.write(data)
        file = File("b/table", 0, len(data), sink.sha256())
        for _ in range(3):
            assert store.bytes_of(file) == data
            store.check(file, anew=True)
        with store.fs.open(store.path("b/table")) as opened:
            opened.seek(1_000)
            assert opened.read(2_000) == data[1_000:3_000]
        assert store.names("a") == [f"{n}.json" for n in range(4)]
    assert proxy.faults[mode] > 3


def test_one_of_several_wins_while_answers_are_lost(server: tuple[str, int]) -> None:
    with FaultProxy(server, {"lost": 0.3, "slow_down": 0.2}, seed=2) as proxy, environment(AWS_ENDPOINT_URL=proxy.url):
        store, won = Store("s3://bucket/race"), list[bytes]()

        def put(mine: bytes) -> None:
            if store.put_absent("manifest.json", mine):
                won.append(mine)

        threads = [threading.Thread(target=put, args=(str(n).encode(),)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [store.read("manifest.json")]


def test_a_part_of_an_upload_is_sent_again_by_itself(
    server: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 parts, of which a third fail: the whole would almost never succeed at once."""
    from lodeset.pipeline.dag import place

    monkeypatch.setattr(place, "_WHOLE_BYTES", 0)
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 * 2**20)
    (tmp_path / "file").write_bytes(random.Random(0).randbytes(60 * 2**20))
    with FaultProxy(server, {"slow_down": 0.3}, seed=2) as proxy, environment(AWS_ENDPOINT_URL=proxy.url):
        store = Store("s3://bucket/large")
        store.upload(tmp_path / "file", "model")
        assert proxy.requests < 40
    store = Store("s3://bucket/large")
    assert store.fs.info(store.path("model"))["size"] == 60 * 2**20
    assert orphaned_uploads(store) == []


def test_uploads_that_nobody_finished_are_found_and_aborted(server: tuple[str, int]) -> None:
    store = Store("s3://bucket/orphans")
    driver = store.fs.driver
    for key in ("orphans/shards/a.tar", "orphans/shards/b.tar", "elsewhere/c.tar"):
        driver.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    found = orphaned_uploads(store)
    assert [one.path for one in found] == ["shards/a.tar", "shards/b.tar"]
    abort(store, found)
    abort(store, found[:1])  # which somebody else did before
    assert orphaned_uploads(store) == [] and len(orphaned_uploads(Store("s3://bucket"))) == 1
    big = bytes(101 * 2**20)
    store.put_absent("first", b"there already")
    assert not store.put_absent("first", big), "a large file in parts, whose create is refused"
    assert orphaned_uploads(store) == []


def test_no_bucket_and_no_right_are_told_at_once(server: tuple[str, int], paused: list[float]) -> None:
    with pytest.raises(LodesetError, match=r"`nowhere` was found.*lodeset makes no buckets"):
        Store("s3://nowhere/runs").prepare()
    assert not paused


# -- the cache


def test_the_cache_is_bounded_and_forgets_what_was_used_first(tmp_path: Path) -> None:
    held_here = Cache(tmp_path, 10_000)
    paths = [held_here.path(f"{n:064x}") for n in range(300)]
    for n, path in enumerate(paths):
        held_here.keep(path, bytes(100))
        os.utime(path, (n, n))
        if n >= 10:
            os.utime(paths[0], (n, n))  # used again and again
    held = [path for path in paths if path.exists()]
    assert sum(path.stat().st_size for path in held) <= 10_000
    assert paths[0] in held and paths[-1] in held and paths[20] not in held
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_somebody_else_may_have_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LODESET_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._cache.cache_clear()
    found = cache.machine_cache()
    assert found is not None and found.folder.parent == tmp_path and found.folder.stat().st_mode & 0o777 == 0o700
    found.folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    found.folder.symlink_to(tmp_path / "elsewhere")
    cache._cache.cache_clear()
    assert cache.machine_cache() is None and cache.copies().folder != found.folder
    cache._cache.cache_clear()


def test_a_folder_in_use_stays(tmp_path: Path) -> None:
    small, filled = Cache(tmp_path, 1_000), list[str]()

    def fill(folder: Path) -> None:
        filled.append(folder.name)
        (folder / "model").write_bytes(bytes(900))

    with small.entry("a" * 64, 900, fill) as folder:
        for n in range(5):
            small.keep(small.path(f"{n:064x}"), bytes(500))
        assert (folder / "model").stat().st_size == 900
    with small.entry("a" * 64, 900, fill):
        pass
    assert len(filled) == 1
    with pytest.raises(ZeroDivisionError), small.entry("b" * 64, 1, lambda _: 1 // 0):  # type: ignore[arg-type, return-value]
        raise AssertionError("never filled")
    assert not small.path("b" * 64).exists()


def test_what_was_fetched_once_is_not_fetched_again(
    odd: type[Odd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SIZE", 64)
    monkeypatch.setenv("LODESET_CACHE_DIR", str(tmp_path))
    fs, path = file_system("odd://x/a")
    fs.pipe_file(path, bytes(range(200)))
    for _ in range(3):
        with fs.open(path) as file:
            assert file.read() == bytes(range(200))
    assert odd.reads == 4, "each of the blocks once"
    fs.pipe_file(path, bytes(range(1, 201)))  # another state
    with fs.open(path) as file:
        assert file.read() == bytes(range(1, 201))
    configure(Resources(cache_gb=0))
    before = odd.reads
    with fs.open(path) as file:
        file.read()
    assert odd.reads == before + 4
    del os.environ["LODESET_CACHE_GB"]


# -- credentials

SECRETS = ("pa55word", "AKIAABCDEFGHIJKLMNOP", "f00dsignature")


def test_credentials_stay_out_of_logs_and_messages(
    paused: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver's errors hold URLs, presigned ones too; so does the URL that a user gave."""
    said = "GET https://AKIAABCDEFGHIJKLMNOP:pa55word@host/x?X-Amz-Signature=f00dsignature&X-Amz-Credential=AKIAABCDEFGHIJKLMNOP"
    fsspec.register_implementation("odd", Odd, clobber=True)
    monkeypatch.setenv(retries.PATIENCE, "1")
    monkeypatch.setenv(retries.ANSWERED, "odd")
    monkeypatch.setattr(retries, "_counted", retries._Counted())

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EBUSY, said)

    for name in ("cat_file", "pipe_file", "ls", "info", "rm_file"):
        monkeypatch.setattr(Odd, name, refused)
    store = Store("odd://user:pa55word@bucket/runs?X-Amz-Signature=f00dsignature")
    calls: list[Callable[[], object]] = [
        store.prepare,
        lambda: store.read("a"),
        lambda: store.put_absent("a", b""),
        lambda: store.overwrite("a", b""),
        lambda: store.names("a"),
        lambda: store.delete("a"),
        lambda: store.commit_part("embed", "key", {}, files={}),
        lambda: store.bytes_of(File("a", 0, 1, "0" * 64)),
    ]
    with caplog.at_level(logging.DEBUG, logger="lodeset"):
        for call in calls:
            with pytest.raises(LodesetError) as caught:
                call()
            assert not [secret for secret in SECRETS if secret in str(caught.value)], str(caught.value)
            assert "cannot be reached" in str(caught.value)
    assert "requests were repeated" in caplog.text or "request was repeated" in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text], caplog.text
