"""Masks, crops, order and batches: exact counts, no image lost or doubled, nothing depends on who computes it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import textured
from PIL import Image, ImageEnhance, ImageFilter
from scipy.stats import kstest

from lodeset.pipeline.errors import LodesetError
from lodeset.training.augment import augment, crop_box, distorted, drawn
from lodeset.training.config import CropsConfig, MaskingConfig, TrainingConfig
from lodeset.training.data import Batch, Batches, load_batches
from lodeset.training.index import open_index
from lodeset.training.masking import block_mask, mask_counts


def test_masks_have_exactly_the_count_asked_for() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in ((8, 8), (3, 5), (1, 1), (16, 16)):
        for count in range(rows * columns + 1):
            assert block_mask(rng, rows, columns, count).sum() == count


def test_masks_are_blocks() -> None:
    rng = np.random.default_rng(0)
    shared, total = 0, 0
    for _ in range(100):
        mask = block_mask(rng, 16, 16, 80).reshape(16, 16)
        squares = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
        covered = np.zeros_like(mask)
        for row, column in np.argwhere(squares):
            covered[row : row + 2, column : column + 2] = True
        shared += covered.sum()
        total += mask.sum()
    assert shared / total > 0.8  # single random patches at this density: 0.26


def test_half_of_the_crops_are_masked_evenly_over_the_ratios() -> None:
    counts = mask_counts(np.random.default_rng(0), 40, 1000, MaskingConfig(probability=0.5, ratio=(0.1, 0.5)))
    masked = np.sort(counts[counts > 0])
    assert len(masked) == 20
    for i, count in enumerate(masked):
        assert 100 + 20 * i - 1 <= count <= 100 + 20 * (i + 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (700, 2), (64, 64), (3000, 2500)])
def test_crops_of_any_image_are_finite_and_repeatable(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = CropsConfig(global_size=32, local_size=16, local_count=3)
    first, again = (augment(image, np.random.default_rng(5), config) for _ in range(2))
    assert first.global_views.shape == (2, 3, 32, 32) and first.local_views.shape == (3, 3, 16, 16)
    assert first.global_views.dtype == first.local_views.dtype == np.uint8
    assert np.array_equal(first.global_views, again.global_views)
    assert np.array_equal(first.local_views, again.local_views)
    if min(shape) > 1:
        assert not np.array_equal(first.global_views[0], first.global_views[1])


def test_crop_boxes_keep_to_their_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(rng, 200, 150, (0.32, 1.0))
        assert left >= 0 and top >= 0 and right <= 200 and bottom <= 150
        width, height = right - left, bottom - top
        assert 0.31 < width * height / 30000 <= 1
        assert 0.73 < width / height < 1.36


def test_crops_and_distortions_are_drawn_evenly() -> None:
    rng, config = np.random.default_rng(0), CropsConfig(jitter=1.0)
    boxes = np.array([crop_box(rng, 3000, 2000, (0.1, 0.3)) for _ in range(4000)], float)
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    taken = [drawn(rng, config, 0.5, 0.25) for _ in range(4000)]
    even = {
        "area": (width * height / 6e6 - 0.1) / 0.2,
        "aspect": np.log(width / height / 0.75) / np.log(16 / 9),
        "left": left / (3000 - width),
        "top": top / (2000 - height),
        "brightness": np.array([one.brightness - 0.6 for one in taken]) / 0.8,
        "hue": np.array([one.hue + 0.1 for one in taken]) / 0.2,
        "sigma": np.array([one.sigma - 0.1 for one in taken if one.sigma]) / 0.5,
    }
    for name, values in even.items():
        assert kstest(values, "uniform").pvalue > 1e-3, name
    assert len({one.order for one in taken}) == 24
    assert abs(np.mean([one.flip for one in taken]) - 0.5) < 0.03
    assert abs(np.mean([one.solarise for one in taken]) - 0.25) < 0.03


PLAIN = {"jitter": 0.0, "grey": 0.0, "blur": (0.0, 0.0, 0.0), "solarise": 0.0, "flip": 0.0, "global_scale": (1.0, 1.0)}


def test_each_distortion_does_what_its_name_says() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def crops(**knobs: object) -> np.ndarray:
        config = CropsConfig.model_validate({"global_size": 32, "local_count": 0, **PLAIN, **knobs})
        return augment(image, np.random.default_rng(0), config).global_views.astype(int)

    original = image.transpose(2, 0, 1).astype(int)
    np.testing.assert_array_equal(crops()[0], original)
    np.testing.assert_array_equal(crops(flip=1.0)[0], original[:, :, ::-1])
    assert not np.ptp(crops(grey=1.0)[0], axis=0).any()
    first, second = crops(solarise=1.0)
    np.testing.assert_array_equal(first, original)
    np.testing.assert_array_equal(second, np.where(original >= 128, 255 - original, original))
    first, second = crops(blur=(0.0, 1.0, 0.0), blur_sigma=(1.0, 1.0))
    np.testing.assert_array_equal(first, original)
    assert np.abs(np.diff(second)).mean() < 0.6 * np.abs(np.diff(original)).mean()
    assert np.abs(crops(jitter=1.0, hue=0.5)[0] - original).mean() > 12


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, ((one.astype(float) - other.astype(float)) ** 2).mean())))


def test_distortions_are_those_of_pillow() -> None:
    """Within 35 dB, on a picture with edges."""
    image = textured(0, 96, 96)
    pixels = np.array(image)
    box = (5, 7, 85, 91)
    part = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, box[1] : box[3], box[0] : box[2]]
    resized = torch.nn.functional.interpolate(part, size=(48, 48), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    assert psnr(resized.numpy(), np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC, box=box))) > 45
    plain = {"jitter": 1.0, "grey": 0.0, "solarise": 0.0, "flip": 0.0}
    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}

    def hue_turned(turns: float) -> Image.Image:
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] += np.uint8(round(256 * turns) % 256)
        return Image.fromarray(hsv, "HSV").convert("RGB")

    expected = {
        "brightness": ImageEnhance.Brightness(image).enhance,
        "contrast": ImageEnhance.Contrast(image).enhance,
        "saturation": ImageEnhance.Color(image).enhance,
        "hue": hue_turned,
    }
    for name, by_pillow in expected.items():
        knobs = {**plain, **nothing, name: 0.1 if name == "hue" else 0.4}
        told = drawn(np.random.default_rng(3), CropsConfig.model_validate(knobs), 0.0, 0.0)
        assert psnr(distorted(pixels, told), np.asarray(by_pillow(getattr(told, name)))) > 35, name
    knobs = {**nothing, **plain, "blur_sigma": (1.2, 1.2)}
    blurred = distorted(pixels, drawn(np.random.default_rng(3), CropsConfig.model_validate(knobs), 1.0, 0.0))
    assert psnr(blurred, np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)))) > 35


def test_the_index_reads_the_bytes_it_names(index_url: str, payloads: list[bytes]) -> None:
    index = open_index([index_url])
    assert sorted(payload or b"" for payload in index.read(range(len(index)))) == sorted(payloads)
    twice = open_index([index_url, index_url])
    assert twice.read([0, 1]) == [index.read([0])[0]] * 2


def gathered(url: str, config: TrainingConfig, world_size: int, step: int) -> Batch:
    """The global batch of a step, put together from all workers' shares."""
    shares = [Batches(open_index([url]), config, rank, world_size).load(step) for rank in range(world_size)]
    views = 2, config.crops.local_count

    def joined(tensors: list[torch.Tensor], count: int) -> torch.Tensor:
        return torch.cat([t.view(count, -1, *t.shape[1:]) for t in tensors], dim=1).flatten(0, 1)

    return Batch(
        step=step,
        image_ids=tuple(image_id for share in shares for image_id in share.image_ids),
        global_crops=joined([share.global_crops for share in shares], views[0]),
        local_crops=joined([share.local_crops for share in shares], views[1]),
        masks=joined([share.masks for share in shares], views[0]),
        skipped=tuple(image_id for share in shares for image_id in share.skipped),
    )


def same(a: Batch, b: Batch) -> bool:
    tensors = ((a.global_crops, b.global_crops), (a.local_crops, b.local_crops), (a.masks, b.masks))
    return (a.step, a.image_ids, a.skipped) == (b.step, b.image_ids, b.skipped) and all(
        torch.equal(x, y) for x, y in tensors
    )


def test_a_batch_depends_on_neither_workers_nor_loader_processes(index_url: str, small: TrainingConfig) -> None:
    alone = [gathered(index_url, small, 1, step) for step in range(small.steps)]
    assert all(same(gathered(index_url, small, 4, step), alone[step]) for step in range(small.steps))
    loaded = small.model_copy(update={"loader_processes": 2})
    batches = Batches(open_index([index_url]), loaded, 0, 1)
    assert all(same(a, b) for a, b in zip(load_batches(batches, 2), alone[2:], strict=True))


def test_unreadable_images_are_replaced_by_the_next_and_counted(index_url: str, small: TrainingConfig) -> None:
    whole = open_index([index_url])
    batches = Batches(whole, small, 0, 1)
    row = int(batches.order.rows(0)[5])
    sizes = whole.size_bytes.copy()
    sizes[row] = 10
    damaged = Batches(replace(whole, size_bytes=sizes), small, 0, 1)
    before, after = batches.load(0), damaged.load(0)
    assert after.skipped == (whole.image_id(row),)
    assert after.image_ids[5] == whole.image_id((row + 1) % len(whole))
    assert after.image_ids[:5] + after.image_ids[6:] == before.image_ids[:5] + before.image_ids[6:]
    assert torch.equal(after.masks, before.masks)


def test_missing_shards_stop_the_run_with_their_name(tmp_path: Path, index_url: str, small: TrainingConfig) -> None:
    (tmp_path / "index.parquet").write_bytes(Path(index_url).read_bytes())
    with pytest.raises(LodesetError, match=r"100 images in a row are unreadable.*shard-00000"):
        Batches(open_index([str(tmp_path / "index.parquet")]), small, 0, 1).load(0)


@pytest.mark.parametrize(
    ("batch", "workers", "told"),
    [
        (30, 1, "22 images are fewer than one batch of 30"),
        (8, 3, "batch 8 is not divisible by 3 workers: use 6 or 9"),
        (4, 4, "batch of at least 8"),
    ],
)
def test_batches_that_cannot_be_are_refused(
    index_url: str, small: TrainingConfig, batch: int, workers: int, told: str
) -> None:
    with pytest.raises(LodesetError, match=told):
        Batches(open_index([index_url]), small.model_copy(update={"batch": batch}), 0, workers)


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match="does not exist"):
        open_index([str(tmp_path / "index.parquet")])
    (tmp_path / "index.parquet").write_bytes(b"not Parquet")
    with pytest.raises(LodesetError, match="is not an index with the columns"):
        open_index([str(tmp_path / "index.parquet")])
    with pytest.raises(LodesetError, match="cannot be opened: Protocol not known: nosuch"):
        open_index(["nosuch://index.parquet"])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"shard": [None, "a.tar"]}, "1 rows have no shard"),
        ({"size_bytes": [7, 2**32 + 7]}, "size_bytes goes from 7 to 4294967303"),
        ({"offset": [-1, 5]}, "offset goes from -1 to 5"),
        ({"offset": ["1", "5"]}, "offset is string, not an integer"),
        ({"image_id": ["f" * 31, "e" * 32]}, "an image_id is not 32 hex digits"),
        ({"shard": ["a.tar", "memory://b.tar"]}, r"shards are on 2 file systems \(file, memory\)"),
    ],
)
def test_values_that_no_index_holds_are_refused(tmp_path: Path, changed: dict[str, list[object]], told: str) -> None:
    right = {"image_id": ["f" * 32, "e" * 32], "shard": ["a.tar", "b.tar"], "offset": [0, 512], "size_bytes": [7, 8]}
    pq.write_table(pa.table({**right, **changed}), tmp_path / "index.parquet")
    with pytest.raises(LodesetError, match=told):
        open_index([str(tmp_path / "index.parquet")])
