"""Full images decide where thumbnails are in doubt: what is drawn and measured, parts in a store, and the rule."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import dedup_spec, encoded, id_of, textured, write_tar
from inline import artifact, without_engine
from PIL import Image, ImageDraw

from lodeset.infra.dashboard import close_looks
from lodeset.pipeline.algorithms.copies import closeup, details
from lodeset.pipeline.algorithms.copies.closeup import FEATURES
from lodeset.pipeline.algorithms.copies.keypoints import aligned, described
from lodeset.pipeline.algorithms.copies.views import ORIENTATIONS, nearest_orientation, starts
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.specs import DedupRuntime
from lodeset.pipeline.stages.dedup import pairwise
from lodeset.pipeline.stages.dedup.closeups import CLOSEUPS, Looks, look
from lodeset.pipeline.stages.dedup.judging import Pairs, doubtful, settled
from lodeset.pipeline.stages.dedup.pairwise import Kind, Known, measured_before
from lodeset.pipeline.stages.dedup.universe import Universe
from lodeset.pipeline.tables import records

SPEC = dedup_spec(min_score=4.0)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_engine(pairwise, monkeypatch)
    torch.set_num_threads(1)


def stamped(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((20, 90, 70, 120), fill=(250, 250, 250))
    return image


def features_of(first: Image.Image, second: Image.Image) -> dict[str, float]:
    one, other = described(first), described(second)
    found = aligned(one, other)
    common = closeup.overlap(one, other, found) if found else None
    assert common is not None
    return dict(zip(FEATURES, closeup.measured([common])[0].tolist(), strict=True))


def test_what_both_show_is_drawn_from_each() -> None:
    image = textured(1)
    crop = image.crop((40, 20, 130, 100)).rotate(25, Image.Resampling.BICUBIC)
    one, other = described(image), described(crop)
    found = aligned(one, other)
    assert found is not None
    drawn = closeup.overlap(one, other, found)
    assert drawn is not None
    middle = slice(20, 44)  # the corners of a turned crop are black
    seen = np.corrcoef(drawn.first[middle, middle].ravel(), drawn.second[middle, middle].ravel())[0, 1]
    assert seen > 0.99
    share = 90 * 80 / (160 * 128)
    assert dict(zip(FEATURES[-7:], drawn.facts, strict=True))["overlap_first"] == pytest.approx(share, rel=0.1)


def test_copies_agree_and_are_not_displaced_while_moved_parts_are() -> None:
    image = textured(2)
    copy = features_of(image, image.crop((10, 4, 156, 126)))
    assert copy["displacement"] < 0.15 and copy["displaced"] < 0.05
    assert copy["agreeing_tiles"] > 0.8 and copy["robust_detail_correlation"] > 0.95
    # A second photograph: the right half stands nearer, and so moved further.
    moved = image.copy()
    moved.paste(image.crop((80, 0, 156, 128)), (84, 0))
    scene = features_of(image, moved)
    assert scene["displaced"] > copy["displaced"] + 0.2 and scene["displacement"] > 2 * copy["displacement"]


def test_the_networks_tell_altered_copies_from_scenes() -> None:
    def score(first: Image.Image, second: Image.Image) -> float:
        found = features_of(first, second)
        return float(closeup.score(np.array([[found[name] for name in FEATURES]], np.float32))[0])

    for seed in range(3, 6):
        image = textured(seed)
        assert score(image, stamped(image.crop((20, 10, 150, 110)))) > 4
        assert score(image, image.rotate(33, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))) > 4
        moved = image.copy()
        for top, shift in zip(
            range(0, 128, 16), (0, 5, 1, 6, 2, 5, 0, 4), strict=True
        ):  # what stands at other distances
            moved.paste(image.crop((0, top, 160 - shift, top + 16)), (shift, top))
        assert score(image, moved) < 3


def test_the_area_that_two_images_share_is_that_of_a_grid() -> None:
    rng = np.random.default_rng(0)
    spots = (np.mgrid[0:400, 0:400].reshape(2, -1).T + 0.5) / 400 * np.array([60, 40])
    for _ in range(20):
        linear, middle = rng.normal(0, 1, (2, 2)), rng.uniform(0, 40, 2)
        corners = np.array([[-20, -20], [20, -20], [20, 20], [-20, 20]]) @ linear.T + middle
        inside = (np.abs((spots - middle) @ np.linalg.inv(linear).T) < 20).all(axis=1)
        assert closeup._area(closeup._clipped(corners, 60, 40)) == pytest.approx(2400 * inside.mean(), abs=8)
    square = np.array([[0, 0], [60, 0], [60, 40], [0, 40]], float)
    for shift in (0, 1e-7, -1e-5, 1e-3):
        assert closeup._area(closeup._clipped(square + shift, 60, 40)) == pytest.approx(2400, abs=1)
    assert closeup._area(closeup._clipped(square + 100, 60, 40)) == 0


def test_one_pair_is_told_as_it_is_among_others() -> None:
    pictures = [(textured(n), stamped(textured(n))) for n in range(3)]
    overlaps = []
    for first, second in pictures:
        one, other = described(first), described(second)
        found = aligned(one, other)
        assert found is not None
        overlaps.append(closeup.overlap(one, other, found))
    features = closeup.measured(overlaps)
    np.testing.assert_array_equal(closeup.measured(overlaps[:1])[0], features[0])
    np.testing.assert_array_equal(closeup.score(features[:1]), closeup.score(features)[:1])


def test_the_nearest_orientation_is_that_of_its_own_start() -> None:
    maps = starts()[:8].reshape(8, 6) + np.random.default_rng(0).uniform(-0.3, 0.3, (8, 6)).astype(np.float32)
    assert nearest_orientation(maps).tolist() == list(range(8))


# -- parts


class Pool:
    """A tar of pictures as ingest would list it: four, a mirrored crop of the first, a stranger to all that has no texture."""

    def __init__(self, folder: Path) -> None:
        images = [textured(n) for n in range(4)]
        crop = images[0].crop((30, 20, 150, 120)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        data = {id_of(d): d for d in map(encoded, [*images, crop, Image.new("RGB", (80, 80), (7, 7, 7))])}
        self.data, self.ids = data, tuple(sorted(data))
        self.first, self.crop, self.blank = (
            id_of(encoded(image)) for image in (images[0], crop, Image.new("RGB", (80, 80), (7, 7, 7)))
        )
        tar = write_tar(folder / "pool.tar", [(f"{n}.png", data[i]) for n, i in enumerate(self.ids)])
        self.store = Store(str(folder / "store"))
        blank = dict.fromkeys(records.IMAGES.names)
        rows, offset = [], 0
        for image_id in self.ids:
            place = {"image_id": image_id, "uri": str(tar), "member": "x.png", "offset": offset + 512}
            rows.append({**dict.fromkeys(records.LOCATIONS.names), **place, "size_bytes": len(data[image_id])})
            offset += 512 + -(-len(data[image_id]) // 512) * 512
        tables = {
            "images": pa.Table.from_pylist([{**blank, "image_id": i} for i in self.ids], schema=records.IMAGES),
            "locations": pa.Table.from_pylist(rows, schema=records.LOCATIONS),
        }
        part = self.store.commit_part("ingest", "0" * 64, tables)
        self.images = artifact("ingest", "pool", Outcome({k: (f,) for k, f in part.files.items()}, Rows(0, 0)))

    def look(self, a: list[int], b: list[int], previous: Artifact | None = None) -> tuple[Looks, Artifact]:
        stage = Stage(
            "dedup", "pool", 1, "ray", lambda _: None, {}, runtime=DedupRuntime(part_images=1, max_pixels=10**6)
        )
        context = Context(self.store, stage, "f", {}, 1, lambda _: None, previous)
        found = look(context, [self.images], self.ids, np.array(a, np.int64), np.array(b, np.int64))
        outcome = Outcome({CLOSEUPS.table: found.known.files}, Rows(0, 0), details={CLOSEUPS.by: found.known.basis})
        return found, artifact("dedup", "pool", outcome)


def test_pairs_are_looked_at_once_and_told_in_the_order_asked(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pair = sorted((pool.ids.index(pool.first), pool.ids.index(pool.crop)))
    a, b = np.triu_indices(len(pool.ids), 1)
    found, made = pool.look(a.tolist(), b.tolist())
    copies = (a == pair[0]) & (b == pair[1])
    assert found.points[copies] > 20 and found.score[copies] > 4
    assert "mirror" in ORIENTATIONS[nearest_orientation(found.maps[copies])[0]].name
    assert (found.points[~copies] == 0).sum() >= copies.size - 2
    assert not found.points[(a == pool.ids.index(pool.blank)) | (b == pool.ids.index(pool.blank))].any()
    assert (found.known.parts, found.known.parts_made) == (1, 1)
    assert measured_before(made, (CLOSEUPS,), []) == [(CLOSEUPS, found.known.basis, found.known.files)]
    # Some of them again, backwards: nothing is read.
    (tmp_path / "pool.tar").unlink()
    again, _ = pool.look(a[::-2].tolist(), b[::-2].tolist(), made)
    assert again.known.parts_made == 0
    np.testing.assert_array_equal(again.points, found.points[::-2])
    np.testing.assert_allclose(again.score, found.score[::-2], rtol=1e-4)


def test_the_dashboard_draws_what_a_close_look_measured(tmp_path: Path) -> None:
    """For each pair, also one whose key points say nothing."""
    pool = Pool(tmp_path)
    a, b = np.triu_indices(len(pool.ids), 1)
    found, _ = pool.look(a.tolist(), b.tolist())
    seen = [close_looks._seen(Image.open(io.BytesIO(pool.data[image_id]))) for image_id in pool.ids]
    drawn = [close_looks.compared(seen[one], seen[other]) for one, other in zip(a.tolist(), b.tolist(), strict=True)]
    assert np.isnan(found.details).tolist() == [one is None for one in drawn]
    told = [float(details.score(one.features[None])[0]) for one in drawn if one is not None]
    assert told
    np.testing.assert_allclose(told, found.details[~np.isnan(found.details)], rtol=1e-3)


# -- the rule


def asked(count: int, **columns: object) -> tuple[Universe, Pairs]:
    """`count` pairs of 2 x count nodes, the first of which is a reference image."""
    nodes, nobody = 2 * count, np.zeros(2 * count, bool)
    reference = np.arange(nodes) == 0
    thumbnails = np.zeros((nodes, 1024), np.uint8)
    side = np.full(nodes, closeup.LEAST_SIDE)
    area = side * side
    ids = tuple(f"{n:032x}" for n in range(nodes))
    universe = Universe(ids, ~reference, reference, nobody, area, side, area.astype(np.uint64), thumbnails, nobody, {})
    nothing = np.full(count, np.nan, np.float32)
    a = np.arange(count) * 2
    pairs = Pairs(
        a, a + 1, nothing, np.zeros(count, np.int16), np.zeros(count, bool), np.zeros(count, np.int8), np.zeros(count, np.int16), nothing,
        np.full((count, 6), np.nan, np.float32), np.full(count, -1), nothing, np.zeros(count, bool), np.full(count, -np.inf, np.float32),
    )  # fmt: skip
    return universe, dataclasses.replace(pairs, **columns)


def test_full_images_settle_what_thumbnails_left_open() -> None:
    #              reference: stays | no texture | copy after all | stranger after all | stands | neither
    thumbs = np.array([6.0, 5.0, 1.0, 5.0, 5.0, -3.0], np.float32)
    close = np.array([-5.0, 0.0, 4.5, -1.5, 0.5, -0.5], np.float32)
    points = np.array([9, 0, 9, 9, 9, 9])
    yes = np.array([1, 1, 0, 1, 1, 0], np.int8)
    maps = np.tile(starts()[1].reshape(6), (6, 1))
    universe, pairs = asked(6, score=thumbs, verified=yes, linked=yes == 1, maps=np.zeros((6, 6), np.float32))
    known, nothing = (
        Known(Kind("s", "t", "by", pairs=1, seconds=1.0), "", None, (), 0, 0),
        np.full(6, np.nan, np.float32),
    )
    now = settled(universe, pairs, np.arange(6), Looks(points, close, nothing, maps, known), SPEC)
    # The last one is an edge no more: only a view brought it.
    assert now.a.tolist() == [0, 2, 4, 6, 8]
    assert now.linked.tolist() == [True, True, True, False, True] == (now.verified == 1).tolist()
    assert now.score.tolist() == [6.0, 5.0, 4.5, -1.5, 5.0] and now.points.tolist() == [9, 0, 9, 9, 9]
    for least in (-2.0, -0.5, 0.5, 1.0, 4.5, 5.0, 5.5, 7.0):
        asked_for = dataclasses.replace(
            pairs, verified=(thumbs >= least).astype(np.int8), limit=thumbs, hashed=yes >= 0
        )
        spec = dataclasses.replace(SPEC, min_score=least)
        then = settled(universe, asked_for, np.arange(6), Looks(points, close, nothing, maps, known), spec)
        assert then.linked[points > 0].tolist() == (then.limit >= least)[points > 0].tolist()
    near = dataclasses.replace(pairs, similarity=np.array([0, 0, 0, 0, 0, 0.7], np.float32))
    assert len(settled(universe, near, np.arange(6), Looks(points, close, nothing, maps, known), SPEC).a) == 6
    assert [ORIENTATIONS[o].name for o in now.orientation] == ["identity", "identity", "mirror", "mirror", "identity"]


def test_details_tell_mates_from_copies_whatever_else_agrees() -> None:
    #                reference: enough | reference: too little | upright, no points | aligned | close look alone | not compared
    details = np.array([-1.9, -2.1, -0.1, 0.4, 3.0, np.nan], np.float32)
    count = len(details)
    universe, pairs = asked(
        count,
        verified=np.ones(count, np.int8),
        linked=np.ones(count, bool),
        limit=np.full(count, np.inf, np.float32),
        similarity=np.full(count, 0.9, np.float32),
    )
    universe.reference[2] = True  # of the second pair, too
    points = np.array([9, 9, 0, 9, 9, 0])
    maps = np.tile(starts()[0].reshape(6), (count, 1))
    known = Known(Kind("s", "t", "by", pairs=1, seconds=1.0), "", None, (), 0, 0)
    looks = Looks(points, np.full(count, 9, np.float32), details, maps, known)
    now = settled(universe, pairs, np.arange(count), looks, SPEC)
    assert now.linked.tolist() == [True, False, False, False, True, True] == (now.verified == 1).tolist()
    assert np.isneginf(now.limit).tolist() == (~now.linked).tolist()
    assert now.details[:5].tolist() == details[:5].tolist() and np.isnan(now.details[5])
    without = dedup_spec(min_score=4.0, min_detail_score=None)
    assert settled(universe, pairs, np.arange(count), looks, without).linked.all()


def test_only_large_images_are_looked_at() -> None:
    universe, pairs = asked(
        4,
        score=np.array([-2, 9, np.nan, np.nan], np.float32),
        verified=np.array([0, 1, 1, 0], np.int8),
        similarity=np.array([0.1, 0.1, 0.9, 0.9], np.float32),
    )
    assert doubtful(universe, pairs, 0.5, SPEC).tolist() == [0, 1, 2, 3]
    # Without details, thumbnails are believed that agree as they are.
    assert doubtful(universe, pairs, 0.5, dedup_spec(min_score=4.0, min_detail_score=None)).tolist() == [0, 1, 3]
    universe.side[6] -= 1
    assert doubtful(universe, pairs, 0.5, SPEC).tolist() == [0, 1, 2]
    assert not len(doubtful(universe, pairs, 0.5, dedup_spec(min_score=4.0, closeups=False)))
    assert not len(doubtful(universe, pairs, 0.5, dedup_spec(min_score=4.0, verify="none")))
    assert doubtful(universe, pairs, 0.5, dedup_spec(min_score=4.0, within=False)).tolist() == [0]


def test_neighbours_are_looked_at_that_stand_out_among_the_nearest() -> None:
    """Twenty images, all alike but for pairs (0, 1) and (2, 3), which are near, and 4, which is near to six."""
    a, b = np.triu_indices(20, 1)
    similarity = np.full(len(a), 0.6, np.float32)
    for first, second, near in ((0, 1, 0.9), (2, 3, 0.64), *((4, n, 0.9 - n / 100) for n in range(5, 11))):
        similarity[(a == first) & (b == second)] = near
    universe, pairs = asked(len(a), similarity=similarity)
    rows = doubtful(universe, dataclasses.replace(pairs, a=a, b=b), 0.5, SPEC)
    # 4 stands out for each of the six, whose nearest it is.
    assert list(zip(a[rows], b[rows], strict=True)) == [(0, 1), *((4, n) for n in range(5, 11))]
    # Hashes propose pairs by themselves; strangers that views brought take nobody's place.
    hashed = (a == 12) & (b == 13)
    similarity[hashed | ((a < 2) & (b > 13))] = np.nan
    universe, pairs = asked(len(a), similarity=similarity, hashed=hashed)
    rows = doubtful(universe, dataclasses.replace(pairs, a=a, b=b), 0.5, SPEC)
    assert {(0, 1), (12, 13)} <= set(zip(a[rows], b[rows], strict=True))
    universe, pairs = asked(2, hashed=np.array([True, False]))
    assert doubtful(universe, pairs, 0.5, SPEC).tolist() == [0]
