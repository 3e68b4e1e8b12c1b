"""A messy folder, as people have them: formats, names and layouts of some sixty kinds, to try a whole run by hand.

    python benchmarks/messy.py FOLDER        # makes FOLDER/photos, and prints what is in it
    cd FOLDER && lodeset init && lodeset run lodeset.yaml && lodeset status lodeset.yaml    # after setting `pool: photos`

The same folder each time. Nothing of it may stop the run but what a user should know first; every message should say what it is
about and what to do.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

PLAIN_PHOTOS = 60


def drawing(seed: int, width: int = 240, height: int = 180) -> Image.Image:
    """Blobs, shapes and grain: no two alike."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(0, 256, (5, 5, 3)).astype(np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = chance.uniform(0, width * 0.8), chance.uniform(0, height * 0.8)
        box = (x, y, x + chance.uniform(8, 70), y + chance.uniform(8, 60))
        fill = tuple(int(v) for v in chance.integers(0, 256, 3))
        (draw.ellipse if chance.random() < 0.5 else draw.rectangle)(box, fill=fill)
    grain = chance.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 0) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tar_of(members: list[tuple[str, bytes]], mode: Any = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def parquet_of(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def with_gps(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)})
    return encoded(image, exif=exif)


def files() -> dict[str, bytes]:
    """Path -> bytes, of everything that is a plain file."""
    d, e = drawing, encoded
    photo = e(d(900))
    grey = np.asarray(d(901).convert("L"))
    found: dict[str, bytes] = {f"2023/summer/IMG_{n:04}.JPG": e(d(n), quality=88) for n in range(PLAIN_PHOTOS)}
    found |= {
        # formats
        "formats/progressive.jpg": e(d(100), progressive=True),
        "formats/cmyk.jpg": e(d(101).convert("CMYK")),
        "formats/grey.jpg": e(d(102).convert("L")),
        "formats/turned_with_gps.jpg": with_gps(d(103)),
        "formats/two_pictures.mpo": e(d(104), "MPO", save_all=True, append_images=[d(105)]),
        "formats/palette.png": e(d(106).convert("P"), "PNG", transparency=3),
        "formats/one_bit.png": e(d(107).convert("1"), "PNG"),
        "formats/logo_on_nothing.png": e(d(108).convert("RGBA"), "PNG"),
        "formats/grey16.png": e(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "formats/ten_bits_in_16.png": e(Image.fromarray(grey.astype(np.uint16) * 4), "PNG"),
        "formats/animated.gif": e(d(109), "GIF", save_all=True, append_images=[d(110), d(111)]),
        "formats/animated.webp": e(d(112), "WEBP", save_all=True, append_images=[d(113)]),
        "formats/lossless.webp": e(d(114), "WEBP", lossless=True),
        "formats/picture.avif": e(d(115), "AVIF"),
        "formats/picture.bmp": e(d(116), "BMP"),
        "formats/lzw.tif": e(d(117), "TIFF", compression="tiff_lzw"),
        "formats/float.tiff": e(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "formats/pages.tif": e(d(118), "TIFF", save_all=True, append_images=[d(119)]),
        "formats/picture.jp2": e(d(120), "JPEG2000"),
        "formats/picture.ppm": e(d(121), "PPM"),
        "formats/picture.pgm": e(d(122).convert("L"), "PPM"),
        "formats/icon.ico": e(d(123).resize((64, 64)), "ICO"),
        "formats/picture.tga": e(d(124), "TGA"),
        "formats/phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(256)) * 8,
        "formats/new.jxl": b"\xff\x0a" + bytes(range(256)) * 4,
        "formats/camera.cr2": b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(4_000),
        "formats/layers.psd": b"8BPS\x00\x01" + bytes(2_000),
        "formats/drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="5"/></svg>',
        "formats/paper.pdf": b"%PDF-1.7\n" + bytes(500),
        "formats/clip.mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2" + bytes(3_000),
        # broken and malicious
        "broken/empty.jpg": b"",
        "broken/lacks_its_end.jpg": photo[:-2],
        "broken/half.jpg": photo[: len(photo) // 2],
        "broken/page_instead.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "broken/lfs_pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "broken/bomb.png": png(50_000, 50_000, zlib.compress(bytes(10**6))),
        "broken/hair.png": png(100_000_000, 1, zlib.compress(bytes(1 + 12_500_000)), bits=1),
        "broken/odd_exif.jpg": photo[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff" + photo[2:],
        # names
        "names/no_extension": e(d(200)),
        "names/wrong.png": e(d(201)),
        "names/photo.jpg_large": e(d(202)),
        "names/two  spaces & signs #1 100%?.jpg": e(d(203)),
        "names/Größe – 写真 😀.jpg": e(d(204)),
        "names/new\nline.jpg": e(d(205)),
        "names/\x1b[31mred.jpg": e(d(206)),
        "names/-rf.jpg": e(d(207)),
        "names/[1] {a,b} (copy).jpg": e(d(208)),
        f"names/{'long' * 60}.jpg": e(d(209)),
        "names/img_0.5_a.jpg": e(d(210)),
        "names/img_0.5_a.json": json.dumps({"url": "https://example.org/a", "caption": "half"}).encode(),
        "names/img_0.7_b.jpg": e(d(211)),
        "names/img_0.7_b.json": json.dumps({"URL": "https://u:secret@example.org/b"}).encode(),
        # sidecars
        "said/cat.jpg": e(d(220)),
        "said/cat.txt": "\ufeffa cat on a mat".encode(),
        "said/dog.jpg": e(d(221)),
        "said/dog.json": json.dumps({"TEXT": "a dog", "latlng": [52.5, 13.4], "label": 3}).encode(),
        "said/lonely.json": b'{"caption": "its image is gone"}',
        "said/broken.jpg": e(d(222)),
        "said/broken.json": b"{not json",
        "said/notes.md": b"# notes",
        "said/list.csv": b"file,label\ncat.jpg,cat\n",
        "said/Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(500),
        ".DS_Store": bytes(100),
        "__MACOSX/._IMG_0001.JPG": b"\0\x05\x16\x07" + bytes(80),
        # layouts
        "classes/label=cat/split=test/1.jpg": e(d(230)),
        "classes/label=dog/2.jpg": e(d(231)),
        "a/very/deep/folder/of/folders/3.jpg": e(d(232)),
        "archives/plain.tar": tar_of([(f"{n}.jpg", e(d(240 + n))) for n in range(4)]),
        "archives/pictures_and_masks.tar": tar_of(
            [m for n in range(3) for m in ((f"{n}.jpg", e(d(250 + n))), (f"{n}.seg.png", e(d(250 + n).convert("1"), "PNG")))]
        ),
        "archives/cut.tar": tar_of([(f"{n}.jpg", e(d(260 + n))) for n in range(4)])[:20_000],
        "archives/packed.tar.gz": tar_of([("0.jpg", e(d(270)))], "w:gz"),
        "archives/photos.zip": zip_of([("0.jpg", e(d(271)))]),
        "archives/one.jpg.gz": gzip.compress(e(d(272)), mtime=0),
        "tables/images.parquet": parquet_of(image=[e(d(280 + n)) for n in range(3)], text=["a", "b", "c"]),
        "tables/other_column.parquet": parquet_of(img=[e(d(290 + n)) for n in range(3)]),
        "tables/base64.parquet": parquet_of(image=[base64.b64encode(e(d(295 + n))).decode() for n in range(2)]),
        "tables/no_images.parquet": parquet_of(a=[1, 2, 3]),
        # copies
        "copies/again.jpg": e(d(0), quality=88),
        "copies/small.jpg": e(d(1).resize((120, 90)), quality=80),
        "copies/blurred.jpg": e(d(2).resize((60, 45)).resize((240, 180)), quality=40),
    }  # fmt: skip
    return found


def links(folder: Path) -> dict[str, Callable[[], None]]:
    """Things that are no plain files, and how each is made."""
    return {
        "links/to_a_photo.jpg": lambda: (folder / "links/to_a_photo.jpg").symlink_to("../2023/summer/IMG_0003.JPG"),
        "links/nowhere.jpg": lambda: (folder / "links/nowhere.jpg").symlink_to("gone.jpg"),
        "links/circle": lambda: (folder / "links/circle").symlink_to(".."),
        "links/pipe.jpg": lambda: os.mkfifo(folder / "links/pipe.jpg"),
        "links/folder.jpg/": lambda: (folder / "links/folder.jpg").mkdir(),
    }


def main() -> None:
    folder = Path(sys.argv[1]) / "photos"
    made = files()
    for name, data in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "links").mkdir()
    others = links(folder)
    for make in others.values():
        make()
    print(
        f"{folder}: {len(made)} files and {len(others)} links, pipes and folders; {PLAIN_PHOTOS} are plain photographs"
    )


if __name__ == "__main__":
    main()
