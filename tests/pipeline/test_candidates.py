"""Finding and verifying copies as a stage does it: parts in a store, pairs the right way round."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import drawing, thumbnail_of
from PIL import Image

from pipeline import records
from pipeline.algorithms import evidence
from pipeline.algorithms.alignment import warped
from pipeline.algorithms.views import ORIENTATIONS
from pipeline.dag.stage import Context, Stage
from pipeline.dag.store import Store
from pipeline.stages import candidates
from pipeline.stages.candidates import Seen, find_and_verify
from pipeline.stages.universe import Members, Universe

COUNT = 50


def here(make: Callable[[], Callable[[Any], Any]], items: Iterable[Any], **_: Any) -> Iterator[Any]:
    """`map_with_state` in this process."""
    return map(make(), items)


def looked(
    folder: Path,
    pixels: np.ndarray,
    order: np.ndarray,
    part_images: int = 4_096,
    within: bool = True,
    reference: int | None = None,
) -> tuple[Seen, int]:
    """What is found among thumbnails whose ids sort in `order`, and how many parts were made."""
    store = Store(str(folder))
    ids = tuple(f"{n:032x}" for n in range(len(order)))
    shown = pixels[order]
    table = pa.Table.from_pylist(
        [
            {**dict.fromkeys(records.IMAGES.names), "image_id": i, "thumbnail": t.tobytes()}
            for i, t in zip(ids, shown, strict=True)
        ],
        schema=records.IMAGES,
    )
    part = store.commit_part("ingest", f"{hash(shown.tobytes()):x}", {"images": table})
    nobody, sizes = np.zeros(len(ids), bool), np.ones(len(ids), np.int64)
    held = np.arange(len(ids)) == reference
    universe = Universe(ids, ~held, held, nobody, sizes, sizes.astype(np.uint64), shown, nobody, {})
    sets = [Members("pool", "pool", (part.files["images"],), ())]
    stage = Stage("dedup", "pool", 1, "ray", lambda _: None, {"within": within}, speed={"part_images": part_images})
    seen, made, _ = find_and_verify(Context(store, stage, "f", {}, 1, lambda _: None), sets, universe)
    return seen, made


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Drawn pictures; the last one is the first, cropped and turned by a quarter."""
    monkeypatch.setattr(candidates, "map_with_state", here)
    torch.set_num_threads(1)
    first = drawing(0)
    cropped = first.crop((8, 6, 156, 124)).transpose(Image.Transpose.ROTATE_90)
    return np.stack([thumbnail_of(drawing(n)) for n in range(COUNT)] + [thumbnail_of(cropped)])


@pytest.mark.parametrize("backwards", [False, True])
def test_a_turned_crop_is_told_the_right_way_round(pixels: np.ndarray, tmp_path: Path, backwards: bool) -> None:
    order = np.arange(COUNT + 1)[:: -1 if backwards else 1]
    seen, _ = looked(tmp_path, pixels, order)
    (row,) = np.flatnonzero((seen.a == 0) & (seen.b == COUNT))
    assert seen.score[row] > 3
    assert ORIENTATIONS[seen.orientation[row]].name == ("turn_270" if backwards else "turn_90")
    both = torch.from_numpy(pixels[order[[0, COUNT]]].astype(np.float32)).reshape(2, 32, 32)
    first, inside = warped(both[:1], torch.from_numpy(seen.maps[row]).reshape(1, 2, 3))
    shared = inside[0] > 0
    assert np.corrcoef(first[0][shared], both[1].reshape(-1)[shared])[0, 1] > 0.95


def test_parts_are_kept_and_tell_the_same_however_they_are_cut(pixels: np.ndarray, tmp_path: Path) -> None:
    order = np.arange(COUNT + 1)
    whole, made = looked(tmp_path / "a", pixels, order)
    assert made == 2 and looked(tmp_path / "a", pixels, order)[1] == 0
    cut, more = looked(tmp_path / "b", pixels, order, part_images=13)
    assert more > 2
    for name in ("a", "b", "orientation", "score", "maps"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_other_thumbnails_and_other_networks_are_other_parts(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = np.arange(COUNT + 1)
    looked(tmp_path, pixels, order)
    assert looked(tmp_path, 255 - pixels, order)[1] == 2
    monkeypatch.setattr(evidence, "identity", functools.partial(str, "other networks"))
    assert looked(tmp_path, pixels, order)[1] == 2


def test_without_copies_of_its_own_the_pool_is_aligned_with_references_alone(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    order = np.arange(COUNT + 1)
    seen, _ = looked(tmp_path, pixels, order, within=False, reference=COUNT)
    assert ((seen.a == 0) & (seen.b == COUNT)).sum() == 1 and set(seen.b) == {COUNT}
    assert not len(looked(tmp_path, pixels, order, within=False)[0].a)
