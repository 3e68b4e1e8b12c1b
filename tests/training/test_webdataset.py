"""Foreign WebDatasets and training without the DAG."""

import hashlib
import io
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from builders import id_of, write_shards
from inline import alone_in_this_process
from PIL import Image

from lodeset.infra.models import train_on
from lodeset.pipeline.errors import LodesetError
from lodeset.training.config import TrainingConfig
from lodeset.training.index import Shards, open_index
from lodeset.training.launch import train_inline
from lodeset.training.stages import train
from lodeset.training.webdataset import braces_expanded, shards_of


def foreign(path: Path, payloads: list[bytes], image: str = "jpg") -> Path:
    """Samples as others write them: captions and arrays beside the images, names of their own."""
    with tarfile.open(path, "w") as tar:
        for number, payload in enumerate(payloads):
            for extension, data in (("txt", b"a caption"), (image, payload), ("npy", b"\x93NUMPY")):
                member = tarfile.TarInfo(f"part/{number:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_a_foreign_webdataset_is_read_like_our_own_shards(
    tmp_path: Path, index_url: str, payloads: list[bytes], small: TrainingConfig
) -> None:
    for number in range(2):
        foreign(tmp_path / f"train-{number:03d}.tar", payloads[number::2], "PNG")
    ours = open_index([index_url])
    found = shards_of([str(tmp_path / "train-{000..001}.tar")], tmp_path / "index")
    theirs = open_index(found.index)
    assert theirs.digest() == ours.digest()
    assert theirs.read(range(22)) == ours.read(range(22))
    assert shards_of([str(tmp_path / "*.tar")], tmp_path / "other").index != found.index
    assert shards_of([index_url], tmp_path / "none") == Shards(index=(index_url,))

    for name, shards in (("ours", Shards(index=(index_url,))), ("theirs", found)):
        train_inline(small, shards, tmp_path / name)
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()


def test_a_folder_of_images_is_read_like_shards(
    tmp_path: Path, index_url: str, payloads: list[bytes], small: TrainingConfig
) -> None:
    for number, payload in enumerate(payloads):
        name = f"{'a b'[number % 3]}/{number}{('.png', '', '.jpe', '.dat')[number % 4]}"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(payload)
    for name, data in (
        ("notes.txt", b"BM is no image"),
        ("page.jpg", b"<html>"),
        ("x.npy", b"\x93NUMPY"),
        ("empty.png", b""),
    ):
        (tmp_path / "images" / name).write_bytes(data)
    ours, found = open_index([index_url]), shards_of([str(tmp_path / "images")], tmp_path / "index")
    theirs = open_index(found.index)
    assert len(found.index) == 1 and theirs.digest() == ours.digest()
    assert theirs.read(range(22)) == ours.read(range(22))
    train_inline(small, found, tmp_path / "theirs")
    train_inline(small, Shards(index=(index_url,)), tmp_path / "ours")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()
    before = Path(found.index[0]).stat().st_mtime_ns
    assert shards_of([str(tmp_path / "images")], tmp_path / "index") == found
    assert Path(found.index[0]).stat().st_mtime_ns == before
    (tmp_path / "images/a/0.png").unlink()
    assert len(open_index(shards_of([str(tmp_path / "images")], tmp_path / "index").index)) == 21


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_members_are_images_by_their_bytes(tmp_path: Path, kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 30)).save(data, kind)
    foreign(tmp_path / "odd.tar", [data.getvalue()], "jpg_large")
    foreign(tmp_path / "none.tar", [b"RIFF....WAVE", b"BMX", b"....ftypmp42"], "jpg")
    (path,) = shards_of([str(tmp_path / "*.tar")], tmp_path / "index").index
    assert pq.read_table(path)["image_id"].to_pylist() == [id_of(data.getvalue())]


def test_an_index_is_made_once_and_anew_when_its_tar_changes(tmp_path: Path, payloads: list[bytes]) -> None:
    tar = foreign(tmp_path / "a.tar", payloads[:4])
    (path,) = shards_of([str(tar)], tmp_path / "index").index
    before = Path(path).stat().st_mtime_ns
    assert shards_of([str(tar)], tmp_path / "index").index == (path,)
    assert Path(path).stat().st_mtime_ns == before
    foreign(tar, payloads[:6])
    (changed,) = shards_of([str(tar)], tmp_path / "index").index
    assert changed != path and pq.read_metadata(changed).num_rows == 6


def test_what_is_no_webdataset_is_refused(
    tmp_path: Path, payloads: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "page.html").write_text("<html>")
    with pytest.raises(
        LodesetError, match=r"1 files hold no image, the first of them is .*page.html.*a folder of images"
    ):
        shards_of([str(tmp_path / "page.html")], tmp_path / "index")
    with pytest.raises(LodesetError, match=r"nothing is at .*gone-01.tar"):
        shards_of([str(tmp_path / "gone-{01..02}.tar")], tmp_path / "index")
    (tmp_path / "text.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(LodesetError, match=r"text.tar cannot be read as a tar"):
        shards_of([str(tmp_path / "text.tar")], tmp_path / "index")
    foreign(tmp_path / "none.tar", [b"1", b"2"], "wav")
    with pytest.raises(LodesetError, match=r"1 files hold no image, the first of them is .*none.tar"):
        shards_of([str(tmp_path / "none.tar")], tmp_path / "index")
    # What is left of a tar that was cut short is trained on.
    whole = foreign(tmp_path / "cut.tar", payloads[:8]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (path,) = shards_of([str(tmp_path / "cut.tar")], tmp_path / "index").index
    assert 1 < pq.read_metadata(path).num_rows < 8
    assert "cut.tar: 1 members cannot be read, the first at byte" in caplog.text


def test_braces_are_those_of_webdataset() -> None:
    assert list(braces_expanded("a.tar")) == ["a.tar"]
    assert list(braces_expanded("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(braces_expanded("{x,y}/{1..2}")) == ["x/1", "x/2", "y/1", "y/2"]
    assert list(braces_expanded("{x}")) == ["{x}"]
    with pytest.raises(LodesetError, match=r"\{5\.\.2\}.*is empty"):
        list(braces_expanded("a-{5..2}.tar"))


def test_stages_follow_one_another_in_folders_of_their_own(
    tmp_path: Path, payloads: list[bytes], small: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone_in_this_process(monkeypatch, train)
    monkeypatch.setattr(
        train, "launch", lambda config, shards, folder, cpus, origin: train_inline(config, shards, folder, origin)
    )
    tree = {
        "finish": {"global_size": 48, "steps": 4},
        "distill": {"model": {"dim": 8, "depth": 1, "heads": 1}, "steps": 3},
    }
    config = TrainingConfig.model_validate(small.model_dump() | tree)
    shards = Shards(index=(write_shards(tmp_path / "shards", payloads),))
    told = train_on(config, shards, tmp_path / "out", cpus=1)
    assert {name: one["steps"] for name, one in told.items()} == {"train": 6, "finish": 4, "distill": 3}
    assert all((tmp_path / "out" / name / "model.safetensors").is_file() for name in told)
    assert all(one["folder"] == str(tmp_path / "out" / name) for name, one in told.items())
    assert train_on(config, shards, tmp_path / "out", cpus=1) == told


@pytest.mark.parametrize("url", ["a-{0..99999999999999999999999}.tar", "{0..9999999}.tar", "{1..99999}{1..99999}.tar"])
def test_ranges_without_end_are_refused_at_once(url: str, tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match="more than 1,000,000 files"):
        shards_of([url], tmp_path)


def test_one_broken_tar_among_others_is_left_out_and_told(
    tmp_path: Path, payloads: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    foreign(tmp_path / "good.tar", payloads[:4])
    (tmp_path / "bad.tar").write_bytes(b"<html>not found</html>" * 100)
    (path,) = shards_of([str(tmp_path / "*.tar")], tmp_path / "index").index
    assert pq.read_metadata(path).num_rows == 4
    assert "left out" in caplog.text and "bad.tar cannot be read as a tar" in caplog.text


def test_train_takes_what_a_run_takes(tmp_path: Path, payloads: list[bytes]) -> None:
    """By content: names without extension, and a PNG whose text Pillow refuses to open."""
    import struct
    import zlib

    from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = payloads[2][:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2**27)) + payloads[2][33:]
    files = {
        "a": payloads[0],
        "b.jpg_large": payloads[1],
        "c.png": bomb,
        "d.png": b"\x89PNG broken",
        "e.heic": b"\0\0\0\x18ftypheic" + bytes(99),
    }
    taken = set()
    for data in files.values():
        try:
            decode(data)
            taken.add(hashlib.sha256(data).hexdigest()[:32])
        except Unreadable:
            pass
    for name, data in files.items():
        path = tmp_path / "loose" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in files:
            tar.add(tmp_path / "loose" / name, name)
    for uri in (tmp_path / "loose", tmp_path / "all.tar"):
        (index,) = shards_of([str(uri)], tmp_path / "index").index
        assert set(pq.read_table(index)["image_id"].to_pylist()) == taken
    assert len(taken) == 3
