"""Find candidate copies by comparing every thumbnail, seen in many ways, with every other. N images, C descriptor
cells, D dimensions.

A copy that was cropped, mirrored, turned or stamped resembles its original under one of a few dozen views: a window and
an orientation of one image against a window of the other. A view is linear in the thumbnail, so all of them together
are matrix products: the window is averaged into 12x12 cells, whitened (directions that all pictures share carry little
information, as in Jegou and Chum, ECCV 2012) and compared by cosine.

The similarity of different images depends on the kind of picture: a digit has a hundred near neighbors, a photograph
none. A pair is therefore judged by how far it stands above what its images find at `RANKS` (local scaling: Jegou,
Harzallah and Schmid, CVPR 2007).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.images.decoding import THUMBNAIL_SIDE
from lodeset.pipeline.algorithms.sampling import ranks

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

CELLS = 12
# Standard deviation of a window's cells (8-bit steps) below which it shows nothing to compare.
LOW_CONTRAST = 5.0
# Number of matches that an image keeps, and therefore of each of its views: the best of all are then the best of the
# results for parts of them. 8 per view were not measurably faster.
KEPT = 24
RANKS = slice(5, 15)
# Similarity above its surroundings from which a pair is aligned and verified.
STANDS_OUT = 0.0
# A small pool has few different images to compare with, so the typical value of a large pool is assumed.
SMALL_POOL, USUAL = 2_000, 0.55
BLOCK = 256  # images whose products are computed together; 1,024 took a third longer on 16,000 images
ROWS = 8_192  # thumbnails that are described at once
GROUPS = 16  # a row of similarities is searched by the maxima of this many interleaved columns


@dataclass(frozen=True)
class Window:
    """A part of an image, as shares of its width and height."""

    left: float
    top: float
    width: float
    height: float

    def mirrored(self) -> Window:
        return Window(1 - self.left - self.width, self.top, self.width, self.height)


WHOLE = Window(0, 0, 1, 1)


@dataclass(frozen=True)
class View:
    """`window` of one image, mirrored and then turned by quarters (counterclockwise), looks like `of` of another."""

    window: Window = WHOLE
    of: Window = WHOLE
    mirrored: bool = False
    turns: int = 0

    @property
    def name(self) -> str:
        """`identity`, `mirror`, `turn_90` ... `mirror_turn_270`."""
        words = ["mirror"] * self.mirrored + [f"turn_{90 * self.turns}"] * (self.turns > 0)
        return "_".join(words) or "identity"


def _views() -> tuple[View, ...]:
    views = [View(mirrored=m, turns=t) for t in range(4) for m in (False, True)]
    # Crops to 81, 64, 42 and 25 % of the area; alignment covers the sizes in between.
    crops = [
        Window(x * (1 - side), y * (1 - side), side, side)
        for side in (0.9, 0.8, 0.65)
        for y in (0, 0.5, 1)
        for x in (0, 0.5, 1)
    ]
    views += [View(window=w, mirrored=m) for w in (*crops, Window(0.25, 0.25, 0.5, 0.5)) for m in (False, True)]
    # The area that a stamp, a caption or a covered corner leaves free.
    for w in (Window(0, 0, 1, 0.6), Window(0, 0.4, 1, 0.6), Window(0, 0, 0.6, 1), Window(0.4, 0, 0.6, 1)):
        views += [View(window=w, of=w), View(window=w.mirrored(), of=w, mirrored=True)]
    return tuple(views)


VIEWS = _views()
ORIENTATIONS = VIEWS[:8]
IDENTITY, MIRROR = VIEWS.index(View()), VIEWS.index(View(mirrored=True))


def orientations(view: NDArray[np.int16], backwards: NDArray[np.bool_]) -> NDArray[np.int16]:
    """For each view, the number in `ORIENTATIONS` that turns the first image into the second one, or the second into
    the first if `backwards`.
    """
    turns = np.array([v.turns for v in VIEWS])[view]
    mirrored = np.array([v.mirrored for v in VIEWS])[view]
    # A mirrored turn is its own inverse.
    turns = np.where(backwards & ~mirrored, -turns % 4, turns)
    return np.asarray(2 * turns + mirrored, dtype=np.int16)


def nearest_orientation(maps: Floats) -> NDArray[np.int16]:
    """The number in `ORIENTATIONS` that turns a into b, for affine maps [P, 6] from b's coordinates to a's."""
    linear = maps.reshape(-1, 2, 3)[:, :, :2]
    return np.asarray(np.einsum("pij,oij->po", linear, starts()[:8, :, :2]).argmax(axis=1), dtype=np.int16)


def starts() -> Floats:
    """For each view, the affine map [V, 2, 3] from the second image's coordinates to the first's; both run from -1 to
    1.
    """
    return np.stack([_start(view) for view in VIEWS]).astype(np.float32)


def _start(view: View) -> NDArray[np.float64]:
    turn = np.array([[0, -1], [1, 0]], float)  # coordinates before a quarter turn from those after it
    linear = np.diag([-1.0 if view.mirrored else 1.0, 1.0]) @ np.linalg.matrix_power(turn, view.turns)
    first, second = _placed(view.window), _placed(view.of)
    oriented = np.eye(3)
    oriented[:2, :2] = linear
    return np.asarray((first @ oriented @ np.linalg.inv(second))[:2])


def _placed(window: Window) -> NDArray[np.float64]:
    """Coordinates of the whole image from those inside the window."""
    return np.array(
        [
            [window.width, 0, 2 * window.left + window.width - 1],
            [0, window.height, 2 * window.top + window.height - 1],
            [0, 0, 1],
        ]
    )


def cells(window: Window = WHOLE, mirrored: bool = False, turns: int = 0) -> Floats:
    """The linear map [C*C, 1024] from a thumbnail to its window's oriented cells, with the mean subtracted."""
    across = _averages(window.left, window.width)[:: -1 if mirrored else 1]
    down = _averages(window.top, window.height)
    grid = np.einsum("ij,kl->ikjl", down, across)  # cell row, cell column, pixel row, pixel column
    grid = np.rot90(grid, turns, axes=(0, 1)).reshape(CELLS**2, THUMBNAIL_SIDE**2)
    return np.ascontiguousarray(grid - grid.mean(axis=0), dtype=np.float32)


def _averages(start: float, length: float) -> NDArray[np.float64]:
    """[C, 32]: each row averages an equal share of start..start+length (of the whole side)."""
    edges = (start + length * np.linspace(0, 1, CELLS + 1)) * THUMBNAIL_SIDE
    pixels = np.arange(THUMBNAIL_SIDE)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.maximum(overlap, 0) / (edges[1:] - edges[:-1])[:, None])


def described(thumbnails: Bytes, operator: Floats, whitening: Floats) -> Floats:
    """Unit rows [N, D] of thumbnails [N, 1024]; zero if the window has too little contrast."""
    out = np.zeros((len(thumbnails), whitening.shape[1]), np.float32)
    for start in range(0, len(thumbnails), ROWS):
        values = thumbnails[start : start + ROWS].astype(np.float32) @ operator.T
        contrast = np.sqrt(np.einsum("ij,ij->i", values, values)) / CELLS
        rows = values @ whitening
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
        rows[contrast < LOW_CONTRAST] = 0
        out[start : start + ROWS] = rows
    return out


def whitening(thumbnails: Bytes, dimensions: int) -> Floats:
    """[C*C, D]: principal directions of whole thumbnails, each divided by its standard deviation."""
    rows = thumbnails.astype(np.float32) @ cells().T
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), LOW_CONTRAST * CELLS)
    values, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows / len(rows))
    largest = slice(None, -dimensions - 1, -1)
    return np.ascontiguousarray(vectors[:, largest] / np.sqrt(values[largest]), dtype=np.float32)


@dataclass(frozen=True)
class Found:
    """P matches of images `a`, each pair once."""

    a: Ints
    b: Ints
    view: NDArray[np.int16]
    similarity: Floats

    def __getitem__(self, rows: Ints | NDArray[np.bool_]) -> Found:
        return Found(self.a[rows], self.b[rows], self.view[rows], self.similarity[rows])


class ViewIndex:
    """The described thumbnails [N, 1024] that others are compared with: 5 windows of D numbers per image."""

    def __init__(self, thumbnails: Bytes, whitening: Floats, half: bool) -> None:
        self._whitening = whitening
        self._dtype = torch.bfloat16 if half else torch.float32
        self._padding = -len(thumbnails) % GROUPS
        self._bases: dict[Window, tuple[Floats, torch.Tensor]] = {}
        for window in {view.of for view in VIEWS}:
            rows = described(thumbnails, cells(window), whitening)
            padded = np.pad(rows, ((0, self._padding), (0, 0)))
            self._bases[window] = rows, torch.from_numpy(padded).to(self._dtype).T.contiguous()

    def search(self, thumbnails: Bytes, start: int, stop: int, same: bool) -> Found:
        """The best matches of images start..stop of these thumbnails [Q, 1024], which may be the `same` as the
        index's.
        """
        # Whole blocks at multiples of BLOCK, so that rounding, and the choice between two views, do not depend on the
        # run.
        first, last = start - start % BLOCK, len(thumbnails)
        ends = ((at, min(at + BLOCK, last)) for at in range(first, stop, BLOCK))
        whole = joined([self._block(thumbnails, at, end, same) for at, end in ends])
        return whole[(whole.a >= start) & (whole.a < stop)]

    def _block(self, thumbnails: Bytes, start: int, stop: int, same: bool) -> Found:
        found = list(self._by_view(thumbnails[start:stop]))
        rows = np.concatenate([b for b, _ in found], axis=1)
        similarity = np.concatenate([s for _, s in found], axis=1)
        view = np.repeat(np.arange(len(VIEWS), dtype=np.int16), [b.shape[1] for b, _ in found])
        view = np.broadcast_to(view, rows.shape)
        # Each match once, by its best view: sorted by row, then similarity, it is the first of its run.
        order = np.lexsort((-similarity, rows), axis=1)
        rows, similarity, view = (np.take_along_axis(x, order, 1) for x in (rows, similarity, view))
        again = np.zeros(rows.shape, bool)
        again[:, 1:] = rows[:, 1:] == rows[:, :-1]
        similarity[again] = -2
        if same:
            similarity[rows == np.arange(start, stop)[:, None]] = -2
        order = np.lexsort((rows, -similarity), axis=1)[:, :KEPT]
        rows, similarity, view = (np.take_along_axis(x, order, 1) for x in (rows, similarity, view))
        positive = similarity > 0
        a = np.broadcast_to(np.arange(start, stop)[:, None], rows.shape)
        return Found(a[positive], rows[positive], view[positive], similarity[positive])

    def _by_view(self, thumbnails: Bytes) -> Iterator[tuple[Ints, Floats]]:
        """For each view: matches [Q, KEPT] and their similarity in fp32, chosen in half precision if that is faster."""
        for view in VIEWS:
            queries = described(thumbnails, _operator(view), self._whitening)
            rows, base = self._bases[view.of]
            best = _best(torch.from_numpy(queries).to(self._dtype) @ base, KEPT)
            best = np.minimum(best, len(rows) - 1)
            yield best, np.einsum("qkd,qd->qk", rows[best], queries)


def joined(found: Sequence[Found]) -> Found:
    """All matches, one after the other."""
    return Found(
        np.concatenate([f.a for f in found]),
        np.concatenate([f.b for f in found]),
        np.concatenate([f.view for f in found]),
        np.concatenate([f.similarity for f in found]),
    )


@functools.lru_cache(maxsize=len(VIEWS))
def _operator(view: View) -> Floats:
    return cells(view.window, view.mirrored, view.turns)


def _best(similarity: torch.Tensor, k: int) -> Ints:
    """Columns [Q, k] of the k largest numbers of each row of [Q, N], N a multiple of GROUPS.

    The k largest are in the k groups with the largest maxima, so the actual search sees a sixteenth of the numbers.
    """
    groups = similarity.shape[1] // GROUPS
    folded = similarity.view(len(similarity), GROUPS, groups)
    if groups <= k:
        return np.asarray(similarity.float().topk(min(k, similarity.shape[1]), dim=1).indices.numpy())
    chosen = folded.amax(dim=1).float().topk(k, dim=1).indices
    inside = folded.gather(2, chosen[:, None, :].expand(-1, GROUPS, -1)).reshape(len(similarity), GROUPS * k)
    best = inside.float().topk(k, dim=1).indices
    return np.asarray((torch.div(best, k, rounding_mode="floor") * groups + chosen.gather(1, best % k)).numpy())


@dataclass(frozen=True)
class Candidates:
    """P pairs of images, the first seen in `view`, sorted by (smaller, larger) image; a is not always the smaller
    one.
    """

    a: Ints
    b: Ints
    view: NDArray[np.int16]
    similarity: Floats
    stands_out: Floats  # similarity above what the two images find at `RANKS`

    def __getitem__(self, rows: slice | Ints) -> Candidates:
        return Candidates(self.a[rows], self.b[rows], self.view[rows], self.similarity[rows], self.stands_out[rows])


def standing_out(found: Found, count: int) -> Candidates:
    """The pairs among `count` images worth aligning, each by its best view. `found` holds the matches of all images,
    wherever they were searched: the `KEPT` best of each count.
    """
    found, rank = _ranked(found)
    surroundings = np.maximum(_surroundings(found, rank, count), USUAL if count < SMALL_POOL else 0)
    low, high = np.minimum(found.a, found.b), np.maximum(found.a, found.b)
    out = found.similarity - (surroundings[found.a] + surroundings[found.b]) / 2
    order = np.lexsort((found.a, -found.similarity, low * count + high))
    order = order[out[order] > STANDS_OUT]
    key = (low * count + high)[order]
    order = order[np.r_[True, key[1:] != key[:-1]]] if len(order) else order
    return Candidates(found.a, found.b, found.view, found.similarity, out.astype(np.float32))[order]


def _ranked(found: Found) -> tuple[Found, Ints]:
    """The `KEPT` best matches of each image, best first, and the rank of each."""
    order = np.lexsort((found.b, -found.similarity, found.a))
    rank = ranks(found.a[order])
    kept = rank < KEPT
    return found[order[kept]], rank[kept]


def _surroundings(found: Found, rank: Ints, count: int) -> Floats:
    """The similarity of different images to each image, float32 [N]: the mean of its matches at `RANKS`, 0 if it has
    none there.
    """
    in_ranks = (rank >= RANKS.start) & (rank < RANKS.stop)
    sums = np.bincount(found.a[in_ranks], found.similarity[in_ranks], minlength=count)
    return (sums / np.maximum(np.bincount(found.a[in_ranks], minlength=count), 1)).astype(np.float32)
