"""Archives, names and sidecars as strangers make them: nothing stops the reader, and nothing is lost without a word."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import pytest
from builders import picture, write_folder, write_parquet, write_tar

from pipeline.config import Ingest, Source
from pipeline.errors import LodesetError
from pipeline.sources.listing import expand
from pipeline.sources.metadata import BadMetadata, fields_of, from_fields
from pipeline.sources.reading import read_slice
from pipeline.sources.slices import Slice, cut, members_of, split_loose, tar_members
from pipeline.stages.ingest import ingest_slice


def pieces(path: Path) -> list[Slice]:
    files = expand([Source(uri=str(path))], "pool")
    packed = [piece for f in files if f.kind != "loose" for piece in cut(f, members_of(f), 10**6)]
    return packed + split_loose([f for f in files if f.kind == "loose"], 10**6)


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 600
            tar.addfile(entry, io.BytesIO(name.encode() * 200 + bytes(600)))
    return buffer.getvalue()


def listed(data: bytes) -> list[tuple[str, str]]:
    return [(m.name, m.reason) for m in tar_members(io.BytesIO(data), len(data))]


def test_a_damaged_header_loses_its_own_member_only() -> None:
    data = bytearray(archive("a", "b", "c", "d"))
    second = 512 + 1024
    data[second + 148 : second + 156] = b"xxxxxxxx"  # the checksum of b's header
    assert listed(bytes(data)) == [("a", ""), ("", "unreadable_archive"), ("c", ""), ("d", "")]
    (lost,) = (m for m in tar_members(io.BytesIO(bytes(data)), len(data)) if m.reason)
    assert lost.offset == second and f"bytes {second} to {2 * second} belong to no member" in lost.detail


def test_an_archive_after_an_archive_is_read() -> None:
    assert listed(archive("a") + archive("b", "c")) == [("a", ""), ("b", ""), ("c", "")]


def test_bytes_after_the_last_member_are_told() -> None:
    whole = archive("a")
    assert listed(whole) == [("a", "")]
    assert listed(whole + b"\0" * 5_000 + b"rest") == [("a", ""), ("", "unreadable_archive")]


def test_an_archive_without_padding_and_end_is_whole() -> None:
    assert listed(archive("a", "b")[: 2 * 512 + 1024 + 600]) == [("a", ""), ("b", "")]


def test_names_that_are_not_utf_8_can_be_stored(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        data = picture(1)
        entry = tarfile.TarInfo("caf\xe9.png")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    tables, _ = ingest_slice("pool", pieces(tmp_path / "a.tar")[0], Ingest())
    assert tables["locations"]["member"].to_pylist() == ["caf\\xe9.png"]


def test_a_file_name_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path, [("a.png", picture(1)), ("caf\udce9.png", picture(2))])
    with pytest.raises(LodesetError, match=r"b'caf\\xe9.png' in .* is not UTF-8: rename"):
        expand([Source(uri=str(tmp_path))], "pool")


def test_sidecars_that_cannot_be_stored_or_followed() -> None:
    said = from_fields(fields_of(".json", b'{"caption": "\\ud800!", "note": "\\udfff"}'))
    assert said.caption == "?!" and json.loads(said.extra or "") == {"note": "?"}
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    with pytest.raises(BadMetadata, match="recursion"):
        fields_of(".json", deep)


def test_a_bad_sidecar_is_named_once_and_the_others_count(tmp_path: Path) -> None:
    members = [("a.png", picture(1)), ("a.alt.png", picture(2)), ("a.txt", b"a cat"), ("a.json", b"{")]
    write_tar(tmp_path / "a.tar", members)
    tables, counts = ingest_slice("pool", pieces(tmp_path / "a.tar")[0], Ingest())
    assert counts["files"] == 3
    assert tables["rejects"].select(["member", "reason"]).to_pylist() == [
        {"member": "a.json", "reason": "bad_metadata"}
    ]
    assert tables["metadata"]["caption"].to_pylist() == ["a cat", "a cat"]


def test_parquet_pages_that_are_damaged_are_rejects(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(4)], row_group_size=2)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page's header
    path.write_bytes(data)
    seen = [sample for piece in pieces(path) for sample in read_slice(piece, 10**6)]
    assert [bool(s.data) for s in seen] == [False, False, True, True]
    assert {s.reason for s in seen} == {"", "unreadable"}


@pytest.mark.parametrize("error", [PermissionError("no"), TimeoutError("slow"), ConnectionResetError("gone")])
def test_what_a_file_system_refuses_now_is_no_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    (file,) = expand([Source(uri=str(write_tar(tmp_path / "a.tar", [("a.png", picture(1))])))], "pool")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fsspec, "open", refuse)
    with pytest.raises(LodesetError, match=r"a\.tar cannot be read now"):
        members_of(file)


def test_a_tar_that_vanished_after_it_was_listed(tmp_path: Path) -> None:
    (piece,) = pieces(write_tar(tmp_path / "a.tar", [("a.png", picture(1))]))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(LodesetError, match=r"a\.tar was listed and cannot be opened now"):
        list(read_slice(piece, 10**6))


def test_a_path_with_brackets_means_itself(tmp_path: Path) -> None:
    (tmp_path / "new [1]").mkdir()
    path = write_tar(tmp_path / "new [1]/p.tar", [("a.png", picture(1))])
    assert [f.relative for f in expand([Source(uri=str(path))], "pool")] == ["p.tar"]


@pytest.mark.filterwarnings("ignore")  # what importing Beam warns of is not ours
def test_nothing_raises_in_a_worker(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.engines.beam import _attempt

    def defect(_: int) -> list[int]:
        raise KeyError("width")

    (failed,) = _attempt(1, defect)
    assert failed.tag == "failed" and failed.value.message == "KeyError: 'width'"
    assert "Traceback" in capsys.readouterr().err
