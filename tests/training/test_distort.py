"""Distortions of many crops at once against those of one crop after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import drawing, textured
from numpy.typing import NDArray

from lodeset.training.augment import Distortion, augment, distorted, drawn
from lodeset.training.config import CropsConfig, TrainingConfig
from lodeset.training.data import Batches
from lodeset.training.distort import distorted_batch, table_of
from lodeset.training.index import Shards, open_index

NONE = Distortion(False, (), 1.0, 1.0, 1.0, 0.0, False, 0.0, False)
SIDE = 48


def pictures() -> list[NDArray[np.uint8]]:
    drawn_ = [np.asarray(make(seed).resize((SIDE, SIDE))) for seed in range(4) for make in (drawing, textured)]
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return [*drawn_, noise, np.zeros_like(noise), np.full_like(noise, 255)]


def differences(told: list[Distortion], images: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Of each crop, [B, S, S, 3]."""
    one_by_one = np.stack([distorted(image, d) for image, d in zip(images, told, strict=True)]).astype(int)
    crops = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))
    together = distorted_batch(crops, table_of(told), 2.0).permute(0, 2, 3, 1).numpy().astype(int)
    return np.abs(one_by_one - together)


@pytest.mark.parametrize(
    ("changed", "most"),
    [
        ({}, 0),
        ({"flip": True}, 0),
        ({"grey": True}, 0),
        ({"solarise": True}, 0),
        ({"sigma": 0.4}, 2),
        ({"sigma": 2.0}, 2),
        # Hue has 256 steps, also where it is turned by none: where it is rounded to the next one, a channel moves by up to 6.
        ({"order": (0, 1, 2, 3), "brightness": 1.3}, 8),
        ({"order": (1, 0, 2, 3), "contrast": 0.7}, 8),
        ({"order": (2, 0, 1, 3), "saturation": 1.2}, 8),
        ({"order": (3, 0, 1, 2), "hue": -0.1}, 8),
        ({"order": (3, 0, 1, 2), "hue": 0.5}, 8),
    ],
)
def test_each_distortion_is_the_one_of_a_single_crop(changed: dict[str, object], most: int) -> None:
    images = pictures()
    told = replace(NONE, **changed)  # type: ignore[arg-type]  # fields by name
    found = differences([told] * len(images), images)
    assert found.max() <= most and np.mean(found > 1) < 0.02
    assert not changed or any(not np.array_equal(distorted(image, told), image) for image in images)


def test_crops_of_one_batch_go_their_own_ways() -> None:
    rng = np.random.default_rng(0)
    config = CropsConfig(blur=(0.5, 0.5, 0.5), blur_sigma=(0.1, 2.0))
    images = [image for _ in range(8) for image in pictures()]
    told = [drawn(rng, config, 0.5, 0.5) for _ in images]
    found = differences(told, images)
    decibels = 10 * np.log10(255**2 / np.maximum(1e-9, (found**2).mean(axis=(1, 2, 3))))
    assert np.median(decibels) > 60 and decibels.min() > 50


def test_a_run_may_leave_distortions_to_the_device(shards: Shards, small: TrainingConfig) -> None:
    device = small.model_copy(update={"crops": small.crops.model_copy(update={"distort": "device"})})
    index = open_index(shards.index)
    for step in range(2):
        here, there = (Batches(index, config, 0, 1).load(step) for config in (small, device))
        assert here.image_ids == there.image_ids and not torch.equal(here.global_crops, there.global_crops)
        for one, other in zip(here.crops(small.crops), there.to(torch.device("cpu")).crops(device.crops), strict=True):
            difference = (one.float() - other.float()).abs()
            assert difference.median() == 0 and (difference > 8).float().mean() < 0.02


def test_crops_that_are_left_to_the_device_come_undistorted() -> None:
    image = np.asarray(drawing(0))
    config = CropsConfig(global_size=32, local_size=16, local_count=2)
    here, there = (
        augment(image, np.random.default_rng(1), config.model_copy(update={"distort": who}))
        for who in ("loader", "device")
    )
    assert here.pending == () and len(there.pending) == 4
    views = [*there.global_views, *there.local_views]
    done = [distorted(np.ascontiguousarray(v.transpose(1, 2, 0)), d) for v, d in zip(views, there.pending, strict=True)]
    for found, wanted in zip(done, [*here.global_views, *here.local_views], strict=True):
        np.testing.assert_array_equal(found.transpose(2, 0, 1), wanted)
