"""Colours of patches: a planted object stands out from its background, whatever way features are turned."""

import numpy as np

from lodeset.training.pictures import pca_pictures


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Four images of 8 x 8 patches: an object of 4 x 4 in the middle, whose rows differ along a direction of their own."""
    rng = np.random.default_rng(0)
    object_, background, along = np.linalg.qr(rng.normal(size=(16, 3)))[0].T
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    patches = np.where(inside[None, :, :, None], 5 * object_, 5 * background) + 0.05 * rng.normal(size=(4, 8, 8, 16))
    patches += inside[None, :, :, None] * np.linspace(-2, 2, 8)[None, :, None, None] * along
    return patches.astype(np.float32), inside


def test_the_object_is_coloured_and_the_background_black() -> None:
    patches, inside = planted()
    colours = pca_pictures(patches)
    assert colours.shape == (4, 8, 8, 3) and colours.dtype == np.uint8
    assert not colours[:, ~inside].any()
    red = colours[:, 2:6, 2:6, 0].astype(float).mean(axis=(0, 2))
    assert abs(np.corrcoef(red, np.arange(4))[0, 1]) > 0.99  # the first component of the object is what was planted
    assert np.ptp(red) > 200


def test_colours_do_not_depend_on_how_features_are_turned() -> None:
    patches, _ = planted()
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0].astype(np.float32)
    difference = pca_pictures(patches @ turned).astype(int) - pca_pictures(patches)
    assert np.abs(difference).max() <= 1


def test_patches_that_are_all_alike_are_black() -> None:
    assert not pca_pictures(np.ones((2, 4, 4, 8), np.float32)).any()
