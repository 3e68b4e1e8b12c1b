"""Show what patches have in common as colors: principal components of their features (DINOv2, section 7.5, figure 1).

Shapes: n images of rows x columns patches, D width.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.tables import records
from lodeset.training.augment import normalised
from lodeset.training.backbone import Backbone
from lodeset.training.evaluate import centre_square

STRETCHED = (1, 99)  # percentiles of a component that are mapped to 0 and 255


def pca_pictures(patches: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colors [n, rows, columns, 3] of the patches [n, rows, columns, D] of images that are shown together.

    The first component of all patches separates foreground from background. Its sign is arbitrary, so the side of the
    patches in the middle of the images is taken as the foreground. The first three components of the foreground become
    red, green and blue; the background is black. The signs of these components are arbitrary too: the farthest patch of
    each is bright.
    """
    n, rows, columns, width = patches.shape
    flat = patches.reshape(-1, width).astype(np.float64)
    parting = _components(flat, 1).reshape(n, rows, columns)
    middle = parting[:, rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]
    foreground = parting * (1 if middle.mean() >= 0 else -1) > 0
    colours = np.zeros((n, rows, columns, 3), np.uint8)
    if foreground.sum() > 3:
        components = _components(flat[foreground.ravel()], 3)
        low, high = np.percentile(components, STRETCHED, axis=0)
        stretched = (components - low) / np.maximum(high - low, 1e-12)
        colours[foreground] = np.round(255 * stretched.clip(0, 1))
    return colours


def picture_table(
    model: Backbone, network: str, target: str, places: Sequence[Location], size: int, max_pixels: int
) -> pa.Table:
    """`pictures` rows of the images at `places`, as seen by `model` at `size` pixels per side, a multiple of its patch
    size.
    """
    places = sorted(places, key=lambda p: (p.uri, p.offset, p.member))
    images = [np.asarray(decode(data, max_pixels)) for _, data in read_images(places)]
    squares = np.stack([centre_square(image, size) for image in images])
    side = size // model.config.patch_size
    with torch.inference_mode():
        patches = model.eval()(normalised(torch.from_numpy(squares))).patches
    colours = pca_pictures(patches.numpy().reshape(len(images), side, side, -1))
    rows = [
        (target, place.image_id, network, _png(square.transpose(1, 2, 0)), _png(picture))
        for place, square, picture in zip(places, squares, colours, strict=True)
    ]
    return pa.Table.from_pydict(
        dict(zip(records.PICTURES.names, zip(*rows, strict=True), strict=True)), records.PICTURES
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _components(x: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The first `count` principal components of rows x, [rows, count]; zeros beyond the width."""
    centred = x - x.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    scores = centred @ directions[:, ::-1][:, :count]
    farthest = np.take_along_axis(scores, np.abs(scores).argmax(axis=0)[None], axis=0)
    components = np.zeros((len(x), count))
    components[:, : scores.shape[1]] = scores * np.where(farthest < 0, -1, 1)
    return components
