"""Pictures of ten concepts, drawn from a random generator.

A concept is a shape or a texture. Palette, backdrop, lighting, warp and grain are drawn from the same distributions for
every concept, and size, place and rotation vary widely, so that colour and layout say little about the concept and
outlines say nearly all.

Shape legend: H height, W width, P points. Lengths are pixels, angles radians, colours RGB in 0..255.
"""

import colorsys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]
Colour = tuple[int, int, int]

_SUBPIXEL_BITS = 4
_GLYPHS = "ABCDEFGHKMNPRSTWXYZ23456789&?@"


@dataclass(frozen=True)
class Palette:
    """Two neighbouring shades for the ground and four inks that stand out from it."""

    ground: tuple[Colour, Colour]
    inks: tuple[Colour, Colour, Colour, Colour]


@dataclass(frozen=True)
class Place:
    """Where an object goes: its centre, its radius and how far it is turned."""

    x: float
    y: float
    radius: float
    angle: float

    def put(self, points: Points) -> Points:
        """Unit coordinates [P, 2] to pixels [P, 2]."""
        c, s = np.cos(self.angle) * self.radius, np.sin(self.angle) * self.radius
        pixels: Points = points @ np.array([[c, s], [-s, c]]) + np.array([self.x, self.y])
        return pixels


@dataclass(frozen=True)
class Sheet:
    """What is being drawn: colour [H, W, 3] and cover [H, W] (255 where ink lies), both changed in place."""

    width: int
    height: int
    colour: Pixels
    cover: Pixels
    palette: Palette
    rng: np.random.Generator

    @property
    def side(self) -> int:
        """The shorter side."""
        return min(self.height, self.width)

    def ink(self, index: int | None = None) -> Colour:
        """An ink of the palette, with a slight change of shade; a random one without an index."""
        chosen = self.palette.inks[int(self.rng.integers(4)) if index is None else index % 4]
        return _shade(chosen, self.rng.uniform(0.9, 1.1))

    def polygon(self, points: Points, ink: Colour) -> None:
        """Fills the outline `points` [P, 2]."""
        fixed = _fixed(points)
        cv2.fillPoly(self.colour, [fixed], ink, cv2.LINE_AA, _SUBPIXEL_BITS)
        cv2.fillPoly(self.cover, [fixed], 255, cv2.LINE_AA, _SUBPIXEL_BITS)

    def line(self, points: Points, ink: Colour, thickness: float) -> None:
        """An open line through `points` [P, 2]."""
        fixed, pixels = _fixed(points), max(1, round(thickness))
        cv2.polylines(self.colour, [fixed], False, ink, pixels, cv2.LINE_AA, _SUBPIXEL_BITS)
        cv2.polylines(self.cover, [fixed], False, 255, pixels, cv2.LINE_AA, _SUBPIXEL_BITS)

    def places(self, most: int, turn: float = np.pi, fewest: int = 1) -> list[Place]:
        """At most `most` places that overlap little, turned by at most `turn` either way; the more, the smaller."""
        count = int(self.rng.integers(fewest, most + 1))
        radius = self.side * self.rng.uniform(0.42, 0.54) / count**0.38
        taken: list[Place] = []
        for _ in range(count * 10):
            size = radius * self.rng.uniform(0.85, 1.1)
            x = self.rng.uniform(0.8 * size, self.width - 0.8 * size)
            y = self.rng.uniform(0.8 * size, self.height - 0.8 * size)
            apart = all(np.hypot(x - t.x, y - t.y) > 0.75 * (size + t.radius) for t in taken)
            if apart and len(taken) < count:
                taken.append(Place(x, y, size, self.rng.uniform(-turn, turn)))
        return taken

    def whole(self, turn: float) -> Place:
        """The place of a texture: centred, with radius 1 pixel, turned by at most `turn` either way."""
        return Place(self.width / 2, self.height / 2, 1.0, self.rng.uniform(-turn, turn))


def discs(sheet: Sheet) -> None:
    """Balls, targets and rings."""
    manner = sheet.rng.choice(["ball", "target", "ring"])
    for place in sheet.places(8, fewest=2):  # lone discs look alike: measured as accidental near-duplicates
        ink, other, radius = sheet.ink(), sheet.ink(), 0.9
        sheet.polygon(place.put(_ellipse(radius, radius)), ink)
        if manner == "ball":
            for step in range(1, 5):
                lit = _ellipse(radius - 0.17 * step, radius - 0.17 * step, (-0.09 * step, -0.09 * step))
                sheet.polygon(place.put(lit), _shade(ink, 1 + 0.1 * step))
        elif manner == "target":
            for step in range(1, int(sheet.rng.integers(2, 5))):
                ring = _ellipse(radius - 0.22 * step, radius - 0.22 * step)
                sheet.polygon(place.put(ring), other if step % 2 else ink)
        else:
            hole = radius * sheet.rng.uniform(0.45, 0.75)
            sheet.polygon(place.put(_ellipse(hole, hole)), sheet.palette.ground[0])


def waves(sheet: Sheet) -> None:
    """Overlapping swells or scallops, one behind the other."""
    rng, place, reach = sheet.rng, sheet.whole(0.7), _reach(sheet)
    length = sheet.side * rng.uniform(0.2, 0.5)
    height = length * rng.uniform(0.14, 0.28)
    scallop, first = rng.random() < 0.4, int(rng.integers(4))
    x = np.linspace(-reach, reach, 120)
    y = -reach * rng.uniform(0.4, 1.0)
    layer = 0
    while y < reach:
        phase = np.pi * layer if scallop else rng.uniform(0, 2 * np.pi)
        angle = 2 * np.pi * x / length + phase
        swell = 1 - 2 * np.abs(np.sin(angle / 2)) if scallop else np.sin(angle) + 0.25 * np.sin(2 * angle)
        outline = np.stack(
            [np.append(x, [reach, -reach]), np.append(y - height * swell, [3 * reach, 3 * reach])], axis=1
        )
        sheet.polygon(place.put(outline), _shade(sheet.ink(first + layer), rng.uniform(0.7, 1.6)))
        y += height * rng.uniform(2.0, 4.0)
        layer += 1


def stars(sheet: Sheet) -> None:
    """Stars of four to eight rays, plain or with a star inside."""
    rays, inner, nested = int(sheet.rng.integers(4, 8)), sheet.rng.uniform(0.32, 0.5), sheet.rng.random() < 0.4
    turns = np.arange(2 * rays) * np.pi / rays
    outline = np.stack([np.cos(turns), np.sin(turns)], axis=1) * np.where(np.arange(2 * rays) % 2, inner, 1.0)[:, None]
    for place in sheet.places(4, turn=0.5):
        sheet.polygon(place.put(outline), sheet.ink())
        if nested:
            sheet.polygon(place.put(outline * 0.55), sheet.ink())


def bricks(sheet: Sheet) -> None:
    """A wall of staggered courses, with a few bricks missing."""
    rng, place, reach = sheet.rng, sheet.whole(0.35), _reach(sheet)
    course = sheet.side * rng.uniform(0.12, 0.24)
    length, gap = course * rng.uniform(1.5, 3.0), course * rng.uniform(0.07, 0.16)
    stagger, slant, missing = rng.choice([0.5, 0.33]), rng.uniform(-0.3, 0.3), rng.uniform(0, 0.12)
    phase_x, phase_y = rng.uniform(0, length), rng.uniform(0, course)
    inks = rng.permutation(4)[: int(rng.integers(1, 4))]
    for row, y in enumerate(np.arange(-reach - phase_y, reach, course)):
        for x in np.arange(-1.4 * reach - phase_x + (row * stagger % 1) * length, 1.4 * reach, length):
            if rng.random() >= missing:
                right, bottom = x + length - gap, y + course - gap
                corners = np.array([[x, y], [right, y], [right, bottom], [x, bottom]])
                corners[:, 0] += slant * corners[:, 1]
                sheet.polygon(place.put(corners), _shade(sheet.ink(int(rng.choice(inks))), rng.uniform(0.85, 1.12)))


def stripes(sheet: Sheet) -> None:
    """Parallel bands, even or uneven."""
    rng, place, reach = sheet.rng, sheet.whole(0.7), _reach(sheet)
    period, uneven, colours = sheet.side * rng.uniform(0.12, 0.4), rng.uniform(0.0, 0.6), int(rng.integers(1, 4))
    left, layer = -reach - rng.uniform(0, period), 0
    while left < reach:
        step = period * (1 + uneven * rng.uniform(-1, 1))
        right = left + step * rng.uniform(0.4, 0.6)
        band = np.array([[left, -reach], [right, -reach], [right, reach], [left, reach]])
        sheet.polygon(place.put(band), sheet.ink(layer % colours))
        left += step
        layer += 1


def trees(sheet: Sheet) -> None:
    """Bare or leafy trees that fork again and again."""
    rng = sheet.rng
    leafy, spread, forks = rng.random() < 0.5, rng.uniform(0.3, 0.65), int(rng.integers(4, 7))
    for place in sheet.places(2, turn=0.25):
        bark, leaf = sheet.ink(0), sheet.ink(int(rng.integers(1, 4)))
        tips: list[tuple[Points, float, float, int]] = [(np.array([0.0, 1.0]), -np.pi / 2, rng.uniform(0.5, 0.65), 0)]
        while tips:
            start, angle, length, depth = tips.pop()
            end = start + length * np.array([np.cos(angle), np.sin(angle)])
            sheet.line(place.put(np.stack([start, end])), bark, place.radius * 0.16 * 0.68**depth)
            if depth < forks:
                for side in (-1, 1):
                    turned = angle + side * spread * rng.uniform(0.6, 1.4)
                    tips.append((end, turned, length * rng.uniform(0.62, 0.82), depth + 1))
            elif leafy:
                tuft = _ellipse(0.09, 0.09, (end[0], end[1]), points=10)
                sheet.polygon(place.put(tuft), _shade(leaf, rng.uniform(0.85, 1.15)))


def letters(sheet: Sheet) -> None:
    """Large letters and digits, each leaning its own way."""
    rng, canvas = sheet.rng, 96
    for place in sheet.places(2, turn=0.35):
        glyph = Image.new("L", (canvas, canvas))
        font, stroke = ImageFont.load_default(76), int(rng.integers(0, 6))
        text = _GLYPHS[int(rng.integers(len(_GLYPHS)))]
        middle = (canvas / 2, canvas / 2)
        ImageDraw.Draw(glyph).text(middle, text, fill=255, font=font, anchor="mm", stroke_width=stroke)
        scale, lean = place.radius * 2.4 / canvas, rng.uniform(-0.3, 0.3)
        corners = np.array([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]) * canvas / 2
        leaning = corners * (rng.uniform(0.75, 1.2), 1.0) + np.stack([lean * corners[:, 1], np.zeros(3)], axis=1)
        target = Place(place.x, place.y, scale, place.angle).put(leaning)
        matrix = cv2.getAffineTransform((corners + canvas / 2).astype(np.float32), target.astype(np.float32))
        mask = cv2.warpAffine(np.asarray(glyph), matrix, (sheet.width, sheet.height), flags=cv2.INTER_LINEAR)
        weight = mask[..., None] / 255.0
        sheet.colour[:] = np.round(sheet.colour * (1 - weight) + weight * np.array(sheet.ink()))
        np.maximum(sheet.cover, mask, out=sheet.cover)


def leaves(sheet: Sheet) -> None:
    """Veined leaves, broad or narrow, each bent a little."""
    rng = sheet.rng
    breadth, bluntness, veins = rng.uniform(0.28, 0.5), rng.uniform(0.7, 1.3), int(rng.integers(3, 8))
    t = np.linspace(0, 1, 24)
    half = breadth * np.sin(np.pi * t**bluntness) ** 0.9
    for place in sheet.places(3, turn=0.7):
        bend, ink = rng.uniform(-0.35, 0.35), sheet.ink()
        vein = _shade(ink, 0.62 if sum(ink) > 300 else 1.6)
        x = 2 * t - 1
        outline = np.concatenate([np.stack([x, half], axis=1), np.stack([x, -half], axis=1)[::-1]])
        sheet.polygon(place.put(_bent(outline, bend)), ink)
        stalk = np.stack([np.linspace(-1.35, 0.95, 12), np.zeros(12)], axis=1)
        sheet.line(place.put(_bent(stalk, bend)), vein, place.radius * 0.06)
        for at in np.linspace(0.15, 0.8, veins):
            reach = 0.8 * float(np.interp(at + 0.08, t, half))
            for side in (-1, 1):
                rib = np.array([[2 * at - 1, 0.0], [2 * at - 1 + 0.7 * reach, side * reach]])
                sheet.line(place.put(_bent(rib, bend)), vein, place.radius * 0.035)


def fish(sheet: Sheet) -> None:
    """Fish in profile, plain, banded or spotted."""
    rng = sheet.rng
    depth, tail, manner = rng.uniform(0.3, 0.55), rng.uniform(0.3, 0.55), rng.choice(["plain", "banded", "spotted"])
    heading = rng.uniform(-0.4, 0.4) + np.pi * rng.integers(2)
    for place in sheet.places(2):
        turned = Place(place.x, place.y, place.radius, heading + 0.15 * place.angle)
        body, mark = sheet.ink(), sheet.ink()
        t = np.linspace(-1, 1, 20)
        half = depth * np.sqrt(np.clip(1 - t**2, 0, None)) * (1 - 0.25 * t)
        along = 0.75 * t + 0.2
        hull = np.concatenate([np.stack([along, half], axis=1), np.stack([along, -half], axis=1)[::-1]])
        fork = np.array([[-0.4, 0.0], [-1.05, tail], [-0.85, 0.0], [-1.05, -tail]])
        fin = np.array([[0.35, -0.8 * depth], [-0.1, -1.5 * depth], [-0.3, -0.6 * depth]])
        for part in (fork, fin):
            sheet.polygon(turned.put(part), mark)
        sheet.polygon(turned.put(hull), body)
        for at in (-0.25, 0.05, 0.35):
            tall = 0.7 * depth * np.sqrt(1 - ((at - 0.2) / 0.75) ** 2)
            if manner == "banded":
                sheet.polygon(turned.put(_ellipse(0.06, tall, (at, 0.0))), mark)
            elif manner == "spotted":
                sheet.polygon(turned.put(_ellipse(0.08, 0.08, (at, float(rng.uniform(-0.5, 0.5)) * depth))), mark)
        sheet.polygon(turned.put(_ellipse(0.1, 0.1, (0.65, -0.25 * depth))), (245, 245, 240))
        sheet.polygon(turned.put(_ellipse(0.05, 0.05, (0.67, -0.25 * depth))), (20, 20, 25))


def faces(sheet: Sheet) -> None:
    """Heads with hair, eyes, a nose and a mouth that smiles or does not."""
    rng = sheet.rng
    for place in sheet.places(2, turn=0.3):
        skin, hair, line = sheet.ink(0), sheet.ink(1 + int(rng.integers(3))), (25, 22, 30)
        broad, tall, gap = rng.uniform(0.62, 0.85), rng.uniform(0.8, 0.95), rng.uniform(0.24, 0.36)
        hairline = rng.uniform(-0.55, -0.25)
        sheet.polygon(place.put(_ellipse(broad * 1.12, tall * 1.05, (0.0, -0.12))), hair)
        for side in (-1, 1):
            sheet.polygon(place.put(_ellipse(0.13, 0.18, (side * broad * 0.98, 0.05))), _shade(skin, 0.9))
        sheet.polygon(place.put(_ellipse(broad, tall * 0.92, (0.0, 0.08))), skin)
        turns = np.linspace(np.pi, 2 * np.pi, 16)
        fringe = np.stack([np.cos(turns) * broad, 0.08 + np.sin(turns) * tall * 0.92], axis=1)
        sheet.polygon(place.put(fringe[fringe[:, 1] < hairline + 0.1]), hair)
        for side in (-1, 1):
            sheet.polygon(place.put(_ellipse(0.15, 0.11, (side * gap, -0.02))), (248, 246, 240))
            sheet.polygon(place.put(_ellipse(0.07, 0.08, (side * gap, -0.02))), line)
            brow = np.array([[side * (gap - 0.15), -0.2], [side * (gap + 0.15), -0.2 + rng.uniform(-0.06, 0.06)]])
            sheet.line(place.put(brow), line, place.radius * 0.05)
        nose = np.array([[0.0, 0.05], [0.07, 0.27], [-0.02, 0.29]])
        sheet.line(place.put(nose), _shade(skin, 0.6), place.radius * 0.05)
        x = np.linspace(-1, 1, 9)
        mouth = np.stack([x * rng.uniform(0.2, 0.35), 0.5 + rng.uniform(-0.3, 0.15) * (x**2 - 0.5)], axis=1)
        sheet.line(place.put(mouth), line, place.radius * 0.07)


# From the commonest in the pool to the rarest.
CONCEPTS: Mapping[str, Callable[[Sheet], None]] = {
    painter.__name__: painter for painter in (discs, bricks, stars, stripes, waves, trees, letters, leaves, fish, faces)
}


def draw(concept: str, rng: np.random.Generator, width: int, height: int) -> Pixels:
    """One picture of a concept named in `CONCEPTS`: uint8 RGB [height, width, 3], decided by `rng` alone."""
    palette = _palette(rng)
    ground = _backdrop(palette, rng, width, height)
    sheet = Sheet(width, height, ground.copy(), np.zeros((height, width), np.uint8), palette, rng)
    CONCEPTS[concept](sheet)
    return _finish(_lay(sheet, ground), rng)


def _palette(rng: np.random.Generator) -> Palette:
    hue, light_ground = rng.random(), rng.random() < 0.94
    step = float(rng.choice([0.06, 0.12, 0.33, 0.5]))

    def colour(turn: float, light: bool) -> Colour:
        saturation = rng.uniform(0.06, 0.36) if light else rng.uniform(0.35, 0.9)
        value = rng.uniform(0.85, 1.0) if light else rng.uniform(0.2, 0.5)
        red, green, blue = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
        return round(red * 255), round(green * 255), round(blue * 255)

    ground = colour(0.0, light_ground)
    first, second, third, fourth = (colour(step * i + rng.uniform(-0.04, 0.04), not light_ground) for i in range(1, 5))
    return Palette((ground, _shade(ground, rng.uniform(0.8, 0.93))), (first, second, third, fourth))


def _backdrop(palette: Palette, rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A blend of the two ground shades: a slope, a glow, clouds or soft lights out of focus."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    manner = rng.choice(["slope", "glow", "clouds", "lights"])
    if manner == "slope":
        angle = rng.uniform(0, 2 * np.pi)
        field = 0.5 + np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    elif manner == "glow":
        field = np.hypot(x / width - rng.uniform(0.2, 0.8), y / height - rng.uniform(0.2, 0.8)) * 1.4
    elif manner == "clouds":
        field = 0.65 * _cloud(rng, width, height, 4) + 0.35 * _cloud(rng, width, height, 11)
    else:
        spots = np.zeros((height, width), np.uint8)
        for _ in range(int(rng.integers(4, 14))):
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            cv2.circle(spots, centre, int(min(width, height) * rng.uniform(0.05, 0.2)), int(rng.integers(90, 255)), -1)
        field = cv2.GaussianBlur(spots, (0, 0), min(width, height) * 0.03).astype(np.float32) / 255
    weight = np.clip(field, 0, 1)[..., None]
    light, dark = (np.array(shade, np.float32) for shade in palette.ground)
    return _bytes(light * (1 - weight) + dark * weight)


def _lay(sheet: Sheet, ground: Pixels) -> Pixels:
    """The ink over the ground, with the soft shadow that it throws."""
    rng, side = sheet.rng, sheet.side
    shift = np.array([[1, 0, rng.uniform(-0.04, 0.04) * side], [0, 1, rng.uniform(0.0, 0.05) * side]], np.float32)
    cover = cv2.warpAffine(sheet.cover, shift, (sheet.width, sheet.height))
    shadow = cv2.GaussianBlur(cover, (0, 0), side * 0.025)[..., None] * np.float32(rng.uniform(0.0, 0.45) / 255)
    weight = sheet.cover[..., None].astype(np.float32) / 255
    return _bytes(ground * (1 - shadow) * (1 - weight) + sheet.colour * weight)


def _finish(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A gentle warp, uneven light, a frame now and then, softness and grain."""
    height, width = image.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    bend = np.float32(min(width, height) * rng.uniform(0.0, 0.05))
    moved = [axis + bend * (_cloud(rng, width, height, 4) - 0.5) for axis in (x, y)]
    warped = cv2.remap(image, moved[0], moved[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.5)
    light = 1 + slope * (np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5))
    light *= 1 - rng.uniform(0.0, 0.5) * ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2)
    lit = warped * light[..., None].astype(np.float32) * np.float32(rng.uniform(0.85, 1.08))
    if rng.random() < 0.3:
        lit = cv2.GaussianBlur(lit, (0, 0), rng.uniform(0.4, 1.0))
    lit += rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(0.0, 4.0))
    if rng.random() < 0.15:
        edge = max(2, round(min(width, height) * rng.uniform(0.03, 0.07)))
        tone = float(rng.choice([20, 128, 245]))
        for strip in (lit[:edge], lit[-edge:], lit[:, :edge], lit[:, -edge:]):
            strip[:] = tone
    if rng.random() < 0.12:
        lit = np.repeat(lit.mean(axis=2, keepdims=True), 3, axis=2)
    return _bytes(lit)


def _cloud(rng: np.random.Generator, width: int, height: int, cells: int) -> NDArray[np.float32]:
    """Smooth noise [height, width], near 0..1, with `cells` bumps a side."""
    grid = rng.random((cells, cells), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)


def _ellipse(radius_x: float, radius_y: float, centre: tuple[float, float] = (0.0, 0.0), points: int = 32) -> Points:
    turns = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([centre[0] + radius_x * np.cos(turns), centre[1] + radius_y * np.sin(turns)], axis=1)


def _bent(points: Points, bend: float) -> Points:
    return np.stack([points[:, 0], points[:, 1] + bend * points[:, 0] ** 2], axis=1)


def _reach(sheet: Sheet) -> float:
    """Half the diagonal, with a margin: a texture that goes so far fills the sheet however it is turned."""
    return 0.55 * float(np.hypot(sheet.width, sheet.height))


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _bytes(levels: NDArray[np.floating]) -> Pixels:
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
