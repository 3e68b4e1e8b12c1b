"""Apply the distortions of `augment` to many crops at once, on the training device.

They are drawn by `augment`, so the results on the loader and on the device differ by no more than the rounding of 8-bit
pixels. Nothing here waits for the device: every step is computed for all crops and kept only for those that need it.

Shapes: B crops, S their side.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lodeset.training.augment import Distortion

# Columns of a table of distortions.
FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARISE = 0, slice(1, 5), 5, 6, 7, 8, 9, 10, 11
NEVER = -1.0  # in an order: the step is not applied
LUMA = (9798, 19235, 3735)  # ITU-R BT.601 in 32768ths, as OpenCV rounds it


def table_of(distortions: Sequence[Distortion]) -> Tensor:
    """float32 [B, 12]."""
    rows = [
        (d.flip, *(d.order or (NEVER,) * 4), d.brightness, d.contrast, d.saturation, d.hue, d.grey, d.sigma, d.solarise)
        for d in distortions
    ]
    return torch.from_numpy(np.array(rows, np.float32).reshape(-1, 12))


def distorted_batch(crops: Tensor, table: Tensor, largest_sigma: float) -> Tensor:
    """uint8 [B, 3, S, S] -> uint8 [B, 3, S, S], each distorted by its row of `table` (see `table_of`)."""
    x = crops.float()

    def column(which: int) -> Tensor:
        return table[:, which, None, None, None]

    x = torch.where(column(FLIP) > 0, x.flip(-1), x)
    for place in range(4):
        step = table[:, ORDER][:, place, None, None, None]
        grey = _grey(x)
        mean = grey.mean(dim=(1, 2, 3), keepdim=True).round()
        x = torch.where(step == 0, _cut(x * column(BRIGHTNESS)), x)
        x = torch.where(step == 1, _cut(mean + (x - mean) * column(CONTRAST)), x)
        mixed = (x * column(SATURATION) + grey * (1 - column(SATURATION))).round().clamp(0, 255)
        x = torch.where(step == 2, mixed, x)
        x = torch.where(step == 3, _hue_turned(x, column(HUE)), x)
    x = torch.where(column(GREY) > 0, _grey(x).expand_as(x), x)
    x = torch.where(column(SIGMA) > 0, _blurred(x, table[:, SIGMA], largest_sigma), x)
    x = torch.where((column(SOLARISE) > 0) & (x >= 128), 255 - x, x)
    return x.to(torch.uint8)


def _cut(x: Tensor) -> Tensor:
    return x.clamp(0, 255).floor()


def _grey(x: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, 1, S, S]."""
    red, green, blue = x.unbind(1)
    total = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # below 2^24: exact in fp32
    return ((total + 16384) / 32768).floor().unsqueeze(1)


def _hue_turned(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue through 8-bit hue, saturation and value; hue in 256ths of a turn."""
    red, green, blue = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    spread = value - least
    saturation = (255 * spread / value.clamp(min=1) + 0.5).floor()
    sixth = torch.where(
        value == red,
        (green - blue) / spread.clamp(min=1),
        torch.where(value == green, 2 + (blue - red) / spread.clamp(min=1), 4 + (red - green) / spread.clamp(min=1)),
    )
    hue = ((sixth * 256 / 6 + 0.5).floor() + (256 * turns[:, 0]).round()) % 256
    part = hue * 6 / 255  # OpenCV uses 256 steps per turn on the way to hue, and 255 on the way back
    sector, rest = part.floor() % 6, part - part.floor()
    share = saturation / 255
    low, falling, rising = value * (1 - share), value * (1 - share * rest), value * (1 - share * (1 - rest))
    of_sector = (
        torch.stack((value, falling, low, low, rising, value)),
        torch.stack((rising, value, value, falling, low, low)),
        torch.stack((low, low, rising, value, value, falling)),
    )
    which = sector.long()[None]
    return torch.stack([levels.gather(0, which)[0] for levels in of_sector], dim=1).round().clamp(0, 255)


def _blurred(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of each crop by its own sigma [B], as wide as OpenCV's for 8-bit pixels (three deviations)."""
    count, _, side, _ = x.shape
    radius = min(round(3 * largest * 2 + 1) // 2, side - 1)
    places = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    spread = sigma.clamp(min=1e-3)[:, None]
    reach = torch.div((6 * spread + 1).round(), 2, rounding_mode="floor")
    weights = torch.exp(-(places**2) / (2 * spread**2)) * (places.abs() <= reach)  # [B, 2 radius + 1]
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)  # one row per channel
    planes = F.pad(x.reshape(1, 3 * count, side, side), (radius,) * 4, mode="reflect")
    planes = F.conv2d(planes, weights[:, None, None, :], groups=3 * count)
    planes = F.conv2d(planes, weights[:, None, :, None], groups=3 * count)
    return planes.view_as(x).round().clamp(0, 255)
