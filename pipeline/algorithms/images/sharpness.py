"""Measure how sharp an image is: the share of fine detail at the finest scale."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Longer side that larger images are reduced to, in pixels: blur that a 224-pixel crop for training would not show is no
# reason to drop a photograph, and one threshold has to suit images of 64 pixels and of 6,000.
SIDE = 256
# Added to the energies (squared 8-bit steps). Rounding to 8 bits alone leaves .07 in the finest band of a featureless
# image.
FLOOR = 1.0


def luminance(image: Image.Image) -> NDArray[np.float32]:
    """RGB image -> luminance [height, width] in 8-bit steps, the longer side at most SIDE pixels."""
    grey = image.convert("L")
    factor = max(grey.size) / SIDE
    if factor > 1:
        size = (max(1, round(grey.width / factor)), max(1, round(grey.height / factor)))
        grey = grey.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(grey, dtype=np.float32)


def sharpness(grey: NDArray[np.float32]) -> float:
    """E1 / (E1 + E2 + FLOOR): E1 is the mean square of what a Gaussian of 1 pixel removes, E2 of what one of 2 pixels
    removes beyond that; `grey` [height, width] in 8-bit steps. 0 for a featureless image, below 1 for any.

    Natural images have about the same energy in every octave of scale (Field, J. Opt. Soc. Am. A 4(12), 1987), whatever
    they show; blur removes the finest first. Contrast cancels out, unlike in the variance of the Laplacian
    (Pech-Pacheco et al., ICPR 2000). A further Gaussian blur never raises the value, apart from rounding and borders:
    the ratio of the two bands' gains, 1 / (g + g^2 + g^3) with g the gain of the 1-pixel Gaussian, rises with
    frequency.
    """
    fine, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT) for sigma in (1.0, 2.0))
    first, second = float(np.mean((grey - fine) ** 2)), float(np.mean((fine - coarse) ** 2))
    return first / (first + second + FLOOR)
