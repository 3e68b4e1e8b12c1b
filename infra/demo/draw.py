"""Photographs of ten subjects, and of things that are common in crawls but unwanted, drawn by a random generator.

A subject defines what is painted: shapes and their arrangement. `scene` defines how it looks. Size, place, light and
camera are drawn from the same distributions for every subject.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lodeset.infra.demo.scene import (
    ANY,
    GROUNDS,
    Pixels,
    Place,
    Points,
    Sheet,
    Subject,
    Tone,
    bent,
    camera,
    cloud,
    ellipse,
    fractal,
    photograph,
    shade,
)

_GLYPHS = "ABCDEFGHKMNPRSTWXYZ23456789&?@"
_WORDS = (
    "sale",
    "about",
    "home",
    "login",
    "price",
    "terms",
    "menu",
    "news",
    "read",
    "more",
    "today",
    "order",
    "open",
    "photo",
)


def pebbles(sheet: Sheet) -> None:
    """Rounded stones side by side, a few of them veined."""
    rng = sheet.rng
    size = sheet.side * rng.uniform(0.07, 0.15)
    gap, squash = rng.uniform(1.7, 2.2), rng.uniform(0.65, 1.0)
    for y in np.arange(-size, sheet.height + size, gap * size * squash):
        for x in np.arange(-size + rng.uniform(0, size), sheet.width + size, gap * size):
            at = (x + rng.normal(0, 0.25 * size), y + rng.normal(0, 0.25 * size))
            place = Place(*at, size * rng.uniform(0.7, 1.15), rng.uniform(-0.6, 0.6))
            turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            lumps = 1 + 0.08 * np.sin(2 * turns + rng.uniform(0, 6)) + 0.06 * np.sin(3 * turns + rng.uniform(0, 6))
            outline = np.stack([np.cos(turns), squash * np.sin(turns)], axis=1) * lumps[:, None]
            ink = sheet.ink()
            sheet.polygon(place.put(outline), ink)
            if rng.random() < 0.2:
                vein = np.stack([np.linspace(-0.8, 0.8, 6), rng.uniform(-0.3, 0.3) + rng.normal(0, 0.06, 6)], axis=1)
                sheet.line(place.put(vein), shade(ink, 1.5), 0.1 * size)


def bricks(sheet: Sheet) -> None:
    """A wall of staggered courses, with a few bricks missing."""
    rng, place, reach = sheet.rng, sheet.whole(0.3), sheet.reach
    course = sheet.side * rng.uniform(0.1, 0.22)
    length, gap = course * rng.uniform(1.7, 3.0), course * rng.uniform(0.08, 0.18)
    stagger, missing = rng.choice([0.5, 0.33]), rng.uniform(0, 0.08)
    phase_x, phase_y, first = rng.uniform(0, length), rng.uniform(0, course), int(rng.integers(4))
    for row, y in enumerate(np.arange(-reach - phase_y, reach, course)):
        for x in np.arange(-reach - phase_x - length + (row * stagger % 1) * length, reach, length):
            if rng.random() >= missing:
                right, bottom = x + length - gap, y + course - gap
                corners = np.array([[x, y], [right, y], [right, bottom], [x, bottom]])
                ink = sheet.ink(first + int(rng.random() < 0.2))
                sheet.polygon(
                    place.put(corners + rng.normal(0, 0.02 * course, (4, 2))), shade(ink, rng.uniform(0.85, 1.15))
                )


def planks(sheet: Sheet) -> None:
    """Boards side by side, with grain and knots."""
    rng, place, reach = sheet.rng, sheet.whole(np.pi), sheet.reach
    breadth, gap = sheet.side * rng.uniform(0.14, 0.3), sheet.side * rng.uniform(0.012, 0.03)
    first, left = int(rng.integers(4)), -reach - rng.uniform(0, breadth)
    while left < reach:
        right, ink = left + breadth * rng.uniform(0.9, 1.1), sheet.ink(first)
        board = np.array([[left, -reach], [right - gap, -reach], [right - gap, reach], [left, reach]])
        sheet.polygon(place.put(board), ink)
        knot, along = (
            (left + rng.uniform(0.3, 0.7) * (right - left), rng.uniform(-reach, reach)),
            np.linspace(-reach, reach, 40),
        )
        for at in np.linspace(left, right - gap, int(rng.integers(5, 9)))[1:-1]:
            aside = np.sign(at - knot[0]) * 0.25 * breadth * np.exp(-(((along - knot[1]) / (0.5 * breadth)) ** 2))
            wave = 0.03 * breadth * np.sin(along / breadth * 2 + rng.uniform(0, 6))
            sheet.line(
                place.put(np.stack([np.clip(at + aside + wave, left, right - gap), along], axis=1)), shade(ink, 0.68), 1
            )
        spot = ellipse(0.12 * breadth, 0.2 * breadth, knot, 14)
        sheet.polygon(place.put(spot), shade(ink, 0.55), edge=False)
        left = right


def waves(sheet: Sheet) -> None:
    """Swells one behind the other, with crests of foam."""
    rng, place, reach = sheet.rng, sheet.whole(0.4), sheet.reach
    length = sheet.side * rng.uniform(0.25, 0.6)
    height = length * rng.uniform(0.12, 0.22)
    x, y, first, layer = np.linspace(-reach, reach, 90), -reach * rng.uniform(0.3, 0.9), int(rng.integers(4)), 0
    while y < reach:
        angle = 2 * np.pi * x / length + rng.uniform(0, 2 * np.pi)
        crest = y - height * (np.sin(angle) + 0.3 * np.sin(2 * angle + 1))
        ink = shade(sheet.ink(first), 0.75 + 0.5 * rng.random())
        outline = np.stack([np.append(x, [reach, -reach]), np.append(crest, [3 * reach, 3 * reach])], axis=1)
        sheet.polygon(place.put(outline), ink)
        sheet.line(place.put(np.stack([x, crest], axis=1)), shade(ink, 1.7), 0.12 * height)
        y += height * rng.uniform(1.6, 3.2)
        layer += 1


def flowers(sheet: Sheet) -> None:
    """Blossoms of five to nine petals around a dark or bright center."""
    rng = sheet.rng
    count, breadth, tip = int(rng.integers(5, 10)), rng.uniform(0.5, 0.95), rng.uniform(0.7, 1.3)
    t = np.linspace(0, 1, 12)
    for place in sheet.places():
        ink, middle = sheet.ink(), sheet.ink()
        half = breadth * np.pi / count * 0.62 * np.sin(np.pi * t**tip) ** 0.7
        petal = np.concatenate(
            [np.stack([0.15 + 0.85 * t, half], axis=1), np.stack([0.15 + 0.85 * t, -half], axis=1)[::-1]]
        )
        for number in range(count):
            turn = 2 * np.pi * number / count
            turned = Place(0, 0, rng.uniform(0.92, 1.05), turn).put(petal)
            sheet.polygon(place.put(turned), shade(ink, rng.uniform(0.9, 1.1)))
            sheet.line(place.put(Place(0, 0, 1, turn).put(np.array([[0.25, 0.0], [0.75, 0.0]]))), shade(ink, 0.7), 1)
        sheet.polygon(place.put(ellipse(0.24, 0.24, points=16)), middle)
        for _ in range(9):
            dot = ellipse(0.035, 0.035, tuple(rng.uniform(-0.14, 0.14, 2)), 6)
            sheet.polygon(place.put(dot), shade(middle, 0.55), edge=False)


def trees(sheet: Sheet) -> None:
    """Trees that fork repeatedly, bare or with leaves."""
    rng = sheet.rng
    leafy, spread, forks = rng.random() < 0.4, rng.uniform(0.3, 0.6), int(rng.integers(4, 6))
    for place in sheet.places(turn=0.2):
        bark, leaf = sheet.ink(0), sheet.ink(int(rng.integers(1, 4)))
        tips: list[tuple[Points, float, float, int]] = [(np.array([0.0, 1.1]), -np.pi / 2, rng.uniform(0.5, 0.65), 0)]
        while tips:
            start, angle, length, depth = tips.pop()
            end = start + length * np.array([np.cos(angle), np.sin(angle)])
            sheet.line(place.put(np.stack([start, end])), bark, place.radius * 0.17 * 0.68**depth)
            if depth < forks:
                for way in (-1, 1):
                    turned = angle + way * spread * rng.uniform(0.6, 1.4)
                    tips.append((end, turned, length * rng.uniform(0.64, 0.84), depth + 1))
            elif leafy:
                tuft = ellipse(0.08, 0.06, (end[0], end[1]), points=8)
                sheet.polygon(place.put(tuft), shade(leaf, rng.uniform(0.8, 1.2)))


def letters(sheet: Sheet) -> None:
    """Large letters and digits cut out of board, each tilted differently."""
    rng, canvas = sheet.rng, 96
    for place in sheet.places(turn=0.3):
        glyph = Image.new("L", (canvas, canvas))
        font, stroke = ImageFont.load_default(76), int(rng.integers(1, 6))
        text = _GLYPHS[int(rng.integers(len(_GLYPHS)))]
        ImageDraw.Draw(glyph).text(
            (canvas / 2, canvas / 2), text, fill=255, font=font, anchor="mm", stroke_width=stroke
        )
        scale, lean = place.radius * 2.5 / canvas, rng.uniform(-0.25, 0.25)
        corners = np.array([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]) * canvas / 2
        leaning = corners * (rng.uniform(0.8, 1.2), 1.0) + np.stack([lean * corners[:, 1], np.zeros(3)], axis=1)
        target = Place(place.x, place.y, scale, place.angle).put(leaning)
        matrix = cv2.getAffineTransform((corners + canvas / 2).astype(np.float32), target.astype(np.float32))
        mask = cv2.warpAffine(np.asarray(glyph), matrix, (sheet.width, sheet.height), flags=cv2.INTER_LINEAR)
        weight = mask[..., None] / 255.0
        sheet.colour[:] = np.round(sheet.colour * (1 - weight) + weight * np.array(sheet.ink()))
        np.maximum(sheet.cover, mask, out=sheet.cover)
        sheet.body[mask > 127] = 255


def leaves(sheet: Sheet) -> None:
    """Veined leaves, broad or narrow, each slightly bent."""
    rng = sheet.rng
    breadth, bluntness, veins = rng.uniform(0.3, 0.55), rng.uniform(0.7, 1.3), int(rng.integers(4, 8))
    t = np.linspace(0, 1, 24)
    half = breadth * np.sin(np.pi * t**bluntness) ** 0.9
    for place in sheet.places():
        bend, ink = rng.uniform(-0.35, 0.35), sheet.ink()
        vein = shade(ink, 0.6 if sum(ink) > 300 else 1.7)
        x = 2 * t - 1
        outline = np.concatenate([np.stack([x, half], axis=1), np.stack([x, -half], axis=1)[::-1]])
        sheet.polygon(place.put(bent(outline, bend)), ink)
        stalk = np.stack([np.linspace(-1.35, 0.95, 12), np.zeros(12)], axis=1)
        sheet.line(place.put(bent(stalk, bend)), vein, place.radius * 0.06, raised=False)
        for at in np.linspace(0.12, 0.82, veins):
            reach = 0.85 * float(np.interp(at + 0.08, t, half))
            for way in (-1, 1):
                rib = np.array([[2 * at - 1, 0.0], [2 * at - 1 + 0.7 * reach, way * reach]])
                sheet.line(place.put(bent(rib, bend)), vein, place.radius * 0.03, raised=False)


def fish(sheet: Sheet) -> None:
    """Fish in profile with rows of scales, some banded."""
    rng = sheet.rng
    depth, tail, banded = rng.uniform(0.32, 0.5), rng.uniform(0.3, 0.5), rng.random() < 0.4
    heading = rng.uniform(-0.4, 0.4) + np.pi * rng.integers(2)
    for place in sheet.places():
        turned = Place(place.x, place.y, 1.1 * place.radius, heading + 0.1 * place.angle)
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
        if banded:
            for at in (-0.25, 0.05, 0.35):
                tall = 0.75 * depth * np.sqrt(1 - ((at - 0.2) / 0.75) ** 2)
                sheet.polygon(turned.put(ellipse(0.06, tall, (at, 0.0))), mark, edge=False)
        arc = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 6)
        for column, at in enumerate(np.arange(-0.35, 0.45, 0.14)):
            tall = 0.8 * depth * np.sqrt(1 - ((at - 0.2) / 0.75) ** 2)
            for y in np.arange(-tall + 0.07 * (column % 2), tall, 0.15):
                scale = np.stack([at + 0.07 * np.cos(arc), y + 0.08 * np.sin(arc)], axis=1)
                sheet.line(turned.put(scale), shade(body, 0.65), 1, raised=False)
        sheet.polygon(turned.put(ellipse(0.1, 0.1, (0.68, -0.22 * depth))), (235, 235, 228))
        sheet.polygon(turned.put(ellipse(0.05, 0.05, (0.7, -0.22 * depth))), (20, 20, 25), edge=False)


def butterflies(sheet: Sheet) -> None:
    """Butterflies with spread wings, spotted symmetrically."""
    rng = sheet.rng
    broad, low, spots = rng.uniform(0.75, 1.0), rng.uniform(0.5, 0.8), int(rng.integers(2, 5))
    turns = np.linspace(0, 2 * np.pi, 22, endpoint=False)
    for place in sheet.places(turn=0.7):
        ink, mark, body = sheet.ink(), sheet.ink(), (38, 32, 30)
        at = rng.uniform(0.3, 0.8, spots)
        for way in (-1, 1):
            for reach, tilt, swell in ((broad, -0.6, 0.42), (low, 0.65, 0.4)):
                along = 0.5 * reach * (1 + np.cos(turns))
                across = swell * reach * np.sin(turns) * (0.4 + 0.6 * along / reach)
                wing = Place(0, 0, 1, tilt).put(np.stack([along, across], axis=1)) * (way, 1)
                inner = Place(0, 0, 1, tilt).put(np.stack([0.2 * reach + 0.6 * along, 0.55 * across], axis=1)) * (
                    way,
                    1,
                )
                sheet.polygon(place.put(wing), ink)
                sheet.polygon(place.put(inner), shade(ink, 1.35), edge=False)
                for share in at:
                    centre = Place(0, 0, 1, tilt).put(np.array([[share * reach, 0.25 * swell * np.sin(9 * share)]]))[0]
                    spot = ellipse(0.07, 0.07, (way * float(centre[0]), float(centre[1])), 8)
                    sheet.polygon(place.put(spot), mark, edge=False)
        sheet.polygon(place.put(ellipse(0.07, 0.45, points=14)), body)
        for way in (-1, 1):
            feeler = np.array([[0.0, -0.4], [way * 0.1, -0.62], [way * 0.26, -0.78]])
            sheet.line(place.put(feeler), body, 0.04 * place.radius)


_WHITE, _GREY, _DARK = Tone(0.1, 0.08, 0.9, 0.5), Tone(0.1, 0.12, 0.55, 0.5), Tone(0.08, 0.25, 0.25, 0.1)
_GREEN, _BROWN, _RED = Tone(0.29, 0.6, 0.5, 0.06), Tone(0.07, 0.5, 0.5), Tone(0.01, 0.65, 0.6)
_ORANGE, _YELLOW, _PINK = Tone(0.07, 0.8, 0.85), Tone(0.14, 0.75, 0.9), Tone(0.9, 0.5, 0.85, 0.06)
_BLUE, _TEAL, _VIOLET = Tone(0.6, 0.65, 0.6), Tone(0.5, 0.5, 0.5), Tone(0.76, 0.5, 0.65)

# From the most common in the pool to the rarest.
CONCEPTS: Mapping[str, Subject] = {
    subject.paint.__name__: subject
    for subject in (
        Subject(pebbles, ("sand", "water", "concrete"), (_GREY, _GREY, _BROWN, _WHITE)),
        Subject(bricks, ("concrete", "sand"), (_RED, _BROWN, _GREY)),
        Subject(planks, ("wood", "grass"), (_BROWN, _BROWN, _GREY, _WHITE)),
        Subject(waves, ("sky", "water"), (_BLUE, _TEAL, _TEAL)),
        Subject(flowers, ("grass", "bokeh"), (_PINK, _YELLOW, _WHITE, _VIOLET)),
        Subject(trees, ("sky", "sky", "grass"), (_DARK, _BROWN, _GREEN)),
        Subject(letters, ("cloth", "concrete", "wood"), (_RED, _BLUE, _YELLOW, _WHITE)),
        Subject(leaves, ("sand", "wood", "bokeh"), (_GREEN, _GREEN, _ORANGE)),
        Subject(fish, ("water",), (_ORANGE, _GREY, _BLUE, _YELLOW)),
        Subject(butterflies, ("bokeh", "sky", "grass"), (_ORANGE, _YELLOW, _BLUE, _DARK)),
    )
}


# -- unwanted images


def screens(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A page of text as on a screen: a bar, headlines, paragraphs, a box."""
    dark = rng.random() < 0.3
    paper, text = ((24, 26, 30), (215, 215, 220)) if dark else ((250, 250, 248), (40, 42, 48))
    image = Image.new("RGB", (width, height), paper)
    pen, accent, size = ImageDraw.Draw(image), ANY.drawn(rng), int(rng.integers(7, 12))
    pen.rectangle((0, 0, width, height * rng.uniform(0.08, 0.2)), fill=accent)
    y = height * rng.uniform(0.2, 0.3)
    while y < height:
        head = rng.random() < 0.2
        line = " ".join(rng.choice(_WORDS, int(rng.integers(2, 9))))
        left = width * rng.choice([0.05, 0.05, 0.3])
        pen.text(
            (left, y), line, fill=accent if head else text, font=ImageFont.load_default(size * (1.6 if head else 1))
        )
        if rng.random() < 0.15:
            pen.rectangle((width * 0.55, y, width * 0.95, y + 4 * size), fill=shade(accent, rng.uniform(0.6, 1.4)))
        y += size * rng.uniform(1.2, 2.2) * (1.6 if head else 1)
    return np.asarray(image)


def views(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A ground with nothing on it: sand, sky, water, cloth."""
    return photograph(Subject(lambda _: None, tuple(GROUNDS), (ANY,)), rng, width, height)


def blurs(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A photograph that missed its subject: soft lights and shapes, out of focus."""
    levels: NDArray[np.floating] = np.zeros((height, width, 3), np.float32)
    for ink in (ANY.drawn(rng) for _ in range(5)):
        weight = 1 / (1 + np.exp(-4 * fractal(rng, width, height, rng.uniform(2, 5))))[..., None]
        levels = levels * (1 - weight) + np.array(ink, np.float32) * weight
    soft = cv2.GaussianBlur(levels, (0, 0), min(width, height) * rng.uniform(0.02, 0.05))
    return camera(soft * (1 + 0.2 * cloud(rng, width, height, 2))[..., None], rng)


# Kinds of images that no curated set asks for.
DISTRACTORS: Mapping[str, Callable[[np.random.Generator, int, int], Pixels]] = {
    painter.__name__: painter for painter in (screens, views, blurs)
}


def draw(concept: str, rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A picture of an entry of `CONCEPTS` or `DISTRACTORS`: uint8 RGB [height, width, 3], determined by `rng` alone."""
    if concept in DISTRACTORS:
        return DISTRACTORS[concept](rng, width, height)
    return photograph(CONCEPTS[concept], rng, width, height)
