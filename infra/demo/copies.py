"""Files of the sample world: an image as a crawl stores it, copies of it, and files that cannot be decoded."""

import hashlib
import io
import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

NEAR_KINDS = ("reencode", "resize", "crop", "flip", "brightness", "tint", "grey", "stamp")
LEAK_KINDS = ("exact", "reencode", "resize")
COPIES = (7, 1, 1, 2, 3, 1, 2, 1)  # numbers of copies, cycled over the sources: every eighth picture is a popular one
REJECTS: Mapping[str, int] = {"truncated": 4, "empty": 2, "text": 2, "bomb": 1}


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    suffix: str
    concept: str | None = None  # None: not a readable image

    @property
    def image_id(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:32]


def saved(image: Image.Image, form: str, concept: str | None, **options: object) -> StoredFile:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return StoredFile(buffer.getvalue(), "jpg" if form == "jpeg" else form, concept)


def upright(data: bytes) -> Image.Image:
    """Decoded RGB: EXIF orientation applied, transparency over white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def near_copies(
    originals: Sequence[StoredFile], count: int, rng: np.random.Generator
) -> list[tuple[StoredFile, list[tuple[str, StoredFile]]]]:
    """`count` copies that cycle through the kinds, as many per source as `COPIES` says: (source, [(kind, copy),
    ...]).
    """
    groups: list[tuple[StoredFile, list[tuple[str, StoredFile]]]] = []
    done = 0
    for source, copies in zip(rng.permutation(len(originals)), itertools.cycle(COPIES), strict=False):
        kinds = [NEAR_KINDS[(done + i) % len(NEAR_KINDS)] for i in range(min(copies, count - done))]
        if not kinds:
            break
        groups.append((originals[source], [(kind, copy_of(originals[source], kind, rng)) for kind in kinds]))
        done += len(kinds)
    return groups


def copy_of(source: StoredFile, kind: str, rng: np.random.Generator) -> StoredFile:
    """A copy of a kind in `NEAR_KINDS` or `LEAK_KINDS`."""
    if kind == "exact":
        return source
    image = upright(source.data)
    width, height = image.size
    if kind == "resize":
        factor = float(rng.choice([rng.uniform(0.55, 0.8), rng.uniform(1.25, 1.7)]))
        image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
    elif kind == "crop":
        kept = [int(np.ceil(side * rng.uniform(0.87, 0.95))) for side in image.size]
        left, top = (int(rng.integers(side - k + 1)) for side, k in zip(image.size, kept, strict=True))
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    elif kind == "flip":
        image = ImageOps.mirror(image)
    elif kind == "brightness":
        factor = float(rng.choice([rng.uniform(0.7, 0.85), rng.uniform(1.12, 1.25)]))
        image = image.point(lambda level: level * factor)
    elif kind == "tint":
        warmth = float(rng.choice([-1, 1])) * rng.uniform(0.08, 0.2)
        red, green, blue = image.split()
        red, blue = red.point(lambda level: level * (1 + warmth)), blue.point(lambda level: level * (1 - warmth))
        image = Image.merge("RGB", (red, green, blue))
    elif kind == "grey":
        image = ImageOps.grayscale(image)
    elif kind == "stamp":
        text = str(rng.choice(["SAMPLE", "(c) 2031", "preview"]))
        font = ImageFont.load_default(max(9, min(width, height) // 9))
        at = (width * rng.uniform(0.03, 0.3), height * rng.choice([0.05, 0.85]))
        ImageDraw.Draw(image).text(at, text, fill="white", font=font, stroke_width=1, stroke_fill="black")
    if kind == "reencode" and rng.random() < 0.5:
        return saved(image, "webp", source.concept, quality=int(rng.integers(45, 75)))
    return saved(image, "jpeg", source.concept, quality=int(rng.integers(45, 90)))


def broken_files(originals: Sequence[StoredFile]) -> list[StoredFile]:
    """Files with the names of images that cannot be decoded safely, as many of each kind as `REJECTS` says."""
    jpegs = (file.data[: len(file.data) * 6 // 10] for file in originals if file.suffix == "jpg")
    return [
        *(StoredFile(next(jpegs), "jpg") for _ in range(REJECTS["truncated"])),
        *(StoredFile(b"", "jpg") for _ in range(REJECTS["empty"])),
        *(
            StoredFile(f"<html><body>404 not found ({i})</body></html>\n".encode(), "jpg")
            for i in range(REJECTS["text"])
        ),
        *(StoredFile(_bomb(50_000 + i), "png") for i in range(REJECTS["bomb"])),
    ]


def _bomb(side: int) -> bytes:
    """A PNG of a few dozen bytes that claims side x side pixels (PNG specification, 5.3 chunk layout, 11.2.1 IHDR)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
