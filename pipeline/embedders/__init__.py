"""Images -> vectors. An embedder is a function from a list of RGB images to float32 [B, D], created once per worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Embed = Callable[[Sequence[Image.Image]], NDArray[np.float32]]
