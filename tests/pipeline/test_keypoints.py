"""Key points find planted maps, in pictures with texture; pictures of nothing have none."""

from __future__ import annotations

import numpy as np
import pytest
from builders import textured
from PIL import Image

from lodeset.pipeline.algorithms.copies import closeup, keypoints
from lodeset.pipeline.algorithms.copies.keypoints import Described, aligned, described, mirrored


def corners_off(first: Described, second: Described, planted: np.ndarray) -> float:
    """How far apart, in coordinates from -1 to 1, a found and a planted map put the second image's corners in the first."""
    found = aligned(first, second)
    assert found is not None
    square = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], float)
    return float(np.abs(square @ (closeup.between(first, second, found) - planted).T).max())


@pytest.mark.parametrize("size", [(160, 128), (64, 64), (900, 700)])
def test_a_crop_is_found_where_it_was_cut(size: tuple[int, int]) -> None:
    image = textured(1, *size)
    left, top, right, bottom = (round(share * side) for share, side in zip((0.3, 0.2, 0.9, 0.8), size * 2, strict=True))
    crop = image.crop((left, top, right, bottom)).resize((200, 170), Image.Resampling.BICUBIC)
    x, y = (2 * np.array([left, right]) / size[0] - 1), (2 * np.array([top, bottom]) / size[1] - 1)
    planted = np.array([[np.diff(x)[0] / 2, 0, x.mean()], [0, np.diff(y)[0] / 2, y.mean()]])
    assert corners_off(described(image), described(crop), planted) < 0.04


def test_turned_and_mirrored_pictures_are_found() -> None:
    image = textured(2)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    assert corners_off(described(image), described(turned), np.array([[0, -1, 0], [1, 0, 0]])) < 0.02
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = aligned(described(image), described(flipped))
    assert found is not None and found.mirrored
    assert corners_off(described(image), described(flipped), np.array([[-1, 0, 0], [0, 1, 0]])) < 0.02


@pytest.mark.parametrize("flipped", [False, True])
def test_the_points_that_agree_lie_where_the_map_puts_them(flipped: bool) -> None:
    image = textured(6)
    other = image.rotate(20, Image.Resampling.BICUBIC)
    other = other.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else other
    first, second = described(image), described(other)
    found = aligned(first, second)
    assert found is not None and found.mirrored == flipped and found.agreeing.shape == (found.inliers, 2)
    assert len(np.unique(found.agreeing[:, 0])) == len(np.unique(found.agreeing[:, 1])) == found.inliers
    places = mirrored(second).places if flipped else second.places
    moved = places[found.agreeing[:, 1]] @ found.map[:, :2].T + found.map[:, 2]
    off = np.linalg.norm(moved - first.places[found.agreeing[:, 0]], axis=1)
    assert np.median(off) < 1 and off.max() < keypoints.REACH + 1  # the map is refined once it is known who agrees


def test_a_mirrored_description_is_that_of_the_mirrored_picture() -> None:
    image = textured(3)
    turned, seen = mirrored(described(image)), described(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    np.testing.assert_array_equal(turned.grey, seen.grey)
    near = np.linalg.norm(turned.places[:, None] - seen.places, axis=2)
    there = near.min(axis=1) < 0.5
    assert there.mean() > 0.9
    similarity = (turned.descriptors @ seen.descriptors.T)[there]
    assert np.median(similarity.max(axis=1)) > 0.98
    twice = mirrored(turned)
    np.testing.assert_array_equal(twice.descriptors, described(image).descriptors)


def test_strangers_and_pictures_of_nothing_are_not_aligned() -> None:
    assert sum(aligned(described(textured(n)), described(textured(n + 50))) is not None for n in range(10, 30)) <= 1
    blank = described(Image.new("RGB", (100, 80), (90, 90, 90)))
    assert len(blank.places) == 0 and aligned(blank, described(textured(4))) is None
    assert aligned(described(textured(4)), blank) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 4_000), (4_000, 3), (2, 70)])
def test_odd_shapes_are_described(size: tuple[int, int]) -> None:
    found = described(Image.new("RGB", size, (9, 99, 199)))
    assert min(found.grey.shape) >= 1 and max(found.grey.shape) <= keypoints.LONGEST
