import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from builders import id_of, picture, write_folder, write_parquet, write_tar

from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.listing import SourceFile, expand
from lodeset.pipeline.sources.metadata import BadMetadata, field_of, fields_of, from_fields, plain
from lodeset.pipeline.sources.reading import Location, read_images, read_slice
from lodeset.pipeline.sources.slices import Slice, chosen_members, cut, members_of, split_loose
from lodeset.pipeline.sources.tars import tar_members
from lodeset.pipeline.stages.ingest.run import ingest_slice

LIMIT = 10**6


def slices_of(path: Path, slice_bytes: int = 2_000) -> list[Slice]:
    out: list[Slice] = []
    for file in expand([Source(uri=str(path))], "pool"):
        members = members_of(file)
        out += cut(file, chosen_members(file, members), slice_bytes)
    return out


def samples(pieces: list) -> list:
    return [sample for piece in pieces for sample in read_slice(piece, LIMIT)]


# -- slices


def test_every_member_is_in_one_slice_and_samples_stay_together(tmp_path: Path) -> None:
    members = []
    for i in range(30):
        members += [(f"d/{i:03d}.png", picture(i)), (f"d/{i:03d}.json", b'{"label": "l%d"}' % i)]
    path = write_tar(tmp_path / "a.tar", members)
    pieces = slices_of(path)
    assert len(pieces) > 5
    assert [m.name for piece in pieces for m in piece.members] == [name for name, _ in members if name.endswith(".png")]
    assert all([s.name for s in m.sidecars] == [f"{m.sample}.json"] for piece in pieces for m in piece.members)
    found = samples(pieces)
    assert [s.data for s in found] == [data for name, data in members if name.endswith(".png")]
    assert [s.metadata.label for s in found] == [f"l{i}" for i in range(30)]


def test_offsets_are_those_of_the_payload(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i)) for i in range(5)])
    whole = path.read_bytes()
    for sample in samples(slices_of(path)):
        assert whole[sample.offset : sample.offset + sample.size_bytes] == sample.data


def _loose(names: list[str]) -> list[SourceFile]:
    return [SourceFile("/pool", name, "loose", 1_000, "t") for name in names]


@pytest.mark.parametrize("count", [1, 7, 16, 31, 32, 63, 160, 161, 500])
def test_a_new_file_changes_its_slice_and_splits_one_at_most(count: int) -> None:
    """1,000 bytes a file, 10,000 a slice: every tenth file is the start of one more slice."""
    names = [f"{i // 10}/{i}.jpg" for i in range(count)]
    before = {piece.members for piece in split_loose(_loose(names), 10_000)}
    after = {piece.members for piece in split_loose(_loose([*names, "new/file.jpg"]), 10_000)}
    assert sorted(m.name for members in after for m in members) == sorted([*names, "new/file.jpg"])
    grown = -(-(count + 1) // 10) > -(-count // 10)
    assert len(before - after) <= 1 + grown
    assert len(after - before) <= 1 + 2 * grown


def test_files_that_share_all_up_to_their_first_dot_are_cut(tmp_path: Path) -> None:
    pieces = split_loose(_loose([f"v1.{n:06d}.jpg" for n in range(5_000)]), 10**9)
    assert len(pieces) == 3
    assert max(len(piece.members) for piece in pieces) < 3_000


def test_a_sidecar_is_part_of_what_its_images_were_when_listed(tmp_path: Path) -> None:
    """An edited caption changes the slices that hold its images, wherever these lie."""
    names = [*(f"v1.{n}.png" for n in range(50)), "v1.txt", "v2.png"]
    before = split_loose(_loose(names), 10_000)
    edited = [replace(f, state="later") if f.relative == "v1.txt" else f for f in _loose(names)]
    changed = [b != a for b, a in zip(before, split_loose(edited, 10_000), strict=True)]
    assert changed == [any(m.sample == "v1" for m in piece.members) for piece in before]
    assert sum(changed) > 1


def test_sidecars_of_loose_files_lie_in_their_image_s_slice(tmp_path: Path) -> None:
    write_folder(
        tmp_path, [(f"{i}.png", picture(i)) for i in range(20)] + [(f"{i}.txt", b"caption %d" % i) for i in range(20)]
    )
    pieces = split_loose(expand([Source(uri=str(tmp_path))], "pool"), 2_000)
    found = samples(pieces)
    assert len(pieces) > 2
    assert {s.metadata.caption for s in found} == {f"caption {i}" for i in range(20)}


def test_a_file_is_read_forward_though_its_labels_lie_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [(f"{n}.png", picture(n)) for n in range(6)] + [(f"{n}.cls", b"%d" % n) for n in range(6)]
    path = write_tar(tmp_path / "a.tar", members)
    offsets: dict[int, list[int]] = {}
    read_at = Bytes.read_at

    def watched(self: Bytes, offset: int, size: int) -> bytes:
        offsets.setdefault(id(self), []).append(offset)
        return read_at(self, offset, size)

    monkeypatch.setattr(Bytes, "read_at", watched)
    for far, handles in ((1, 2), (10**6, 1)):
        monkeypatch.setattr("lodeset.pipeline.sources.reading._FAR_BYTES", far)
        offsets.clear()
        found = samples(slices_of(path, 10**6))
        assert [s.metadata.label for s in found] == [str(n) for n in range(6)]
        assert len(offsets) == handles
        assert handles == 1 or all(forward == sorted(forward) for forward in offsets.values())


# -- hostile and broken archives


def test_unreadable_tar_is_one_reject(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"not a tar" * 1000)
    (only,) = samples(slices_of(path))
    assert only.reason == "unreadable_archive"


def test_truncated_tar_keeps_what_is_whole(tmp_path: Path) -> None:
    data = [picture(i) for i in range(6)]
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", d) for i, d in enumerate(data)])
    whole = path.read_bytes()
    last = list(tar_members(io.BytesIO(whole), len(whole)))[-1]
    path.write_bytes(whole[: last.offset + 100])
    found = samples(slices_of(path))
    assert [s.data for s in found if not s.reason] == data[:5]
    assert [s.reason for s in found if s.reason] == ["truncated"]


def test_links_devices_and_odd_names_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.FIFOTYPE, "fifo.png"), (tarfile.DIRTYPE, "dir")):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.linkname = "/etc/passwd"
            tar.addfile(entry)
        entry = tarfile.TarInfo("../../evil.png")
        entry.size = len(picture(1))
        tar.addfile(entry, io.BytesIO(picture(1)))
    found = samples(slices_of(path))
    assert sorted(s.reason for s in found) == ["", "not_a_file", "not_a_file"]


def test_a_tar_whose_members_go_backwards_ends(tmp_path: Path) -> None:
    """CVE-2025-8194: a negative size sends Python's reader round in circles."""
    path = write_tar(tmp_path / "a.tar", [("a.png", picture(1)), ("b.png", picture(2))])
    data = bytearray(path.read_bytes())
    header = data[:512]
    header[124:136] = b"\xff" * 12  # base-256, negative
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(data[512:]))
    assert [(s.member, s.reason) for s in samples(slices_of(path))] == [("a.png", "unreadable_archive"), ("b.png", "")]


def test_repeated_member_names_are_images_of_their_own(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("x.png", picture(1)), ("x.png", picture(2))])
    tables, counts = ingest_slice("pool", slices_of(path, 10**6)[0], Ingest())
    assert tables["images"]["image_id"].to_pylist() == [id_of(picture(1)), id_of(picture(2))]
    assert len(set(tables["locations"]["offset"].to_pylist())) == counts["files"] == 2


# -- Parquet


def test_parquet_rows_and_their_columns(tmp_path: Path) -> None:
    data = [picture(i) for i in range(10)]
    path = write_parquet(tmp_path / "a.parquet", data, label=[f"l{i}" for i in range(10)], split=["test"] * 10)
    pieces = slices_of(path)
    assert [len(piece.members) for piece in pieces] == [4, 4, 2], "a row group each"
    assert [len(piece.members) for piece in slices_of(path, 10**6)] == [10]
    found = samples(pieces)
    assert [s.data for s in found] == data == [s.data for s in samples(slices_of(path, 10**6))]
    assert found[7].metadata.label == "l7"
    assert json.loads(found[7].metadata.extra or "{}") == {"split": "test"}
    places = [Location(id_of(s.data), s.uri, s.member, s.offset, s.size_bytes) for s in found]
    assert [d for _, d in read_images(places)] == data


def test_parquet_without_the_column(tmp_path: Path) -> None:
    (only,) = samples(slices_of(write_parquet(tmp_path / "a.parquet", [picture(1)]).rename(tmp_path / "b.parquet")))
    assert not only.reason
    files = expand([Source(uri=str(tmp_path / "b.parquet"), image="photo")], "pool")
    (member,) = members_of(files[0])
    assert member.reason == "wrong_image_column"
    assert "`image: image` may be meant" in member.detail and "there are: image (binary)" in member.detail


# -- reading again, metadata


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", picture(1))])
    (sample,) = samples(slices_of(path))
    write_tar(path, [("a.png", picture(2))])
    with pytest.raises(
        LodesetError, match=r"no longer those that were ingested .* run again, and ingest will read the new ones"
    ):
        list(read_images([Location(id_of(picture(1)), sample.uri, "a.png", sample.offset, sample.size_bytes)]))


def test_accounting_of_a_slice(tmp_path: Path) -> None:
    """files = places + rejects, whatever the files are."""
    members = [
        ("a.png", picture(1)),
        ("b.png", picture(1)),
        ("c.jpg", b"broken"),
        ("d.png", picture(2)),
        ("d.json", b"{"),
        ("orphan.json", b"{}"),
        ("empty.png", b""),
    ]
    (piece,) = slices_of(write_tar(tmp_path / "a.tar", members), 10**6)
    tables, counts = ingest_slice("pool", piece, Ingest())
    assert counts["files"] == tables["locations"].num_rows + tables["rejects"].num_rows == 7
    assert tables["images"].num_rows == 2
    reasons = sorted(tables["rejects"]["reason"].to_pylist())
    assert reasons == ["bad_metadata", "empty", "metadata_without_image", "not_an_image"]


def test_known_fields_become_columns_and_places_are_dropped() -> None:
    fields = {"class": 3, "text": "hi", "license": "CC0", "gps_lat": 1.0, "latitude": 2.0, "size": {"w": 1, "geo": 5}}
    said = from_fields(plain(fields))
    assert (said.label, said.caption, said.licence) == ("3", "hi", "CC0")
    assert json.loads(said.extra or "") == {"size": {"w": 1}}
    assert field_of({"label": "3", "extra": said.extra}, "class") == "3"
    assert field_of({"extra": '{"split": "test"}'}, "split") == "test"


@pytest.mark.parametrize("data", [b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_bad_sidecars(data: bytes) -> None:
    with pytest.raises(BadMetadata):
        fields_of(".json", data)
