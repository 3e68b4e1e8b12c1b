"""Copies are found and told from strangers: geometry against plain loops, and copies of drawn pictures from end to end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from builders import drawing, thumbnail_of
from PIL import Image, ImageOps

from lodeset.pipeline.algorithms.copies import evidence, views
from lodeset.pipeline.algorithms.copies.alignment import align, warped
from lodeset.pipeline.algorithms.copies.variations import CHANGES, varied
from lodeset.pipeline.algorithms.copies.views import View, Window

SIDE = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_cells_are_the_means_of_a_window() -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (SIDE, SIDE))
    window = Window(0.25, 0.125, 0.75, 0.375)  # 24 x 12 pixels: cells of 2 x 1
    found = (views.cells(window) @ pixels.reshape(-1)).reshape(views.CELLS, views.CELLS)
    plain = np.array([[pixels[4 + i, 8 + 2 * j : 10 + 2 * j].mean() for j in range(12)] for i in range(12)])
    np.testing.assert_allclose(found, plain - plain.mean(), atol=1e-3)
    turned = (views.cells(window, mirrored=True, turns=1) @ pixels.reshape(-1)).reshape(12, 12)
    np.testing.assert_allclose(turned, np.rot90(plain[:, ::-1]) - plain.mean(), atol=1e-3)


@pytest.mark.parametrize("number", range(len(views.VIEWS)))
def test_a_view_starts_where_its_cells_are(number: int) -> None:
    """The second image, seen through the start of the view, has the cells of the first."""
    view = views.VIEWS[number]
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5)).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(smooth, np.float32)
    maps = torch.from_numpy(views.starts()[number : number + 1])
    seen, _ = warped(torch.from_numpy(pixels.copy())[None], maps)
    of_second = views.cells(view.of) @ seen[0].numpy()
    of_first = views.cells(view.window, view.mirrored, view.turns) @ pixels.reshape(-1)
    assert np.corrcoef(of_first, of_second)[0, 1] > 0.995


def test_orientations_undo_each_other() -> None:
    pixels = np.arange(9).reshape(3, 3)
    forth = views.orientations(np.arange(8, dtype=np.int16), np.zeros(8, bool))
    back = views.orientations(np.arange(8, dtype=np.int16), np.ones(8, bool))

    def turned(image: np.ndarray, view: View) -> np.ndarray:
        return np.rot90(image[:, ::-1] if view.mirrored else image, view.turns)

    for one, other in zip(forth, back, strict=True):
        np.testing.assert_array_equal(turned(turned(pixels, views.VIEWS[one]), views.VIEWS[other]), pixels)


def test_alignment_finds_a_planted_map_through_a_stamp() -> None:
    big = np.asarray(drawing(3).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32)
    image = torch.from_numpy(big.copy())[None]
    planted = torch.tensor([[[0.85, 0.06, 0.08], [-0.05, 0.9, -0.06]]])
    target = warped(image, planted)[0].reshape(1, SIDE, SIDE) * 0.7 + 20
    target[:, 24:, :14] = 255
    start = torch.eye(3)[None, :2].clone()
    found = align(image, target, start, 30)
    assert (found - planted).abs().max() < 0.02 < (start - planted).abs().max()


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_gives_an_rgb_image(name: str) -> None:
    for seed in range(6):
        made = CHANGES[name](drawing(seed), np.random.default_rng(seed))
        assert made.mode == "RGB" and min(made.size) >= 6


def world(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of `count` drawn pictures and a copy of each, and whose copy each is."""
    originals = [drawing(seed) for seed in range(count)]
    copies = [varied(image, np.random.default_rng(seed))[0] for seed, image in enumerate(originals)]
    return np.stack([thumbnail_of(i) for i in (*originals, *copies)]), np.tile(np.arange(count), 2)


def weighed(thumbnails: np.ndarray, half: bool = False) -> tuple[views.Candidates, np.ndarray]:
    fitted = evidence.model()
    found = views.ViewIndex(thumbnails, fitted.whitening, half).search(thumbnails, 0, len(thumbnails), same=True)
    pairs = views.standing_out(found, len(thumbnails))
    features, _ = evidence.measured(thumbnails, pairs.a, pairs.b, views.starts()[pairs.view], fitted.whitening)
    return pairs, fitted.score(evidence.with_candidates(features, pairs))


def test_copies_score_high_and_strangers_low() -> None:
    """Of drawings of another kind than those that the networks were fitted on."""
    thumbnails, owner = world(150)
    pairs, score = weighed(thumbnails)
    copies = owner[pairs.a] == owner[pairs.b]
    assert (score[copies] > 3).sum() >= 0.85 * 150
    assert (score[~copies] > 3).sum() <= 0.002 * (~copies).sum()


def test_candidates_do_not_depend_on_parts_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "BLOCK", 32)
    thumbnails, _ = world(60)
    fitted = evidence.model()
    index = views.ViewIndex(thumbnails, fitted.whitening, half=False)
    whole = index.search(thumbnails, 0, 120, same=True)
    pieces = [index.search(thumbnails, start, min(start + 37, 120), same=True) for start in range(0, 120, 37)]
    for name in ("a", "b", "view", "similarity"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(views.joined(pieces), name))

    order = np.random.default_rng(2).permutation(120)
    pairs = views.standing_out(whole, 120)
    shuffled = views.ViewIndex(thumbnails[order], fitted.whitening, half=False)
    other = views.standing_out(shuffled.search(thumbnails[order], 0, 120, same=True), 120)
    assert {frozenset(p) for p in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)} == {
        frozenset(order[list(p)].tolist()) for p in zip(other.a, other.b, strict=True)
    }


def test_flat_images_are_nobodys_copies() -> None:
    grey = np.full((40, SIDE * SIDE), 128, np.uint8)
    pairs, _ = weighed(np.concatenate([grey, world(20)[0]]))
    assert len(pairs.a) and min(pairs.a.min(), pairs.b.min()) >= 40


def test_a_mirrored_copy_is_called_so() -> None:
    thumbnails, _ = world(40)
    image = drawing(7)
    both = np.concatenate([thumbnails, np.stack([thumbnail_of(ImageOps.mirror(image))])])
    pairs, score = weighed(both)
    (row,) = np.flatnonzero(((pairs.a == 7) & (pairs.b == 80)) | ((pairs.a == 80) & (pairs.b == 7)))
    assert score[row] > 3 and views.VIEWS[pairs.view[row]].mirrored
