"""Template-mates are told from copies by their details: pages and charts drawn here, which nothing was fitted on."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from lodeset.pipeline.algorithms.copies import details
from lodeset.pipeline.algorithms.copies.details import BLOCK, FEATURES, compared, drawing, measured, score

AS_IT_IS = np.array([[1.0, 0, 0], [0, 1, 0]])
WORDS = ("amount", "total", "paid", "change", "invoice", "customer", "order", "number", "date", "street", "city", "tax")


def page(seed: int, letterhead: int = 0) -> Image.Image:
    """A letterhead, rules and lines of words: pages with one letterhead differ only in their words."""
    image = Image.new("RGB", (620, 800), "white")
    draw, head, rng = (
        ImageDraw.Draw(image),
        np.random.default_rng(letterhead),
        np.random.default_rng([seed, letterhead]),
    )
    draw.rectangle((40, 30, 580, 110), fill=tuple(int(v) for v in head.integers(0, 160, 3)))
    draw.text((60, 50), "ACME & SONS", fill="white", font_size=36)
    for y in range(140, 760, 26):
        draw.line((40, y + 22, 580, y + 22), fill=(200, 200, 200))
        draw.text((50, y), " ".join(rng.choice(WORDS, 8)), fill=(20, 20, 20), font_size=16)
    return image


def chart(seed: int) -> Image.Image:
    image = Image.new("RGB", (480, 360), "white")
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(seed)
    draw.text((180, 8), "Sales 2024", fill="black", font_size=20)
    for step in range(6):
        draw.line((50, 320 - 50 * step, 460, 320 - 50 * step), fill=(210, 210, 210))
        draw.text((12, 312 - 50 * step), f"{step * 20}", fill="black", font_size=14)
    for bar, height in enumerate(rng.integers(20, 250, 7).tolist()):
        draw.rectangle((64 + 56 * bar, 320 - height, 100 + 56 * bar, 320), fill=(40, 90, 170))
        draw.text((72 + 56 * bar, 326), "ABCDEFG"[bar], fill="black", font_size=16)
    return image


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def said(first: Image.Image, second: Image.Image, unit: np.ndarray = AS_IT_IS) -> float:
    found = measured(drawing(first), drawing(second), unit)
    assert found is not None and found.shape == (len(FEATURES),) and np.isfinite(found).all()
    return float(score(found[None])[0])


PAIRS = {
    "page": (page(0), page(1)),
    "another letterhead": (page(2, 5), page(3, 5)),
    "chart": (chart(0), chart(1)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_copies_keep_their_details_and_mates_do_not(kind: str) -> None:
    image, mate = PAIRS[kind]
    changed = {
        "itself": image,
        "encoded": encoded(image, 40),
        "smaller": image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.BICUBIC),
        "darker": ImageEnhance.Brightness(image).enhance(0.75),
    }
    copies = {name: said(image, copy) for name, copy in changed.items()}
    mates = {name: said(copy, mate) for name, copy in changed.items()}
    assert min(copies.values()) > max(0.5, max(mates.values()) + 2), (copies, mates)
    if kind != "chart":  # of which little more than the ends of a few bars differ
        assert max(mates.values()) < -1, mates


def altered(image: Image.Image) -> Image.Image:
    """The page with other words in one line, and another color of the letterhead."""
    pixels = np.array(image)
    head = pixels[30:110, 40:580]
    pixels[30:110, 40:580] = np.where(head == head[-1, 0], (30, 40, 220), head)
    changed = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(changed)
    draw.rectangle((49, 296, 560, 314), fill="white")
    draw.text((50, 296), "nothing else on this page was typed anew", fill=(20, 20, 20), font_size=16)
    return changed


def test_what_differs_is_told_block_by_block() -> None:
    image = page(0)
    found = compared(drawing(image), drawing(encoded(altered(image), 80)), AS_IT_IS)
    assert found is not None
    top, left = found.places[:, 1], found.places[:, 0]
    over_line = (top < 318) & (top + BLOCK > 292)
    head = (top < 110) & (top + BLOCK > 30)
    assert found.unlike[over_line].sum() > 10 and (over_line | head)[found.unlike].mean() > 0.9
    inside_head = (top > 30) & (top + BLOCK < 110) & (left > 40) & (left + BLOCK < 580)
    assert head[found.recolored].all() and found.recolored[inside_head].mean() > 0.8
    copy = compared(drawing(image), drawing(encoded(image, 60)), AS_IT_IS)
    assert copy is not None and copy.unlike.mean() < 0.01 and not copy.recolored.any()
    # Both are drawn on one grid: what is the same lies in the same place.
    assert np.abs(copy.first.astype(int) - copy.second).mean() < 5
    at = FEATURES.index("below_half"), FEATURES.index("blocks")
    assert found.features[at[0]] * np.exp(found.features[at[1]]) == pytest.approx(found.unlike.sum(), abs=0.1)


def test_the_map_is_corrected_before_details_are_compared() -> None:
    """Key points at a low resolution are off by some pixels of the full image."""
    image = page(0)
    near = np.array([[1.004, 0, 0.008], [0, 0.997, -0.006]])
    assert said(image, encoded(image, 60), near) > 0.5 > said(image, page(1), near)


def test_crops_and_mirrored_images_are_compared_where_they_overlap() -> None:
    image = page(0)
    part = image.crop((0, 200, 620, 600))
    lower = np.array([[1.0, 0, 0], [0, 0.5, 0]])  # the part is the middle half of the page
    assert said(image, part, lower) > 0.5 > said(page(1), part, lower)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert said(image, mirrored, np.array([[-1.0, 0, 0], [0, 1, 0]])) > 0.5


def test_what_has_no_details_is_not_compared() -> None:
    flat = Image.new("RGB", (300, 300), (90, 90, 90))
    assert measured(drawing(flat), drawing(flat), AS_IT_IS) is None
    assert measured(drawing(page(0)), drawing(page(0)), AS_IT_IS * 1e-4) is None  # a point
    apart = np.array([[1.0, 0, 5], [0, 1, 0]])  # side by side
    assert measured(drawing(page(0)), drawing(page(0)), apart) is None


def test_images_are_compared_at_the_size_that_shows_their_text() -> None:
    assert [max(drawing(Image.new("RGB", size)).pixels.shape) for size in ((3000, 100), (500, 400), (64, 60))] == [
        details.LONGEST,
        500,
        details.SHORTEST,
    ]
