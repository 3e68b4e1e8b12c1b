"""Zip archives, compressed tars and lists of paths hold what a plain tar holds, and hostile ones end in counted rejects."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import id_of, picture, write_folder, write_tar

from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import ingest_stage
from lodeset.pipeline.sources import compressed, containers
from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.listing import SourceFile, expand
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.reading import Location, read_images, read_slice
from lodeset.pipeline.sources.slices import Slice, check_unchanged, chosen_members, cut, members_of
from lodeset.pipeline.specs import listing_of
from lodeset.pipeline.stages.ingest.run import ingest_slice

Named = Sequence[tuple[str, bytes]]
LIMIT = 10**6
LOST = "unreadable_archive"


# -- builders


def tar_of(path: Path, members: Named) -> Path:
    return write_tar(path, members)


def zip_of(path: Path, members: Named, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def streamed_zip(path: Path, members: Named) -> Path:
    """Sizes and checksums behind the payloads, as writers to a pipe leave them."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    path.write_bytes(pipe.data)
    return path


def gzip_of(path: Path, members: Named) -> Path:
    plain = write_tar(path.with_suffix(".plain"), members).read_bytes()
    path.with_suffix(".plain").unlink()
    half = len(plain) // 2
    path.write_bytes(
        gzip.compress(plain[:half]) + gzip.compress(plain[half:])
    )  # pigz and friends write several streams
    return path


def zstandard_of(path: Path, members: Named) -> Path:
    plain = write_tar(path.with_suffix(".plain"), members).read_bytes()
    path.with_suffix(".plain").unlink()
    half = len(plain) // 2
    parts = (pa.compress(one, "zstd", asbytes=True) for one in (plain[:half], plain[half:]))
    path.write_bytes(b"".join(parts))
    return path


ARCHIVES: dict[str, Callable[[Path, Named], Path]] = {
    "a.zip": zip_of,
    "stored.ZIP": lambda path, members: zip_of(path, members, zipfile.ZIP_STORED),
    "piped.zip": streamed_zip,
    "a.tar.gz": gzip_of,
    "a.tgz": gzip_of,
    "a.tar.zst": zstandard_of,
    "a.tzst": zstandard_of,
}


def only(path: Path, **knobs: Any) -> SourceFile:
    (file,) = expand([Source(uri=str(path), **knobs)], "pool")
    return file


def pieces(path: Path, slice_bytes: int = LIMIT, **knobs: Any) -> list[Slice]:
    file = only(path, **knobs)
    return cut(file, chosen_members(file, members_of(file)), slice_bytes)


def read(path: Path, slice_bytes: int = LIMIT, max_bytes: int = LIMIT, **knobs: Any) -> list[Sample]:
    return [sample for piece in pieces(path, slice_bytes, **knobs) for sample in read_slice(piece, max_bytes)]


def refused(path: Path, **knobs: Any) -> list[tuple[str, str, str]]:
    """(member, reason, detail) of a source's rejects; places are told apart, and tables hold what they are given."""
    found = read(path, **knobs)
    places = [(s.uri, s.member, s.offset) for s in found]
    assert len(places) == len(set(places))
    for piece in pieces(path, **knobs):
        tables, _ = ingest_slice("pool", piece, Ingest())
        for table in tables.values():
            table.validate(full=True)
    return [(s.member, s.reason, s.detail) for s in found if s.reason]


def again(samples: Sequence[Sample]) -> list[bytes]:
    places = [Location(id_of(s.data), s.uri, s.member, s.offset, s.size_bytes) for s in samples if not s.reason]
    return [data for _, data in read_images(places)]


def world() -> list[tuple[str, bytes]]:
    members = []
    for n in range(20):
        members += [(f"d/{n:03d}.png", picture(n)), (f"d/{n:03d}.json", b'{"label": "l%d"}' % n)]
    return [
        *members,
        ("d/no.json", b"{}"),
        ("d/bad.json", b"["),
        ("d/bad.png", picture(99)),
        ("d/same.png", picture(3)),
    ]


# -- what they hold


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_archive_holds_what_a_plain_tar_holds(tmp_path: Path, name: str) -> None:
    plain = read(tar_of(tmp_path / "a.tar", world()))
    path = ARCHIVES[name](tmp_path / name, world())
    for slice_bytes in (LIMIT, 2_000):
        found = read(path, slice_bytes)
        told = [[(s.member, s.size_bytes, s.data, s.metadata, s.reason) for s in samples] for samples in (found, plain)]
        assert told[0] == told[1]
        assert [s.offset for s in found if not s.reason] == sorted({s.offset for s in found if not s.reason})
    assert again(found) == [s.data for s in plain if not s.reason]
    backwards = [s for s in reversed(found) if not s.reason]
    assert again(backwards) == [s.data for s in backwards]
    assert [s.reason for s in read(path, max_bytes=100) if not s.reason] == []


@pytest.mark.parametrize("name", ARCHIVES)
def test_patterns_choose_members(tmp_path: Path, name: str) -> None:
    path = ARCHIVES[name](tmp_path / name, world())
    found = read(path, members={"include": "*1.png", "exclude": ["*.json", "d/011.png"]})
    assert [s.member for s in found if not s.reason] == ["d/001.png"]
    assert not any(s.metadata.label for s in found)


def test_existing_kinds_keep_their_fingerprint_and_new_ones_have_their_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", [("1.png", picture(1))])
    tar_of(folder / "a.tar", world())
    files = expand([Source(uri=str(folder))], "pool")
    assert {f.kind for f in files} == {"loose", "tar"}
    before = [replace(f, kind="loose") for f in files]
    assert listing_of(files) == listing_of(before), "the kind was no part of it"
    zip_of(folder / "b.zip", world())
    files = expand([Source(uri=str(folder))], "pool")
    assert listing_of(files) != listing_of([replace(f, kind="loose") for f in files])


# -- zip


def entry_at(data: bytes, number: int) -> int:
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def patched(path: Path, at: int, form: str, *values: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, *values)
    path.write_bytes(data)
    return path


def three(path: Path, **options: Any) -> Path:
    return zip_of(path, [(f"{n}.png", picture(n)) for n in range(3)], **options)


def test_one_bad_entry_costs_itself(tmp_path: Path) -> None:
    for name, offset, form, value, reason, told in (
        ("encrypted", 8, "<H", 1, LOST, "encrypted"),
        ("method", 10, "<H", 14, LOST, "LZMA"),
        ("larger", 24, "<L", 5 * 10**5, "truncated", "promised"),
        ("smaller", 24, "<L", 20, "corrupt", "more than the 20 bytes"),
        ("far", 42, "<L", 10**9, LOST, "into the directory"),
        ("elsewhere", 42, "<L", 7, LOST, "belong to another entry"),
        ("packed", 20, "<L", 10**8, LOST, "into the directory"),
        ("link", 38, "<L", 0o120777 << 16, "not_a_file", "mode l"),
    ):
        path = three(tmp_path / f"{name}.zip")
        patched(path, entry_at(path.read_bytes(), 1) + offset, form, value)
        found = read(path)
        assert [s.member for s in found if not s.reason] in (["0.png", "2.png"], ["2.png"]), name
        assert any(r == reason and told in d for _, r, d in refused(path)), (name, refused(path))


def test_damaged_bytes_are_noticed(tmp_path: Path) -> None:
    for build in (lambda p: three(p, method=zipfile.ZIP_STORED), three, lambda p: streamed_zip(p, world()[:1])):
        path = build(tmp_path / "a.zip")
        first = next(s for s in read(path) if not s.reason)
        at = first.offset + 30 + len(first.member) + 20
        patched(path, at, "<L", 0xDEADBEEF)
        assert refused(path)[0][:2] in ((first.member, "corrupt"), (first.member, "truncated"))


def test_entries_that_share_bytes_unpack_once(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "bomb.zip", [(f"{n:03d}.png", picture(1)) for n in range(50)])
    data = path.read_bytes()
    for number in range(50):
        patched(path, entry_at(data, number) + 42, "<L", 0)
    assert [s.member for s in read(path) if not s.reason] == ["000.png"]
    assert [r for _, r, _ in refused(path)] == [LOST] * 49


def test_a_member_that_unpacks_to_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_of(tmp_path / "a.zip", [("zeros.png", bytes(50 * LIMIT)), ("1.png", picture(1))])
    assert refused(path) == [("zeros.png", "too_many_bytes", "50000000 > 1000000 (ingest.max_bytes)")]
    at = entry_at(path.read_bytes(), 0)
    patched(path, at + 24, "<L", 1_000)
    made = []
    inflate = zlib.decompressobj

    class Counting:
        def __init__(self, bits: int) -> None:
            self._inner = inflate(bits)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def decompress(self, data: bytes, most: int) -> bytes:
            out = self._inner.decompress(data, most)
            made.append(len(out))
            return out

    monkeypatch.setattr("lodeset.pipeline.sources.zips.zlib.decompressobj", Counting)
    samples = read(path)
    assert [(s.reason, s.detail) for s in samples if s.reason] == [
        ("corrupt", "more than the 1000 bytes that the directory promises")
    ]
    assert sum(made) <= 1_001 + len(picture(1)) + 1


def test_names_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/", b"")
        for name in ("dir\\1.png", "AAAAAA.png", "BBBBBB.png", "../../up.png", "/abs.png"):
            archive.writestr(name, picture(len(name)))
    data = (
        path.read_bytes().replace(b"AAAAAA", b"\x81mla\x84t").replace(b"BBBBBB", "größ".encode())
    )  # cp437; UTF-8 without its flag
    path.write_bytes(data)
    names = [s.member for s in read(path) if not s.reason]
    assert names == ["dir/1.png", "ümlaät.png", "größ.png", "../../up.png", "/abs.png"] and not refused(path)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes"),
        (b"PK\x03\x04" + b"x" * 200, "no central directory"),
        (b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 9, 9, 2**31, 2**31, 0), "does not fit"),
        (b"PK\x05\x06" + struct.pack("<4H2LH", 1, 1, 9, 9, 0, 0, 0), "split archive"),
        (b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 7, 7, 0, 0, 0), "promises 7 members"),
        (b"x" * 46 + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 46, 0, 0), "no entry at byte 0"),
    ],
)
def test_what_is_no_zip_archive_is_one_reject(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    ((_, reason, detail),) = refused(tmp_path / "a.zip")
    assert reason == LOST and told in detail


def test_large_offsets_and_programs_before_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(3):
            with archive.open(f"{n}.png", "w", force_zip64=True) as member:
                member.write(picture(n))
    wide = path.read_bytes()
    path.write_bytes(b"#!/bin/sh\n" * 100 + wide + b"trailing")
    assert [s.data for s in read(path)] == [picture(n) for n in range(3)]
    # A directory whose sizes and offset all lie in the 64-bit fields.
    data = bytearray(three(tmp_path / "b.zip").read_bytes())
    at = entry_at(data, 0)
    name, extra, size, packed = 5, 0, *struct.unpack_from("<LL", data, at + 20)[::-1]
    struct.pack_into("<LL", data, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", data, at + 30, extra + 28)
    struct.pack_into("<L", data, at + 42, 0xFFFFFFFF)
    more = struct.pack("<HHQQQ", 1, 24, size, packed, 0)
    data[at + 46 + name : at + 46 + name] = more
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<L", data, end + 12, struct.unpack_from("<L", data, end + 12)[0] + len(more))
    (tmp_path / "b.zip").write_bytes(data)
    assert zipfile.ZipFile(tmp_path / "b.zip").read("0.png") == picture(0), "the reference reads it, too"
    assert [s.data for s in read(tmp_path / "b.zip")] == [picture(n) for n in range(3)]


def test_random_damage_is_counted_and_ends(tmp_path: Path) -> None:
    """Whatever bytes change, every sample is an image as it was or a reject, and nothing is raised."""
    rng = random.Random(0)
    originals = {picture(n) for n in range(3)}
    members = [(f"{n}.png", picture(n)) for n in range(3)]
    listed = list_of(
        write_folder(tmp_path, members) / "a.csv", [{"path": name, "label": "x, y"} for name, _ in members]
    )
    sources = [three(tmp_path / "a.zip"), gzip_of(tmp_path / "a.tar.gz", members), listed]
    for path in sources:
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.2 else data))
            for sample in read(path):
                assert sample.reason or sample.data in originals or path.suffix == ".gz"
            refused(path)


def test_a_million_members_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lodeset.pipeline.sources.members._LISTING_BYTES", 10 * (512 + 5))
    path = zip_of(tmp_path / "a.zip", [(f"{n:02d}.xx", b"x") for n in range(30)])
    members = members_of(only(path))
    assert len(members) == 11 and "split the file" in members[-1].detail


# -- compressed tars


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.zst"])
def test_what_is_cut_off_is_read_as_far_as_it_goes(tmp_path: Path, name: str) -> None:
    rng = random.Random(1)
    members = [(f"{n:02d}.png", rng.randbytes(40_000)) for n in range(20)]
    path = ARCHIVES[name](tmp_path / name, members)
    path.write_bytes(path.read_bytes()[:-200_000])
    found = read(path)
    good = [s for s in found if not s.reason]
    assert 8 <= len(good) < 20 and [(s.member, s.data) for s in good] == members[: len(good)]
    assert [s.reason for s in found[len(good) :]] == ["truncated", LOST]
    assert again(good) == [s.data for s in good]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.zst"])
# With the time in them, two processes would collect other tests.
@pytest.mark.parametrize("data", [b"", b"no archive", gzip.compress(b"", mtime=0), gzip.compress(b"x" * 600, mtime=0)])
def test_what_is_no_compressed_tar_is_counted(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    found = refused(tmp_path / name)
    assert found and all(reason == LOST for _, reason, _ in found)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.zst"])
def test_a_bomb_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_ALWAYS_BYTES", 10**6)
    path = ARCHIVES[name](tmp_path / name, [("1.png", picture(1)), ("zeros.png", bytes(20 * 10**6))])
    ((_, reason, detail),) = refused(path)
    assert reason == LOST and "unpack it" in detail


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are decompressed from here on."""
    made: list[int] = []

    def following(raw: Bytes) -> Callable[[], bytes]:
        inner = gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[call-overload]

        def chunk() -> bytes:
            data: bytes = inner.read1(2**16)
            made.append(len(data))
            return data

        return chunk

    container = compressed.compressed_tar("tar.gz", (".tar.gz",), "gzip", following)
    monkeypatch.setattr(containers, "containers", lambda: (container,))
    containers.container_of.cache_clear()
    return made


@pytest.mark.parametrize("order", ["beside", "after", "backwards", "before"])
def test_reading_is_never_quadratic(tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    images = [(f"{n:03d}.png", rng.randbytes(30_000)) for n in range(200)]
    labels = [(f"{n:03d}.json", b'{"label": "l%d"}' % n) for n in range(200)]
    if order == "beside":
        members = [one for pair in zip(images, labels, strict=True) for one in pair]
    else:
        members = {"after": images + labels, "backwards": images + labels[::-1], "before": labels + images}[order]
    monkeypatch.setattr(compressed, "_KEPT_BYTES", 2**17)
    path = gzip_of(tmp_path / "a.tar.gz", members)
    made = counted(monkeypatch)
    try:
        size = len(gzip.decompress(path.read_bytes()))
        found = pieces(path, slice_bytes=50_000)
        assert 3 <= len(found) <= 4 and sum(made) <= 2.1 * size
        made.clear()
        samples = [sample for piece in found for sample in read_slice(piece, LIMIT)]
        assert [(s.member, s.data, s.metadata.label) for s in samples] == [
            (name, data, f"l{n}") for n, (name, data) in enumerate(images)
        ]
        # Four slices, each read up to its end: 2.5 passes. Sidecars that lie apart make it two whole passes a slice at most.
        assert sum(made) <= 1.1 * size * (2.5 if order == "beside" else 8)
        made.clear()
        assert len(again(samples)) == 200 and sum(made) <= 1.1 * size
    finally:
        containers.container_of.cache_clear()


def test_long_silence_tells_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_ALIVE_BYTES", 2**16)
    path = gzip_of(tmp_path / "a.tar.gz", [("0.bin", bytes(10**6)), ("1.png", picture(1))])
    (piece,) = pieces(path, 2 * 10**6, members=["1.png"])
    told: list[int] = []
    assert len(list(read_slice(piece, LIMIT, lambda: told.append(1)))) == 2 and len(told) > 10


# -- lists


def list_of(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed_world(folder: Path) -> list[dict[str, Any]]:
    write_folder(folder, [(f"images/{n:02d}.png", picture(n)) for n in range(12)])
    return [
        {
            "image": f"images/{n:02d}.png",
            "label": f"l{n}",
            "Caption": f'a "b",\nc {n}',
            "url": f"http://x/{n}",
            "licence": "",
            "n": n,
        }
        for n in range(12)
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.ndjson"])
def test_a_list_names_images_and_what_is_known_about_them(tmp_path: Path, name: str) -> None:
    path = list_of(tmp_path / name, listed_world(tmp_path))
    for slice_bytes in (LIMIT, 5_000):
        found = read(path, slice_bytes)
        assert [(s.member, s.data) for s in found] == [(f"images/{n:02d}.png", picture(n)) for n in range(12)]
        told = [(s.metadata.label, s.metadata.caption, s.metadata.url, s.metadata.licence) for s in found]
        assert told == [
            (f"l{n}", f'a "b",\nc {n}', f"http://x/{n}", None if name == "a.csv" else "") for n in range(12)
        ]
        assert [json.loads(s.metadata.extra or "")["n"] for s in found] == [
            str(n) if name == "a.csv" else n for n in range(12)
        ]
        assert {s.uri for s in found} == {str(path)}
    assert again(found) == [s.data for s in found]
    assert len(pieces(path, 5_000)) > 3
    kept = read(path, members={"include": "*1.png"})
    assert [s.member for s in kept if not s.reason] == ["images/01.png", "images/11.png"]


def test_a_row_more_costs_that_row(tmp_path: Path) -> None:
    rows = listed_world(tmp_path)
    path = list_of(tmp_path / "a.csv", rows[:9])
    before = pieces(path, 5_000)
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    unended = pieces(path, 5_000)
    list_of(path, rows)
    after = pieces(path, 5_000)
    assert [p.members for p in before] == [p.members for p in unended]
    assert [p.members for p in after[: len(before) - 1]] == [p.members for p in before[:-1]]
    assert all(p.states == () for p in after)
    rows[0]["label"] = "other"
    changed = pieces(list_of(path, rows), 5_000)
    assert [m.identity for m in changed[0].members] != [m.identity for m in after[0].members]


def test_paths_stay_in_the_folder_of_the_list(tmp_path: Path) -> None:
    outside = write_folder(tmp_path / "secret", [("1.png", picture(1))])
    folder = write_folder(tmp_path / "pool", [("in/2.png", picture(2))])
    (folder / "pipe.png").parent.mkdir(exist_ok=True)
    os.mkfifo(folder / "pipe.png")
    bad = [
        "../secret/1.png", str(outside / "1.png"), "in/../../secret/1.png", f"file://{outside}/1.png", "http://169.254.169.254/x",
        "memory://x/1.png", "in", ".", "", "no/such.png", "in/2.png/x", "nul\0.png", "x" * 5_000, "x" * 300, "pipe.png", "~/1.png",
    ]  # fmt: skip
    good = ["in/2.png", "./in//2.png", str(folder / "in" / "2.png"), f"file://{folder}/in/2.png", "in\\2.png"]
    path = list_of(folder / "a.jsonl", [{"path": one} for one in bad + good])
    samples = read(path)
    assert [s.member for s in samples if not s.reason] == ["in/2.png"] * len(good)
    found = refused(path)
    assert len(found) == len(bad) and {reason for _, reason, _ in found} == {"not_a_file", "empty"}
    assert sum("must stay" in detail for *_, detail in found) == 9
    for top in (tmp_path, Path("/")):
        allowed = read(list_of(folder / "b.jsonl", [{"path": str(outside / "1.png")}]), folder=str(top))
        assert [s.data for s in allowed] == [picture(1)] and again(allowed) == [picture(1)]
    allowed = read(
        list_of(folder / "c.jsonl", [{"path": "secret/1.png"}, {"path": "pool/in/2.png"}]), folder=str(tmp_path)
    )
    assert [(s.member, s.data) for s in allowed] == [(str(outside / "1.png"), picture(1)), ("in/2.png", picture(2))]


def test_rows_that_say_no_path_are_counted(tmp_path: Path) -> None:
    write_folder(
        tmp_path, [("1.png", picture(1)), ("a.txt", b"x"), ("a.zip", zip_of(tmp_path / "b.zip", world()).read_bytes())]
    )
    lines = [
        '{"file_name": "1.png", "label": "cat"}',
        "not json",
        "[1]",
        '{"other": 1}',
        '{"file_name": 5}',
        "",
        '{"file_name": "a.zip"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    reasons = [reason for _, reason, _ in refused(tmp_path / "a.jsonl")]
    assert reasons == ["bad_metadata", "bad_metadata", "empty", "bad_metadata", "archive"]
    (tmp_path / "a.csv").write_text('file_name;label\n1.png;cat\n1.png;a;b\n\n"1.png";"x\ny"\n')
    found = read(tmp_path / "a.csv")
    assert [(s.member, s.reason, s.metadata.label) for s in found] == [
        ("1.png", "", "cat"), ("", "bad_metadata", None), ("1.png", "", None), ("1.png", "", "x\ny"),
    ]  # fmt: skip


def test_text_that_no_table_can_hold_is_told_all_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path, [("1.png", picture(1)), ("\udce9.png", picture(2))])
    (tmp_path / "a.jsonl").write_text(
        '{"path": "\\ud800.png"}\n{"path": "1.png", "\\ud800": "\\udfff"}\n{"path": "\\udce9.png"}\n'
    )
    assert [(name, reason) for name, reason, _ in refused(tmp_path / "a.jsonl")] == [("\\ud800.png", "not_a_file")]
    assert [s.data for s in read(tmp_path / "a.jsonl") if not s.reason] == [picture(1), picture(2)]
    (tmp_path / "a.csv").write_bytes(b"path,\xe9\n1.png,\xe9\n\xe9.png,x,\xe9\n")
    assert [reason for _, reason, _ in refused(tmp_path / "a.csv")] == ["bad_metadata"]
    (tmp_path / "b.csv").write_bytes(b"\xe9\n1.png\n")
    assert [reason for _, reason, _ in refused(tmp_path / "b.csv")] == ["no_image_column"]


@pytest.mark.parametrize(
    ("text", "reason", "told"),
    [
        ("label,n\ncat,1\n", "no_image_column", "there are: `label`, `n`"),
        ("label,path\ncat,1.png\n", "", ""),
        ("", LOST, "0 bytes"),
        ('path\n1.png\n"' + "x" * 200_000, LOST, "field larger"),
        ("path\n1.png\n" + '"\n",' * 300_000, LOST, "quotation mark"),
        ("path\n1.png\n" + "x" * 2_000_000, LOST, "a line of more than"),
        ("path\n1.png\n".encode("utf-16").decode("latin-1"), LOST, "UTF-16"),
    ],
)
def test_lists_that_are_none_are_counted(tmp_path: Path, text: str, reason: str, told: str) -> None:
    write_folder(tmp_path, [("1.png", picture(1))])
    (tmp_path / "a.csv").write_text(text, encoding="latin-1")
    found = refused(tmp_path / "a.csv")
    assert [(r, told in d) for _, r, d in found] == ([(reason, True)] if reason else [])
    assert len([s for s in read(tmp_path / "a.csv") if not s.reason]) == ("path\n1.png" in text or not reason)


def test_another_column_is_named_or_meant(tmp_path: Path) -> None:
    write_folder(tmp_path, [("1.png", picture(1))])
    (tmp_path / "a.csv").write_text("Photo,path\n1.png,x\n")
    assert [s.data for s in read(tmp_path / "a.csv", image="photo")] == [picture(1)]
    ((_, reason, detail),) = refused(tmp_path / "a.csv", image="pictures")
    assert reason == "wrong_image_column" and "`image: path` may be meant" in detail


def test_a_list_counts_where_it_is_named_and_not_in_a_folder(tmp_path: Path) -> None:
    rows = listed_world(tmp_path / "f")
    list_of(tmp_path / "f" / "a.csv", rows)
    assert {f.kind for f in expand([Source(uri=str(tmp_path / "f"))], "pool")} == {"loose"}
    assert {f.kind for f in expand([Source(uri=str(tmp_path / "f" / "*.csv"))], "pool")} == {"csv"}


def test_a_folder_for_paths_is_refused_where_there_are_none(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", world())
    with pytest.raises(LodesetError, match=r"`folder:` says where the paths of a list start, and .*a\.zip is no list"):
        only(path, folder=str(tmp_path))


def test_what_a_list_names_and_changes_is_noticed(tmp_path: Path) -> None:
    path = list_of(tmp_path / "a.csv", listed_world(tmp_path))
    (piece,) = pieces(path)
    check_unchanged(piece, {str(path)})
    image = tmp_path / "images" / "03.png"
    image.write_bytes(picture(40))
    with pytest.raises(LodesetError, match=r"03\.png changed while it was read"):
        check_unchanged(piece, {str(path)})
    image.write_bytes(picture(3) + b"x")
    with pytest.raises(LodesetError, match=r"03\.png changed since it was listed"):
        list(read_slice(piece, LIMIT))
    image.write_bytes(picture(3))
    path.write_text(path.read_text().replace("l5", "l6"))
    with pytest.raises(LodesetError, match=r"a\.csv changed since it was listed"):
        list(read_slice(piece, LIMIT))


def test_images_that_lodeset_made_are_named_as_such(tmp_path: Path) -> None:
    store = write_folder(tmp_path / "store", [("shards/1.png", picture(1)), (".lodeset", b"store\n")])
    assert store.is_dir()
    path = list_of(tmp_path / "a.csv", [{"path": "store/shards/1.png"}])
    ((_, reason, detail),) = refused(path)
    assert reason == "not_a_file" and "lodeset made it" in detail


def test_a_list_may_be_given_as_a_url_of_this_machine(tmp_path: Path) -> None:
    path = list_of(tmp_path / "a.csv", listed_world(tmp_path))
    (file,) = expand([Source(uri=f"file://{path}")], "pool")
    found = [s for piece in cut(file, members_of(file), LIMIT) for s in read_slice(piece, LIMIT)]
    assert [s.member for s in found] == [f"images/{n:02d}.png" for n in range(12)]
    assert again(found) == [picture(n) for n in range(12)]


def test_a_remote_list(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    try:
        for n in range(3):
            fs.pipe(f"/lists/images/{n}.png", picture(n))
        lines = [{"path": f"images/{n}.png"} for n in range(3)] + [
            {"path": p} for p in ("../x.png", "/etc/x", "images/9.png", "images")
        ]
        lines.append({"path": "memory://lists/images/1.png"})
        fs.pipe("/lists/a.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
        (file,) = expand([Source(uri="memory://lists/a.jsonl")], "pool")
        found = [s for p in cut(file, members_of(file), LIMIT) for s in read_slice(p, LIMIT)]
        assert [s.data for s in found if not s.reason] == [picture(0), picture(1), picture(2), picture(1)]
        assert [s.reason for s in found if s.reason] == ["not_a_file"] * 4
        assert again(found) == [picture(0), picture(1), picture(2), picture(1)]
        # A list here that names images there.
        path = list_of(tmp_path / "here.jsonl", [{"path": "images/2.png"}, {"path": "/lists/images/2.png"}])
        found = read(path, folder="memory://lists")
        assert [s.data for s in found if not s.reason] == [picture(2)] * len(again(found)) != []
    finally:
        fs.rm("/lists", recursive=True)


# -- in ingest


@pytest.mark.filterwarnings("ignore")  # what importing Beam warns of is not ours
def test_ingest_reads_every_kind_and_draws_from_it(tmp_path: Path) -> None:
    from lodeset.pipeline.dag.stage import Context
    from lodeset.pipeline.stages.ingest import run as ingest

    pool = tmp_path / "pool"
    pool.mkdir()
    for number, (name, build) in enumerate(ARCHIVES.items()):
        build(pool / name, [(f"{n}.png", picture(10 * number + n)) for n in range(4)])
    folder = write_folder(tmp_path / "listed", [(f"{n}.png", picture(200 + n)) for n in range(4)])
    list_of(
        folder / "a.csv",
        [{"path": f"{n}.png", "label": f"l{n}"} for n in range(4)] + [{"path": "../pool/a.zip", "label": ""}],
    )

    def ran(store: str, **knobs: Any) -> Any:
        sources = [Source(uri=str(pool)), Source(uri=str(folder / "a.csv"))]
        stage = ingest_stage(Ingest(**knobs), {}, "pool", sources)
        outcome = ingest.run(Context(Store(str(tmp_path / store)), stage, f"{knobs}", {}, 1, lambda _: None))
        assert outcome.rows.balanced()
        return outcome

    whole = ran("s", slice_mb=0.01)
    assert (whole.rows.kept, whole.rows.dropped) == (4 * len(ARCHIVES) + 4, {"not_a_file": 1})
    assert ran("s", slice_mb=0.01).details["parts_made"] == 0
    rows = Store(str(tmp_path / "s")).table(whole.tables["locations"]).to_pylist()
    places = [Location(*(row[k] for k in ("image_id", "uri", "member", "offset", "size_bytes"))) for row in rows]
    places.sort(key=lambda place: (place.uri, place.offset))
    assert len(list(read_images(places))) == whole.rows.kept
    assert ran("d", limit=7).rows.kept == 7


def test_every_listed_kind_is_there() -> None:
    kinds = [one.kind for one in containers.containers()]
    assert kinds == ["tar", "parquet", "zip", "tar.gz", "tar.zst", "csv", "jsonl"]
    assert len(set(containers.suffixes())) == len(containers.suffixes())
    assert Member("a", 0, 0).identity == ("a", 0, 0, "", "", (), False), "part of the keys of stores that are there"
