"""Finding and verifying copies as a stage does it: parts in a store, pairs the right way round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import dedup_spec, drawing, thumbnail_of
from inline import artifact, without_engine
from PIL import Image

from lodeset.pipeline.algorithms.copies import shipped
from lodeset.pipeline.algorithms.copies.alignment import warped
from lodeset.pipeline.algorithms.copies.views import ORIENTATIONS
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.specs import DedupRuntime
from lodeset.pipeline.stages.dedup import candidates, pairwise
from lodeset.pipeline.stages.dedup.candidates import MEASURED, Looked, Seen, find_and_verify
from lodeset.pipeline.stages.dedup.generations import TABLE, generations_of
from lodeset.pipeline.stages.dedup.universe import Members, Universe
from lodeset.pipeline.tables import records

COUNT = 50


def looked(
    folder: Path,
    pixels: np.ndarray,
    order: np.ndarray,
    part_images: int = 4_096,
    within: bool = True,
    reference: int | None = None,
    chosen: slice = slice(None),
    previous: Artifact | None = None,
    version: int = 1,
) -> tuple[Looked, Artifact]:
    """What is found among the `chosen` of thumbnails whose ids sort in `order`, and what the next run may go on from.

    `version` is that of the stage that made the thumbnails.
    """
    store = Store(str(folder))
    ids = tuple(f"{n:032x}" for n in range(len(order)))[chosen]
    shown = pixels[order][chosen]
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
    universe = Universe(ids, ~held, held, nobody, sizes, sizes, sizes.astype(np.uint64), shown, nobody, {})
    sets = [Members("pool", "pool", (part.files["images"],), ())]
    stage = Stage(
        "dedup",
        "pool",
        1,
        "ray",
        lambda _: None,
        dedup_spec(within=within),
        runtime=DedupRuntime(part_images=part_images, max_pixels=10**6),
    )
    images = replace(artifact("ingest", "pool", Outcome({}, Rows(0, 0))), version=version)
    context = Context(store, stage, "f", {"images:pool": images}, 1, lambda _: None, previous)
    generations = generations_of(store, previous, ids)
    found = find_and_verify(context, sets, universe, generations)
    tables = {TABLE: tuple(one.file for one in generations), MEASURED.table: found.measured.files}
    made = artifact("dedup", "pool", Outcome(tables, Rows(0, 0), details={MEASURED.by: found.measured.basis}))
    return found, made


def same(one: Seen, other: Seen) -> None:
    for name in ("a", "b", "orientation"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("similarity", "stands_out", "score", "maps"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4)


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Drawn pictures; the last one is the first, cropped and turned by a quarter."""
    without_engine(candidates, monkeypatch)
    without_engine(pairwise, monkeypatch)
    torch.set_num_threads(1)
    first = drawing(0)
    cropped = first.crop((8, 6, 156, 124)).transpose(Image.Transpose.ROTATE_90)
    return np.stack([thumbnail_of(drawing(n)) for n in range(COUNT)] + [thumbnail_of(cropped)])


@pytest.mark.parametrize("backwards", [False, True])
def test_a_turned_crop_is_told_the_right_way_round(pixels: np.ndarray, tmp_path: Path, backwards: bool) -> None:
    order = np.arange(COUNT + 1)[:: -1 if backwards else 1]
    seen = looked(tmp_path, pixels, order)[0].seen
    (row,) = np.flatnonzero((seen.a == 0) & (seen.b == COUNT))
    assert seen.score[row] > 3
    assert ORIENTATIONS[seen.orientation[row]].name == ("turn_270" if backwards else "turn_90")
    both = torch.from_numpy(pixels[order[[0, COUNT]]].astype(np.float32)).reshape(2, 32, 32)
    first, inside = warped(both[:1], torch.from_numpy(seen.maps[row]).reshape(1, 2, 3))
    shared = inside[0] > 0
    assert np.corrcoef(first[0][shared], both[1].reshape(-1)[shared])[0, 1] > 0.95


def test_parts_are_kept_and_tell_the_same_however_they_are_cut(pixels: np.ndarray, tmp_path: Path) -> None:
    order = np.arange(COUNT + 1)
    whole, _ = looked(tmp_path / "a", pixels, order)
    assert whole.parts_made == 2 and looked(tmp_path / "a", pixels, order)[0].parts_made == 0
    cut, _ = looked(tmp_path / "b", pixels, order, part_images=13)
    assert cut.parts_made > 2
    for name in ("a", "b", "orientation", "score", "maps"):
        np.testing.assert_array_equal(getattr(whole.seen, name), getattr(cut.seen, name))


def test_a_grown_pool_tells_what_it_would_from_scratch_and_costs_what_is_new(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    order = np.roll(np.arange(COUNT + 1), 20)
    scratch, _ = looked(tmp_path / "a", pixels, order)
    first, made = looked(tmp_path / "b", pixels, order, chosen=slice(0, -9))
    grown, made = looked(tmp_path / "b", pixels, order, previous=made)
    same(scratch.seen, grown.seen)
    # New among old, old among new, new among new; and one part of newly aligned pairs beside the old one.
    assert (first.parts, grown.parts, grown.parts_made) == (2, 6, 4)
    assert grown.measured.files[:-1] == first.measured.files
    aligned = sum(file.rows for file in grown.measured.files[len(first.measured.files) :])
    assert 0 < aligned < len(scratch.seen.a) - 0.5 * len(first.seen.a)
    again, _ = looked(tmp_path / "b", pixels, order, previous=made)
    assert again.parts_made == 0


def test_images_that_left_are_nobodys_neighbours(pixels: np.ndarray, tmp_path: Path) -> None:
    order = np.arange(COUNT + 1)
    _, made = looked(tmp_path / "a", pixels, order)
    left, _ = looked(tmp_path / "a", pixels, order, chosen=slice(2, None), previous=made)
    assert left.parts_made == 0
    scratch, _ = looked(tmp_path / "b", pixels, order, chosen=slice(2, None))
    found = {(a, b): s for a, b, s in zip(left.seen.a, left.seen.b, left.seen.score, strict=True)}
    expected = {(a, b): s for a, b, s in zip(scratch.seen.a, scratch.seen.b, scratch.seen.score, strict=True)}
    assert len(found.keys() & expected.keys()) >= 0.95 * len(found.keys() | expected.keys())


def test_an_image_that_comes_back_is_compared_with_what_came_meanwhile(pixels: np.ndarray, tmp_path: Path) -> None:
    """Node 0 is away while its copy, the last one, comes."""
    order = np.arange(COUNT + 1)
    _, made = looked(tmp_path, pixels, order, chosen=slice(0, -1))
    _, made = looked(tmp_path, pixels, order, chosen=slice(1, None), previous=made)
    back, made = looked(tmp_path, pixels, order, previous=made)
    assert ((back.seen.a == 0) & (back.seen.b == COUNT)).sum() == 1
    assert looked(tmp_path, pixels, order, previous=made)[0].parts_made == 0


def test_thumbnails_made_otherwise_and_other_networks_are_other_parts(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = np.arange(COUNT + 1)
    _, made = looked(tmp_path, pixels, order)
    assert looked(tmp_path, pixels, order, previous=made, version=2)[0].parts_made == 2
    monkeypatch.setattr(shipped, "identity", lambda _: "other networks")
    assert looked(tmp_path, pixels, order, previous=made)[0].parts_made == 2


def test_without_copies_of_its_own_the_pool_is_aligned_with_references_alone(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    order = np.arange(COUNT + 1)
    seen = looked(tmp_path, pixels, order, within=False, reference=COUNT)[0].seen
    assert ((seen.a == 0) & (seen.b == COUNT)).sum() == 1 and set(seen.b) == {COUNT}
    assert not len(looked(tmp_path, pixels, order, within=False)[0].seen.a)


def test_new_generations_swallow_those_that_are_not_larger(tmp_path: Path) -> None:
    store, ids = Store(str(tmp_path)), [f"{n:032x}" for n in range(200)]
    previous, sizes = None, []
    for count in (100, 110, 120, 130, 140):
        made = generations_of(store, previous, ids[:count])
        sizes.append([len(one.ids) for one in made])
        tables = {TABLE: tuple(one.file for one in made)}
        previous = artifact("dedup", "pool", Outcome(tables, Rows(0, 0)))
        nodes = np.concatenate([one.nodes for one in made])
        assert sorted(nodes) == list(range(count))
    assert sizes == [[100], [100, 10], [100, 20], [100, 20, 10], [100, 40]]
    # A tenth of a generation may leave; of one that lost more, the rest is new.
    stays = generations_of(store, previous, ids[10:140])
    assert [len(one.ids) for one in stays] == [100, 40] and (stays[0].nodes < 0).sum() == 10
    assert [len(one.ids) for one in generations_of(store, previous, ids[11:140])] == [129]
