"""Images -> vectors. An embedder is a function of a list of RGB images that returns float32 [B, D], made once a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Embed = Callable[[Sequence[Image.Image]], NDArray[np.float32]]
