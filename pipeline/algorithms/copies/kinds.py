"""Make copies of an image like those on the web, to learn how similar an embedder finds copies."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

KINDS = ("jpeg", "half_size", "crop_90", "crop_80", "mirror", "brighter", "grey", "blurred", "stamped")


def copy_of(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """One copy of an RGB image, at least 8 pixels per side."""
    width, height = image.size
    match kind:
        case "jpeg":
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=int(rng.integers(25, 60)))
            return Image.open(buffer).convert("RGB")
        case "half_size":
            return image.resize((max(8, width // 2), max(8, height // 2)), Image.Resampling.BICUBIC)
        case "crop_90" | "crop_80":
            share = 0.9 if kind == "crop_90" else 0.8
            w, h = max(1, round(width * share)), max(1, round(height * share))
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return image.crop((left, top, left + w, top + h))
        case "mirror":
            return ImageOps.mirror(image)
        case "brighter":
            return ImageEnhance.Brightness(image).enhance(float(rng.uniform(1.2, 1.5)))
        case "grey":
            return image.convert("L").convert("RGB")
        case "blurred":
            return image.filter(ImageFilter.GaussianBlur(max(1.0, min(width, height) / 64)))
        case "stamped":
            stamped = image.copy()
            ImageDraw.Draw(stamped).text(
                (width * 0.08, height * 0.7),
                "sample",
                fill=(255, 255, 255),
                font_size=max(8, height // 8),
                stroke_width=1,
                stroke_fill=(0, 0, 0),
            )
            return stamped
    raise ValueError(f"no kind of copy is called {kind}; the kinds are {', '.join(KINDS)}")
