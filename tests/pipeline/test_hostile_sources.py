"""Archives, names and sidecars as strangers make them: nothing stops the reader, and nothing is lost without a word."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from builders import picture, write_folder, write_parquet, write_tar
from whole import pieces, read, rejects

from lodeset.pipeline.config import Ingest
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.metadata import MAX_DEPTH, BadMetadata, fields_of, from_fields
from lodeset.pipeline.sources.reading import read_slice
from lodeset.pipeline.sources.tars import tar_members
from lodeset.pipeline.stages.ingest.run import ingest_slice

# -- tars


def entry(name: str, size: int = 600) -> bytes:
    """A header and its payload, 600 bytes that no header's checksum fits."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT) + (name.encode() * 600)[:600] + bytes(1024 - 600)


def crafted(name: str, size: bytes) -> bytes:
    """An entry whose header states its size in these 12 bytes, with a right checksum."""
    header = bytearray(entry(name))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def spoilt(name: str) -> bytes:
    data = bytearray(entry(name))
    data[148:156] = b"xxxxxxxx"
    return bytes(data)


def extended(text: bytes, size: int | None = None, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(text) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512)


END = bytes(1024)
ENTRY = 1536
LOST = "unreadable_archive"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (entry("a") + spoilt("b") + entry("c") + entry("d") + END, ["a", (LOST, ENTRY, 2 * ENTRY), "c", "d"]),
        (spoilt("a") + entry("b") + END, [(LOST, 0, ENTRY), "b"]),
        (entry("a") + spoilt("b") + spoilt("c"), ["a", (LOST, ENTRY, 3 * ENTRY)]),
        (entry("a") + END + entry("b") + END + END + entry("c"), ["a", "b", "c"]),
        (entry("a") + bytes(512) + entry("b"), ["a", "b"]),
        (entry("a") + END + b"\0\0rest", ["a", (LOST, ENTRY + 1024, ENTRY + 1030)]),
        (entry("a") + entry("b")[:1112], ["a", "b"]),  # neither padding nor end
        (entry("a") + entry("b")[:1000], ["a", ("truncated", ENTRY + 512, ENTRY + 1000)]),
        (entry("a") + crafted("b", b"77777777777\0") + entry("c"), ["a", ("truncated", ENTRY + 512, 2 * ENTRY), "c"]),
        # A negative size sends Python's reader round in circles (CVE-2025-8194).
        (entry("a") + crafted("b", b"\xff" * 12) + entry("c"), ["a", (LOST, ENTRY, 2 * ENTRY), "c"]),
        (entry("a") + extended(b"0 path=x\n") + entry("c"), ["a", (LOST, ENTRY, ENTRY + 1024), "c"]),
        (entry("a") + extended(b"", 2**32) + entry("c"), ["a", (LOST, ENTRY, ENTRY + 512), "c"]),
        (extended(b"15 size=-5120\n") + entry("b") + entry("c"), [(LOST, 0, 1024 + ENTRY), "c"]),
        (extended(b"") * 2_000 + entry("b") + END, None),  # more than Python's recursion takes
        (b"", [(LOST, 0, 0)]),
        (END, []),
        (b"not a tar" * 1000, [(LOST, 0, 9000)]),
    ],
)
def test_what_lies_around_damage_is_read(data: bytes, expected: list[Any] | None) -> None:
    members = list(tar_members(io.BytesIO(data), len(data)))
    got = [(m.reason, m.offset, m.offset + m.size_bytes) if m.reason else m.name for m in members]
    if expected is None:
        assert got[-1] == "b" and all(reason == LOST for reason, *_ in got[:-1])
    else:
        assert got == expected
    assert all(
        f"bytes {m.offset} to {m.offset + m.size_bytes}" in m.detail for m in members if m.reason and m.size_bytes
    )


def test_reading_on_costs_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 headers in a row, each of which asks for the ones behind it."""
    data = extended(b"", 2**19) * 2_000
    taken = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal taken
            got = super().read(size)
            taken += len(got)
            return got

    assert {m.reason for m in tar_members(Counting(data), len(data))} == {LOST}
    assert taken < 10 * len(data)


def test_what_a_header_says_of_all_later_members_is_not_heeded() -> None:
    """One name of 3 kB would be that of every member, in memory too."""
    data = extended(b"3010 path=" + b"x" * 2_999 + b"\n", kind=tarfile.XGLTYPE)
    data += b"".join(entry(f"{n}") for n in range(200))
    names = [m.name for m in tar_members(io.BytesIO(data), len(data))]
    assert names[1:] == [f"{n}" for n in range(1, 200)]


def test_a_name_that_no_file_system_takes_is_a_reject() -> None:
    data = b"".join(extended(b"%d path=" % (n + 12) + b"x" * n + b"\n") + entry("a") for n in (4_096, 4_097))
    data = data.replace(b"4108 path", b"4107 path").replace(b"4109 path", b"4108 path")
    first, second = tar_members(io.BytesIO(data), len(data))
    assert (len(first.name), first.reason) == (4_096, "")
    assert (second.reason, second.detail) == (LOST, "a name of 4097 characters")


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_what_a_listing_takes_in_memory_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n:07}.png", picture(n)) for n in range(9)])
    write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(9)])
    monkeypatch.setattr("lodeset.pipeline.sources.members._LISTING_BYTES", 5 * (512 + 11))
    found = read(tmp_path / name)
    assert [s.data for s in found if s.data] == [picture(n) for n in range(5)]
    (row,) = rejects(tmp_path / name)
    assert row["reason"] == LOST and "behind 5 members: split the file" in row["detail"]


def test_names_that_are_not_utf8_can_be_stored(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        data = picture(1)
        info = tarfile.TarInfo("caf\xe9.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert [s.member for s in read(tmp_path / "a.tar")] == ["caf\\xe9.png"]
    assert rejects(tmp_path / "a.tar") == []


# -- sidecars


@pytest.mark.parametrize(
    ("data", "caption", "extra"),
    [
        (b'{"caption": "\\ud800!", "note": "\\udfff"}', "\\ud800!", {"note": "\\udfff"}),
        (b'{"\\ud800": {"\\udc00": ["\\ud83d\\ude00"]}}', None, {"\\ud800": {"\\udc00": ["\U0001f600"]}}),
        (b'{"caption": NaN, "n": [Infinity]}', None, {"n": [None]}),
    ],
)
def test_odd_text_can_be_stored(data: bytes, caption: str | None, extra: dict[str, Any]) -> None:
    said = from_fields(fields_of(".json", data))
    assert said.caption == caption
    assert json.loads((said.extra or "").encode()) == extra


def test_depth_is_limited() -> None:
    deep = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    assert fields_of(".json", deep)["a"]
    for more in (MAX_DEPTH + 1, 900):
        with pytest.raises(BadMetadata, match=f"more than {MAX_DEPTH} deep|recursion"):
            fields_of(".json", b'{"a":' * more + b"1" + b"}" * more)


def test_a_bad_sidecar_is_named_once_and_the_others_count(tmp_path: Path) -> None:
    members = [("a.png", picture(1)), ("a.alt.png", picture(2)), ("a.txt", b"a cat"), ("a.json", b"{")]
    for path in (write_tar(tmp_path / "a.tar", members), write_folder(tmp_path / "loose", members)):
        (piece,) = pieces(path)
        tables, counts = ingest_slice("pool", piece, Ingest())
        assert counts["files"] == 3
        (row,) = tables["rejects"].to_pylist()
        assert (row["uri"] + row["member"]).endswith("a.json") and row["reason"] == "bad_metadata"
        assert tables["metadata"]["caption"].to_pylist() == ["a cat", "a cat"]


def test_sidecars_apart_repeated_and_alone(tmp_path: Path) -> None:
    members = [
        *[("a.png", picture(1)), ("b.png", picture(2)), ("c.png", picture(3)), ("c.txt", b"first c")],
        *[("a.cls", b"old"), ("b.cls", b"2"), ("d.cls", b"none"), ("a.cls", b"1")],
        *[("c.png", picture(4)), ("c.txt", b"second c"), ("c.cls", b"3")],
    ]
    path = write_tar(tmp_path / "a.tar", members)
    said = {s.data: (s.metadata.label, s.metadata.caption) for s in read(path) if s.data}
    expected = [("1", None), ("2", None), (None, "first c"), ("3", "second c")]
    assert said == {picture(n + 1): each for n, each in enumerate(expected)}
    assert [(r["member"], r["reason"]) for r in rejects(path)] == [
        ("a.cls", "repeated_metadata"),
        ("d.cls", "metadata_without_image"),
    ]


def test_a_sidecar_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", picture(1)), ("a.txt", b"x" * 2_000)])
    monkeypatch.setattr("lodeset.pipeline.sources.reading.MAX_BYTES", 1_000)
    assert [(r["member"], r["detail"]) for r in rejects(path)] == [("a.txt", "2000 bytes, more than 1000")]


# -- what the file system says


@pytest.mark.parametrize("error", [PermissionError("no"), TimeoutError("slow"), ConnectionResetError("gone")])
@pytest.mark.parametrize("when", ["open", "read"])
@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "loose"])
def test_what_a_file_system_refuses_now_is_no_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str, error: OSError
) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", picture(1))])
    write_parquet(tmp_path / "a.parquet", [picture(1)])
    write_folder(tmp_path / "loose", [("a.png", picture(1)), ("a.txt", b"caption")])

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise error

    def opened(uri: str) -> Failing:
        if when == "open":
            raise error
        return Failing(Path(uri).read_bytes())

    (piece,) = pieces(tmp_path / name)
    monkeypatch.setattr("lodeset.pipeline.sources.files.open_source", opened)
    told = "may not be read" if isinstance(error, PermissionError) else "cannot be read now"
    with pytest.raises(LodesetError, match=f"{name}.* {told}"):
        list(read_slice(piece, 10**6))
    if name != "loose":
        with pytest.raises(LodesetError, match=f"{name} {told}"):
            pieces(tmp_path / name)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "loose"])
def test_a_source_that_vanished_or_shrank_after_it_was_listed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_tar(tmp_path / "a.tar", [("a.png", picture(1))])
    write_parquet(tmp_path / "a.parquet", [picture(1)])
    write_folder(tmp_path / "loose", [("a.png", picture(1))])
    (piece,) = pieces(path)
    file = path / "a.png" if name == "loose" else path
    if name != "a.parquet":  # there the footer is at the end: without it this is none
        file.write_bytes(file.read_bytes()[:600])
        with pytest.raises(LodesetError, match="changed since it was listed"):
            list(read_slice(piece, 10**6))
    file.unlink()
    with pytest.raises(LodesetError, match=f"{file.name} is gone since it was listed"):
        list(read_slice(piece, 10**6))


# -- the net


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_file_that_became_a_pipe_or_a_folder_is_not_waited_for(tmp_path: Path, make: Callable[[str], None]) -> None:
    pool = write_folder(tmp_path / "pool", [("1.png", picture(1)), ("2.png", picture(2))])
    (piece,) = pieces(pool)
    (pool / "2.png").unlink()
    make(str(pool / "2.png"))
    with pytest.raises(LodesetError, match=r"2\.png cannot be read now .*no file any more"):
        ingest_slice("pool", piece, Ingest())


def test_nothing_raises_in_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    from lodeset.pipeline.engines.failures import Failed
    from lodeset.pipeline.engines.processes import _answer

    def answer(function: Callable[[int], Any]) -> Any:
        return cloudpickle.loads(_answer(cloudpickle.dumps((function, (1,)))))

    def defect(_: int) -> Iterator[int]:
        yield 1
        raise KeyError("width")

    told = answer(defect)
    assert isinstance(told, Failed) and told.message.startswith("KeyError: 'width' (at test_hostile_sources.py:")
    assert "in defect)" in told.message
    assert "Traceback" in capfd.readouterr().err

    def mistake(_: int) -> list[int]:
        raise LodesetError("a.tar is gone")

    assert answer(mistake) == Failed("a.tar is gone")
    assert capfd.readouterr().err == ""
