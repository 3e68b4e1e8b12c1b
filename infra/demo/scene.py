"""The parts of a drawn photograph: grounds, objects with relief, light, and a camera.

Objects are painted as flat outlines. Their relief, the light and the camera are applied afterwards, in the same way for
every subject. Grounds and colors are those that a subject is usually seen with, as in photographs: many subjects share
them, and some pictures have any of them.

Legend: H height, W width, P points. Lengths are pixels, angles radians, colors RGB in 0..255.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]
Field = NDArray[np.float32]  # [H, W]
Colour = tuple[int, int, int]

_SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class Place:
    """The position of an object: its center, its radius and its rotation."""

    x: float
    y: float
    radius: float
    angle: float

    def put(self, points: Points) -> Points:
        """Map unit coordinates [P, 2] to pixels [P, 2]."""
        c, s = np.cos(self.angle) * self.radius, np.sin(self.angle) * self.radius
        pixels: Points = points @ np.array([[c, s], [-s, c]]) + np.array([self.x, self.y])
        return pixels


@dataclass(frozen=True)
class Sheet:
    """The picture being painted, changed in place: color [H, W, 3], cover [H, W] (255 where there is an object) and
    body [H, W] (the same, but 0 along the edges of each piece, which are low).
    """

    width: int
    height: int
    colour: Pixels
    cover: Pixels
    body: Pixels
    inks: tuple[Colour, ...]
    rng: np.random.Generator

    @property
    def side(self) -> int:
        """The shorter side."""
        return min(self.height, self.width)

    @property
    def reach(self) -> float:
        """Half the diagonal with a margin: an object of this radius fills the sheet at any rotation."""
        return 0.55 * float(np.hypot(self.width, self.height))

    def ink(self, index: int | None = None) -> Colour:
        """An ink of the palette, slightly varied; a random one without an index."""
        chosen = self.inks[int(self.rng.integers(len(self.inks))) if index is None else index % len(self.inks)]
        return shade(chosen, self.rng.uniform(0.88, 1.12))

    def polygon(self, points: Points, ink: Colour, edge: bool = True) -> None:
        """Fill the outline `points` [P, 2]; without `edge` it lies flat on what is below."""
        fixed = _fixed(points)
        cv2.fillPoly(self.colour, [fixed], ink, cv2.LINE_AA, _SUBPIXEL_BITS)
        cv2.fillPoly(self.cover, [fixed], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        if edge:
            cv2.fillPoly(self.body, [fixed], 255, cv2.LINE_8, _SUBPIXEL_BITS)
            cv2.polylines(self.body, [fixed], True, 0, 1, cv2.LINE_8, _SUBPIXEL_BITS)

    def line(self, points: Points, ink: Colour, thickness: float, raised: bool = True) -> None:
        """Draw an open line through `points` [P, 2]; one that is not raised is a mark or a groove."""
        fixed, pixels = _fixed(points), max(1, round(thickness))
        cv2.polylines(self.colour, [fixed], False, ink, pixels, cv2.LINE_AA, _SUBPIXEL_BITS)
        cv2.polylines(self.cover, [fixed], False, 255, pixels, cv2.LINE_AA, _SUBPIXEL_BITS)
        cv2.polylines(self.body, [fixed], False, 255 if raised else 0, pixels, cv2.LINE_8, _SUBPIXEL_BITS)

    def places(self, turn: float = np.pi) -> list[Place]:
        """Places all over the sheet, of similar size, rotated by at most `turn` either way, in offset rows."""
        pitch = self.side * self.rng.uniform(0.26, 0.42)
        row_pitch, places = pitch * self.rng.uniform(0.85, 1.1), []
        for row, y in enumerate(np.arange(self.rng.uniform(-0.2, 0.3) * pitch, self.height + 0.4 * pitch, row_pitch)):
            start = pitch * (0.5 * (row % 2) + self.rng.uniform(-0.3, 0.2))
            for x in np.arange(start, self.width + 0.4 * pitch, pitch):
                if self.rng.random() < 0.9:
                    at = np.array([x, y]) + self.rng.normal(0, 0.09 * pitch, 2)
                    size = 0.54 * pitch * self.rng.uniform(0.8, 1.15)
                    places.append(Place(float(at[0]), float(at[1]), size, self.rng.uniform(-turn, turn)))
        return places

    def whole(self, turn: float) -> Place:
        """The place of an object that fills the picture: centered, with radius 1 pixel, rotated by at most `turn`
        either way.
        """
        return Place(self.width / 2, self.height / 2, 1.0, self.rng.uniform(-turn, turn))


@dataclass(frozen=True)
class Tone:
    """Colors of one kind: hue in turns, and how far each component varies either way."""

    hue: float
    saturation: float
    value: float
    hue_spread: float = 0.04

    def drawn(self, rng: np.random.Generator) -> Colour:
        hue = (self.hue + rng.uniform(-1, 1) * self.hue_spread) % 1.0
        saturation = np.clip(self.saturation + rng.uniform(-0.18, 0.18), 0, 1)
        value = np.clip(self.value + rng.uniform(-0.16, 0.16), 0.1, 1)
        red, green, blue = colorsys.hsv_to_rgb(hue, float(saturation), float(value))
        return round(red * 255), round(green * 255), round(blue * 255)


ANY = Tone(0.0, 0.5, 0.6, hue_spread=0.5)
INKS = 4
UNUSUAL = 0.2  # share of pictures with any ground, and of those with any colors


@dataclass(frozen=True)
class Subject:
    """The content of a picture: how it is painted, and its usual grounds and colors."""

    paint: Callable[[Sheet], None]
    grounds: tuple[str, ...]
    tones: tuple[Tone, ...]


def photograph(subject: Subject, rng: np.random.Generator, width: int, height: int) -> Pixels:
    """The subject as a camera sees it: uint8 RGB [height, width, 3], determined by `rng` alone."""
    tones = (ANY,) if rng.random() < UNUSUAL else subject.tones
    inks = tuple(tones[int(rng.integers(len(tones)))].drawn(rng) for _ in range(INKS))
    grounds = tuple(GROUNDS) if rng.random() < UNUSUAL else subject.grounds
    material, tone = GROUNDS[grounds[int(rng.integers(len(grounds)))]]
    ground, rough = material(rng, width, height, tone.drawn(rng))
    if rng.random() < 0.7:  # the lens is in focus at one distance
        blur = min(width, height) * rng.uniform(0.005, 0.03)
        ground, rough = blurred(ground, blur), blurred(rough, blur)
    cover, body = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    sheet = Sheet(width, height, to_bytes(ground), cover, body, inks, rng)
    subject.paint(sheet)
    return camera(lit(sheet, ground, rough), rng)


# -- grounds: albedo [H, W, 3] in 0..255 and roughness, in pixels of relief [H, W]


def cloud(rng: np.random.Generator, width: int, height: int, cells: float, stretch: float = 1.0) -> Field:
    """Smooth noise [H, W] of mean 0, mostly within -1..1, with `cells` bumps along the shorter side, `stretch` times
    longer in one direction.
    """
    side = min(width, height)
    rows = max(2, round(cells * height / side))
    columns = max(2, round(cells * width / side / stretch))
    grid = rng.standard_normal((rows + 2, columns + 2), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32) * np.float32(0.6)


def fractal(rng: np.random.Generator, width: int, height: int, cells: float, stretch: float = 1.0) -> Field:
    """Noise at `cells` and at finer scales, each weaker than the previous one."""
    noise = cloud(rng, width, height, cells, stretch)
    for octave in range(1, 4):
        noise = noise + cloud(rng, width, height, cells * 2.2**octave, stretch) * np.float32(0.55**octave)
    return noise


def _toned(colour: Colour, tone: Field, strength: float) -> NDArray[np.float32]:
    """A color that `tone` makes lighter and darker."""
    return np.array(colour, np.float32) * (1 + np.float32(strength) * tone)[..., None]


Ground = tuple[NDArray[np.float32], Field]


def _sand(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    grain = rng.standard_normal((height, width), np.float32)
    slow = fractal(rng, width, height, rng.uniform(2, 5))
    return _toned(colour, slow + 0.6 * grain, 0.12), 0.5 * grain + 2.0 * slow


def _sky(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    puffs = np.clip(fractal(rng, width, height, rng.uniform(1.5, 4), rng.uniform(1, 3)) + rng.uniform(-0.3, 0.3), 0, 1)
    slope = np.linspace(-0.15, 0.2, height, dtype=np.float32)[:, None]
    base = _toned(colour, np.broadcast_to(slope, (height, width)), 1.0)
    return base + (np.float32(245) - base) * (0.75 * puffs)[..., None], np.zeros((height, width), np.float32)


def _grass(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    blades = cloud(rng, height, width, rng.uniform(18, 34), 5.0).T  # upright blades: noise that is stretched vertically
    slow = cloud(rng, width, height, 3)
    return _toned(colour, 0.7 * blades + 0.4 * slow, 0.3), 2.0 * np.ascontiguousarray(blades)


def _wood(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    rings = np.sin(
        rng.uniform(6, 14) * cloud(rng, width, height, 2, 6.0)
        + np.linspace(0, rng.uniform(8, 40), height, dtype=np.float32)[:, None]
    )
    fine = cloud(rng, width, height, 40, 10.0)
    return _toned(colour, 0.5 * rings + 0.6 * fine, 0.16), 0.8 * fine


def _concrete(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    stains = fractal(rng, width, height, rng.uniform(2, 8))
    return _toned(colour, stains, 0.2), 3.0 * fractal(rng, width, height, 14)


def _water(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    ripples = fractal(rng, width, height, rng.uniform(6, 12), 3.0)
    return _toned(colour, ripples, 0.2), 5.0 * ripples


def _bokeh(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    spots, side = np.zeros((height, width), np.uint8), min(width, height)
    for _ in range(int(rng.integers(8, 26))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        light = np.zeros_like(spots)
        cv2.circle(light, centre, int(side * rng.uniform(0.03, 0.12)), int(rng.integers(30, 110)), -1, cv2.LINE_AA)
        cv2.add(spots, light, dst=spots)
    glow = cv2.GaussianBlur(spots, (0, 0), side * 0.012).astype(np.float32) / 255
    return _toned(colour, glow + 0.25 * cloud(rng, width, height, 2), 0.8), np.zeros((height, width), np.float32)


def _cloth(rng: np.random.Generator, width: int, height: int, colour: Colour) -> Ground:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    thread, fold = rng.uniform(2.5, 5), fractal(rng, width, height, 2)
    weave = np.sin(2 * np.pi * (x + 4 * fold) / thread) * np.sin(2 * np.pi * (y + 4 * fold) / thread)
    return _toned(colour, weave + fold, 0.1), 0.7 * weave + 6.0 * fold


GROUNDS: Mapping[str, tuple[Callable[[np.random.Generator, int, int, Colour], Ground], Tone]] = {
    "sand": (_sand, Tone(0.1, 0.35, 0.75)),
    "sky": (_sky, Tone(0.58, 0.45, 0.75, hue_spread=0.06)),
    "grass": (_grass, Tone(0.28, 0.6, 0.5, hue_spread=0.06)),
    "wood": (_wood, Tone(0.07, 0.55, 0.5)),
    "concrete": (_concrete, Tone(0.1, 0.1, 0.55, hue_spread=0.5)),
    "water": (_water, Tone(0.53, 0.6, 0.5, hue_spread=0.06)),
    "bokeh": (_bokeh, Tone(0.3, 0.5, 0.35, hue_spread=0.2)),
    "cloth": (_cloth, Tone(0.0, 0.5, 0.6, hue_spread=0.5)),
}


# -- light and camera


def lit(sheet: Sheet, ground: NDArray[np.float32], rough: Field) -> NDArray[np.float32]:
    """The scene under one lamp: shaded relief, objects with shadows on the ground and slight gloss; levels [H, W,
    3].
    """
    rng, side = sheet.rng, sheet.side
    width, height = sheet.width, sheet.height
    bulge = side * rng.uniform(0.05, 0.12)  # distance from its edge over which an object rises
    depth = np.minimum(cv2.distanceTransform(sheet.body, cv2.DIST_L2, 3) / np.float32(bulge), 1)
    dome = np.sqrt(np.maximum(1 - (1 - depth) ** 2, 0)) * np.float32(bulge * rng.uniform(0.7, 1.2))
    cover = sheet.cover.astype(np.float32) / 255
    grain = fractal(rng, width, height, rng.uniform(5, 16))
    surface = _own(sheet.colour, grain, rng.uniform(0.04, 0.16))
    relief = cv2.GaussianBlur(dome, (0, 0), 0.8) + rng.uniform(0.3, 1.5) * grain
    relief = cover * relief + (1 - cover) * rough * np.float32(rng.uniform(0.4, 1.0))

    from_, slant = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2)
    lamp = np.array([np.cos(from_) * np.sin(slant), np.sin(from_) * np.sin(slant), np.cos(slant)], np.float32)
    dx = cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    dy = cv2.Sobel(relief, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    norm = 1 / np.sqrt(dx * dx + dy * dy + 1)
    facing = np.maximum((lamp[2] - dx * lamp[0] - dy * lamp[1]) * norm, 0)
    ambient = np.float32(rng.uniform(0.25, 0.5))
    light = ambient + (1 - ambient) * facing / lamp[2]

    throw = side * rng.uniform(0.015, 0.06)
    shift = np.array([[1, 0, -lamp[0] * throw], [0, 1, -lamp[1] * throw]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(cover, shift, (width, height)), (0, 0), max(0.8, 0.3 * throw))
    light = light * (1 - (1 - cover) * shadow * np.float32(rng.uniform(0.25, 0.6)))
    albedo = ground * (1 - cover)[..., None] + surface * cover[..., None]
    gloss = np.float32(rng.choice([0.0, 0.0, rng.uniform(20, 90)])) * cover * np.maximum(facing, 0) ** 24
    return np.asarray(albedo * np.minimum(light, 1.6)[..., None] + gloss[..., None], np.float32)


def _own(colour: Pixels, grain: Field, strength: float) -> NDArray[np.float32]:
    return np.asarray(colour.astype(np.float32) * (1 + np.float32(strength) * grain)[..., None], np.float32)


def camera(levels: NDArray[np.floating], rng: np.random.Generator) -> Pixels:
    """A tinted lamp, uneven light, a lens with slight distortion and blur, exposure and sensor noise."""
    height, width = levels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    bend = np.float32(min(width, height) * rng.uniform(0.0, 0.05))
    moved = [axis + bend * cloud(rng, width, height, 3) for axis in (x, y)]
    warped = cv2.remap(
        levels.astype(np.float32), moved[0], moved[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.6)
    light = 1 + slope * (np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5))
    light *= 1 - rng.uniform(0.0, 0.6) * ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2)
    warmth, green = rng.uniform(-0.22, 0.22), rng.uniform(-0.08, 0.08)
    tint = np.array([1 + warmth, 1 + green, 1 - warmth], np.float32) * np.float32(rng.uniform(0.6, 1.4))
    seen = np.asarray(warped * light[..., None].astype(np.float32) * tint, np.float32)
    if rng.random() < 0.35:
        seen = blurred(seen, rng.uniform(0.5, 1.1))
    seen = seen + rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(0.5, 5.0))
    if rng.random() < 0.08:
        seen = np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2)
    return to_bytes(seen)


def blurred(levels: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Levels [H, W] or [H, W, 3], blurred by `sigma` pixels."""
    return np.asarray(cv2.GaussianBlur(levels, (0, 0), sigma), np.float32)


# -- helpers for painting


def ellipse(radius_x: float, radius_y: float, centre: tuple[float, float] = (0.0, 0.0), points: int = 32) -> Points:
    turns = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([centre[0] + radius_x * np.cos(turns), centre[1] + radius_y * np.sin(turns)], axis=1)


def bent(points: Points, bend: float) -> Points:
    return np.stack([points[:, 0], points[:, 1] + bend * points[:, 0] ** 2], axis=1)


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def to_bytes(levels: NDArray[np.floating]) -> Pixels:
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
