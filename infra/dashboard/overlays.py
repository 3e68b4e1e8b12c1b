"""Two images laid over each other as dedup aligned them: made in the worker that decodes images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.infra.dashboard import decoding

Kind = Literal["aligned", "overlay", "difference"]
SIDE = 640
QUALITY = 85
OUTSIDE = 0.25  # brightness that is left of what only the first image shows
AMPLIFIED = 3.0

Floats = NDArray[np.float32]


def map_of(stored: Sequence[float] | None, transform: str | None) -> list[float] | None:
    """The affine map from the second image's coordinates to the first's, [6]: the stored one, or that of the orientation in which the
    two were compared. None where it can't be turned round.
    """
    from lodeset.pipeline.algorithms.copies.views import (
        ORIENTATIONS,
        starts,
    )  # with torch, which most pages do not need

    if stored is not None:
        found = [float(one) for one in stored]
    else:
        names = [one.name for one in ORIENTATIONS]
        turned = names.index(transform) if transform in names else names.index("identity")
        found = starts()[turned].reshape(-1).astype(float).tolist()
    determinant = found[0] * found[4] - found[1] * found[3]
    return found if np.isfinite(found).all() and abs(determinant) > 1e-4 else None


def compared(first: bytes, second: bytes, to_first: Sequence[float], kind: Kind, max_pixels: int) -> bytes:
    """The second image placed on the first, as a WebP in the first one's frame: alone, half transparent, or how much it differs.

    Raises:
        PictureError: one of them is no image, or passes a limit.
    """
    found: bytes = decoding.worker().run(_compared, first, second, list(to_first), kind, max_pixels)[0]
    return found


def _compared(first: bytes, second: bytes, to_first: list[float], kind: Kind, max_pixels: int) -> Iterator[bytes]:
    below, above = (_small(decoding.opened(data, max_pixels)) for data in (first, second))
    placed, inside = _placed(above, below.size, to_first)
    ground, top = np.asarray(below, np.float32), np.asarray(placed, np.float32)
    seen = np.asarray(inside, bool)[:, :, None]
    if kind == "aligned":
        picture = np.where(seen, top, ground * OUTSIDE)
    elif kind == "overlay":
        picture = np.where(seen, (ground + top) / 2, ground * OUTSIDE)
    else:
        picture = np.where(seen, difference(ground, top, seen[:, :, 0])[:, :, None], ground * OUTSIDE)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "WEBP", quality=QUALITY)
    yield buffer.getvalue()


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def _placed(image: Image.Image, size: tuple[int, int], to_first: Sequence[float]) -> tuple[Image.Image, Image.Image]:
    """An image in the frame of another of `size`, and where it covers that."""
    width, height = size
    linear = np.eye(3)
    linear[:2] = np.reshape(to_first, (2, 3))
    # From pixels of the frame to -1..1 there, to -1..1 of the image, to its pixels.
    frame = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
    own = np.array([[image.width / 2, 0, image.width / 2], [0, image.height / 2, image.height / 2], [0, 0, 1]])
    whole = own @ np.linalg.inv(linear) @ frame
    numbers = tuple(whole[:2].reshape(-1).tolist())
    moved = image.transform(size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)
    covers = Image.new("1", image.size, 1).transform(size, Image.Transform.AFFINE, numbers, Image.Resampling.NEAREST)
    return moved, covers


def difference(ground: Floats, top: Floats, seen: NDArray[np.bool_]) -> Floats:
    """How much two pictures [H, W, 3] differ in brightness where both are seen, [H, W], 0 to 255: the mean and the contrast of each
    channel of the upper one are first made those of the lower one, since copies are often brighter or paler.
    """
    if not seen.any():
        return np.zeros(seen.shape, np.float32)
    low, high = ground[seen], top[seen]
    scale = low.std(axis=0) / np.maximum(high.std(axis=0), 1.0)
    matched = (top - high.mean(axis=0)) * scale.clip(0.25, 4.0) + low.mean(axis=0)
    return np.asarray(np.abs(ground - matched).mean(axis=2) * AMPLIFIED, np.float32)
