"""The measure of sharpness: what it must not depend on, and what must move it."""

import cv2
import numpy as np
import pytest
from builders import pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from lodeset.pipeline.algorithms.images.sharpness import FLOOR, SIDE, luminance, sharpness


def textured(seed: int, width: int = 96, height: int = 80) -> np.ndarray:
    """Blobs with detail of every scale: noise whose energy is the same in every octave, float32 [height, width]."""
    rng = np.random.default_rng(seed)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    spectrum = np.fft.fft2(rng.normal(size=(height, width))) / np.maximum(np.hypot(fx, fy), 1 / max(width, height))
    noise = np.fft.ifft2(spectrum).real
    return (128 + 40 * (noise - noise.mean()) / noise.std()).clip(0, 255).astype(np.float32)


def softened(grey: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT).astype(np.float32)


def blurred(grey: np.ndarray, sigma: float) -> np.ndarray:
    """As a file holds it: rounded to 8 bits."""
    return np.rint(softened(grey, sigma))


def test_it_is_the_formula_with_plain_gaussians() -> None:
    grey = textured(0)
    fine, coarse = (ndimage.gaussian_filter(grey.astype(np.float64), s, mode="reflect", truncate=8) for s in (1, 2))
    first, second = ((grey - fine) ** 2).mean(), ((fine - coarse) ** 2).mean()
    assert sharpness(grey) == pytest.approx(first / (first + second + FLOOR), abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), sigma=st.floats(0.4, 8), blobs=st.booleans(), width=st.integers(24, 160), again=st.booleans()
)  # fmt: skip
def test_blurring_never_raises_it(seed: int, sigma: float, blobs: bool, width: int, again: bool) -> None:
    grey = luminance(Image.fromarray(pixels(seed, width, 64))) if blobs else textured(seed, width, 64)
    if again:
        grey = blurred(grey, 1.5)
    # Rounding to 8 bits adds its own fine grain: .07 of energy, which FLOOR keeps below .07 of sharpness.
    assert sharpness(blurred(grey, sigma)) <= 0.07 or sharpness(softened(grey, sigma)) <= sharpness(grey)


def test_contrast_and_brightness_do_not_count() -> None:
    grey = textured(1)
    assert sharpness(20 + grey / 3) == pytest.approx(sharpness(grey), abs=0.02)
    assert sharpness(255 - grey) == pytest.approx(sharpness(grey), abs=1e-4)


def test_what_is_sharp_and_what_is_not() -> None:
    found = [sharpness(textured(n)) for n in range(20)]
    soft = [sharpness(blurred(textured(n), 3)) for n in range(20)]
    assert min(found) > 0.7 and max(soft) < 0.15


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (500, 1), (2, 2), (16, 16)])
def test_flat_images_of_any_shape_are_not_sharp(shape: tuple[int, int]) -> None:
    image = Image.new("RGB", shape, (90, 90, 90))
    assert sharpness(luminance(image)) < 1e-6


def test_large_images_are_measured_reduced() -> None:
    large = Image.fromarray(textured(3, 1024, 512).astype(np.uint8)).convert("RGB")
    assert luminance(large).shape == (SIDE // 2, SIDE)
    assert luminance(Image.new("RGB", (5000, 3))).shape == (1, SIDE)
    # Blur of 2 pixels in 1,024 is half a pixel of what is measured: no reason to drop it.
    soft = Image.fromarray(blurred(np.asarray(large.convert("L"), np.float32), 2).astype(np.uint8)).convert("RGB")
    assert sharpness(luminance(soft)) > 0.3
