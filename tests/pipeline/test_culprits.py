"""Images that crash, hang or fill the process that decodes them become rejects; everything beside them is read."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import psutil
import pyarrow as pa
import pytest
from builders import id_of, picture, write_folder, write_parquet, write_tar

from lodeset.pipeline.algorithms.images.decoding import Examined, Limits, examine
from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.engines import processes
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import ingest_stage
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.stages.ingest import run as ingest

# What importing Beam warns of is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

# The first pixels of an image decide what its decoder does; see `deadly`.
CRASH, EXIT, HANG, SPIN, FILL, ONCE = range(6)


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Workers cannot import this file: its functions travel as code."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Deadly:
    """A decoder that fails at the images it was told of, by image_id."""

    def __init__(self, how: dict[str, int], mark: Path) -> None:
        self.how, self.mark = how, mark

    def __call__(self, data: bytes, limits: Limits) -> Examined:
        found = examine(data, limits)
        how = self.how.get(found.image_id)
        if how == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif how == EXIT:
            os._exit(3)
        elif how == HANG:
            time.sleep(10**6)
        elif how == SPIN:
            while True:
                pass
        elif how == FILL:
            kept = []
            while True:
                kept.append(b"x" * 10**7)
        elif how == ONCE and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def ran(store: Store, path: Path, decoder: Deadly, monkeypatch: pytest.MonkeyPatch, cpus: int = 2) -> Outcome:
    limits = Ingest(max_seconds=0.5, worker_memory_gb=0.6, slice_mb=0.05)
    stage = ingest_stage(limits, {}, "pool", [Source(uri=str(path))])
    monkeypatch.setattr(ingest, "examine", decoder)
    outcome = ingest.run(Context(store, stage, str(path), {}, cpus, lambda _: None))
    assert outcome.rows.balanced()
    return outcome


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_images_that_end_their_decoder_are_rejects(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(n) for n in range(60)]
    hows = [CRASH, EXIT, HANG, SPIN, FILL] if kind == "tar" else [CRASH, EXIT]
    bad = {id_of(images[6 * n]): how for n, how in enumerate(hows)}
    if kind == "tar":
        path = write_tar(tmp_path / "a.tar", [(f"{n:02}.png", data) for n, data in enumerate(images)])
    elif kind == "parquet":
        path = write_parquet(tmp_path / "a.parquet", images)
    else:
        path = write_folder(tmp_path / "loose", [(f"{n:02}.png", data) for n, data in enumerate(images)])
    store = Store(str(tmp_path / "store"))
    outcome = ran(store, path, Deadly(bad, tmp_path / "mark"), monkeypatch)
    kept = set(store.table(outcome.tables["images"], ["image_id"])["image_id"].to_pylist())
    assert kept == {id_of(data) for data in images} - set(bad)
    reasons = {
        CRASH: "killed_decoder",
        EXIT: "killed_decoder",
        HANG: "too_slow",
        SPIN: "too_slow",
        FILL: "too_much_memory",
    }
    expected: dict[str, int] = {}
    for how in hows:
        expected[reasons[how]] = expected.get(reasons[how], 0) + 1
    assert outcome.rows.dropped == expected
    details = store.table(outcome.tables["rejects"], ["reason", "detail"]).to_pylist()
    assert len(details) == len(hows)
    assert all("worker_memory_gb: 0.6" in row["detail"] for row in details if row["reason"] == "too_much_memory")
    assert any("SIGSEGV" in row["detail"] for row in details)


def test_a_worker_that_somebody_kills_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(n) for n in range(20)]
    path = write_tar(tmp_path / "a.tar", [(f"{n:02}.png", data) for n, data in enumerate(images)])
    store = Store(str(tmp_path / "store"))
    outcome = ran(store, path, Deadly({id_of(images[7]): ONCE}, tmp_path / "mark"), monkeypatch)
    assert (tmp_path / "mark").exists()
    assert outcome.rows.kept == 20 and not outcome.rows.dropped


def test_a_source_that_changes_while_it_is_read_is_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n:02}.png", picture(n)) for n in range(4)])
    before = path.read_bytes()

    def replaced(data: bytes, limits: Limits) -> Examined:
        path.write_bytes(bytes(len(before)))
        os.utime(path, (1, 1))
        return examine(data, limits)

    store = Store(str(tmp_path / "store"))
    with pytest.raises(LodesetError, match=r"a\.tar changed while it was read"):
        ran(store, path, replaced, monkeypatch)  # type: ignore[arg-type]
    assert not store.names("parts/ingest")


def test_memory_that_the_machine_lacks_is_no_property_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(data: bytes, limits: Limits) -> Examined:
        raise MemoryError

    path = write_tar(tmp_path / "a.tar", [("0.png", picture(0))])
    store = Store(str(tmp_path / "store"))
    nothing = type("Memory", (), {"available": 10**6})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: nothing)
    with pytest.raises(LodesetError, match=r"0\.0 GiB of memory left, and a worker may take 0\.6"):
        ran(store, path, refused, monkeypatch)  # type: ignore[arg-type]
    assert not store.names("parts/ingest")


def test_a_reader_that_dies_at_a_member_loses_that_member_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a native Parquet or archive library would at crafted bytes."""
    from lodeset.pipeline.engines.failures import Failed
    from lodeset.pipeline.sources.slices import Slice, cut, members_of
    from lodeset.pipeline.stages.ingest import culprits

    path = write_tar(tmp_path / "a.tar", [(f"{n:02}.png", picture(n)) for n in range(9)])
    (file,) = expand([Source(uri=str(path))], "pool")
    (piece,) = cut(file, members_of(file), 10**9)

    def again(function: object, one: Slice, work: object) -> list[object] | processes.Died | Failed:
        if any(m.name in ("03.png", "08.png") for m in one.members):
            return processes.Died(0, "killed", "its process ended with signal 11 (SIGSEGV)")
        return []

    work = ingest.Work(Store(str(tmp_path / "store")), "pool", Ingest())
    found = culprits._unreadable_members(again, piece, work)
    assert [m.name for m in found] == ["03.png", "08.png"]
    assert {why.reason for why in found.values()} == {"killed_decoder"}


def test_workers_that_cannot_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = processes.Pool(1)

    class Refused:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        def kill(self) -> None: ...

    monkeypatch.setattr(fresh._context, "Process", Refused, raising=False)
    with pytest.raises(
        LodesetError, match=r"worker processes do not start .*Resource temporarily unavailable.*ulimit -u"
    ):
        fresh.run(processes.task(len, []))


def test_tables_say_what_was_refused(tmp_path: Path) -> None:
    tables, _ = ingest.ingest_slice("pool", _piece(tmp_path), Ingest(max_side=100))
    rows = tables["rejects"].to_pylist()
    assert [(row["member"], row["reason"]) for row in rows] == [("long.png", "too_long_a_side")]
    assert isinstance(tables["images"], pa.Table) and tables["images"].num_rows == 1


def _piece(folder: Path) -> ingest.Slice:
    from lodeset.pipeline.sources.slices import cut, members_of

    path = write_tar(folder / "a.tar", [("long.png", picture(0, width=200, height=8)), ("ok.png", picture(1))])
    (file,) = expand([Source(uri=str(path))], "pool")
    (piece,) = cut(file, members_of(file), 10**9)
    return piece
