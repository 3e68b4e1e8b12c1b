"""Which copy is kept, by numbers and by real copies of drawn pictures."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from builders import encoded
from looks import alike
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from lodeset.pipeline.algorithms.copies.keepers import RULES, Looks, keepers
from lodeset.pipeline.algorithms.images.decoding import Examined, Limits, decode, examine
from lodeset.pipeline.algorithms.images.quality import detail_and_sharpness, encoding_quality

ONE_GROUP = np.zeros(2, np.int64)


def test_the_largest_then_the_smallest_id() -> None:
    component = np.array([0, 0, 2, 0, 2, 5])
    area = np.array([10, 30, 5, 30, 5, 1]) * 100
    assert keepers(component, alike(area)).tolist() == [1, 1, 2, 1, 2, 5]
    assert len(keepers(np.zeros(0, np.int64), alike(np.zeros(0, np.int64)))) == 0


def test_a_keeper_stays_the_keeper() -> None:
    component, area = np.array([0, 0, 0, 3, 3]), np.array([10, 30, 20, 5, 9])
    stood = {"standing": [True, False, False, False, False]}
    assert keepers(component, alike(area, **stood)).tolist() == [0, 0, 0, 4, 4]
    several = {"standing": [True, False, True, True, False]}
    assert keepers(component, alike(area, **several)).tolist() == [2, 2, 2, 3, 3]
    assert keepers(component, alike(area, **several), ("area",)).tolist() == [1, 1, 1, 4, 4]


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"standing": [False, True]}, "standing"),
        ({"area": [100, 200]}, "area"),
        ({"sharpness": [1.3, 4.0]}, "sharpness"),
        ({"quality": [40.0, 80.0]}, "quality"),
        ({"said": [0, 2]}, "metadata"),
    ],
)
def test_each_rule_decides_where_it_stands_and_nowhere_else(columns: dict[str, list[float]], rule: str) -> None:
    looks = alike(**{"area": np.array([100, 100]), **columns})  # type: ignore[arg-type]
    assert keepers(ONE_GROUP, looks).tolist() == [1, 1]
    if rule != "area":
        others = tuple(other for other in RULES if other != rule)
        assert keepers(ONE_GROUP, looks, others).tolist() == [0, 0]


def test_the_order_of_the_rules_is_the_users() -> None:
    looks = alike(np.array([100, 200]), said=[3, 0])
    assert keepers(ONE_GROUP, looks).tolist() == [1, 1]
    assert keepers(ONE_GROUP, looks, ("metadata", "area")).tolist() == [0, 0]


# -- pictures


def photograph(seed: int) -> Image.Image:
    """Shapes over a ground whose every octave holds as much, as photographs have it."""
    rng = np.random.default_rng(seed)
    width, height = 480, 384
    total = np.zeros((height, width, 3))
    for size in (4, 8, 16, 32, 64, 128, 256, 480):
        rough = Image.fromarray(rng.integers(0, 256, (size * height // width, size, 3), dtype=np.uint8))
        total += np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 127.5
    image = Image.fromarray(np.clip(127.5 + total / 4, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.uniform(0, width * 0.8), rng.uniform(0, height * 0.8)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + rng.uniform(10, 120), y + rng.uniform(10, 120)), fill=colour)
    return image


def jpeg(image: Image.Image, quality: int) -> bytes:
    return encoded(image, "JPEG", quality=quality)


def kept(*files: bytes) -> int:
    """Which of these copies is kept, tried in every order of two."""
    found: list[Examined] = [examine(data, Limits()) for data in files]
    order = np.arange(len(files))
    winners = set()
    for turned in (order, order[::-1]):
        seen = [found[n] for n in turned]
        looks = Looks(
            standing=np.zeros(len(seen), bool),
            area=np.array([one.width * one.height for one in seen]),
            contrast=np.array([np.frombuffer(one.thumbnail, np.uint8).var() for one in seen]),
            said=np.zeros(len(seen), np.int64),
            **{name: np.array([getattr(one, name) for one in seen]) for name in ("detail", "sharpness", "quality")},
        )
        winners.add(int(turned[keepers(np.zeros(len(seen), np.int64), looks)[0]]))
    assert len(winners) == 1, "the order of ids decided"
    return winners.pop()


def resized(factor: float, how: Image.Resampling = Image.Resampling.LANCZOS) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((round(image.width * factor), round(image.height * factor)), how)


def stamped(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text(
        (40, 40), "SAMPLE preview", fill="white", stroke_width=1, stroke_fill="black", font_size=40
    )
    return image


WORSE: dict[str, Callable[[Image.Image], bytes]] = {
    "blurred": lambda image: jpeg(image.filter(ImageFilter.GaussianBlur(2)), 90),
    "blurred, saved finely": lambda image: encoded(image.filter(ImageFilter.GaussianBlur(1.5))),
    "box-blurred": lambda image: jpeg(image.filter(ImageFilter.BoxBlur(2)), 85),
    "coarse JPEG": lambda image: jpeg(image, 20),
    "coarse WebP": lambda image: encoded(image, "WEBP", quality=10),
    "halved": lambda image: jpeg(resized(0.5)(image), 95),
    "a little smaller": lambda image: jpeg(resized(0.8)(image), 90),
    "a little smaller, coarse": lambda image: jpeg(resized(0.8)(image), 50),
    "halved and enlarged again": lambda image: jpeg(resized(2)(resized(0.5)(image)), 90),
    "cropped": lambda image: jpeg(ImageOps.crop(image, 30), 90),
    "a palette": lambda image: encoded(image.convert("P"), "GIF"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("worse", WORSE.values(), ids=list(WORSE))
def test_the_better_copy_is_kept(worse: Callable[[Image.Image], bytes], seed: int) -> None:
    original = photograph(seed)
    assert kept(jpeg(original, 85), worse(original)) == 0


@pytest.mark.parametrize("how", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_what_only_enlarges_a_copy_is_not_kept(factor: float, how: Image.Resampling) -> None:
    small = resized(0.5)(photograph(4))
    assert kept(jpeg(small, 90), jpeg(resized(factor, how)(small), 90)) == 0


def test_text_upon_a_copy_is_no_detail() -> None:
    original = photograph(1)
    assert kept(jpeg(original, 90), jpeg(stamped(original), 80)) == 0


def test_detail_of_few_rows_is_that_of_all() -> None:
    """A large image is looked at in bands."""
    grey = photograph(2).convert("L").resize((1_600, 1_200))
    samples = np.asarray(grey, np.float64)
    whole = (np.diff(samples, axis=0) ** 2).sum() + (np.diff(samples, axis=1) ** 2).sum()
    assert detail_and_sharpness(grey)[0] == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (9, 3), (16, 7), (7, 16), (4_000, 1)])
def test_images_of_any_size_have_detail(size: tuple[int, int]) -> None:
    detail, sharpness = detail_and_sharpness(Image.effect_noise(size, 50))
    assert detail >= 0 and sharpness > 0


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_the_quality_of_an_encoding_is_read_from_it(kind: str) -> None:
    image = photograph(3)
    found = []
    for quality in (10, 30, 50, 70, 90):
        data = encoded(image, kind, quality=quality)
        found.append(encoding_quality(Image.open(io.BytesIO(data)), data))
        if kind == "JPEG":
            assert found[-1] == pytest.approx(quality, abs=6)
    assert found == sorted(found) and found[-1] - found[0] > 40


def test_lossless_encodings_lose_nothing() -> None:
    image = photograph(3)
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert examine(encoded(image, kind, **options), Limits()).quality == 100
    assert decode(jpeg(image, 90)).size == image.size
