"""Faces are blurred into new images with ids of their own; everything else of the pool stays as it is."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import encoded, id_of, pixels
from inline import artifact, without_engine
from onnx_files import write_detector, write_means
from PIL import Image
from pools import Pool, noisy, pictures

from lodeset.infra.looking.trace import trace
from lodeset.infra.report.pictures import load as pictures_of
from lodeset.pipeline import graph
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.filters.config import Faces
from lodeset.pipeline.filters.faces import _boxes_and_scores, blurred, detector
from lodeset.pipeline.filters.models import detector_identity
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages import blur_faces, write_shards
from lodeset.pipeline.stages.standing import shards_before
from lodeset.pipeline.tables import records

BOX = (0.25, 0.25, 0.75, 0.5)  # of an image of 64 x 64: 16 to 48, 16 to 32
PLAIN: dict[str, Any] = {"size": 16, "mean": (0, 0, 0), "std": (1, 1, 1)}


def config(path: Path, **knobs: Any) -> Faces:
    return Faces.model_validate({"path": str(path), **PLAIN, "threshold": 0.6, **knobs})


# -- one image


@pytest.mark.parametrize("unit", ["normalised", "pixels"])
def test_boxes_are_those_above_the_threshold_in_pixels_of_the_image(tmp_path: Path, unit: str) -> None:
    scale = 16 if unit == "pixels" else 1
    boxes = [[v * scale for v in box] for box in (BOX, (0, 0, 1, 1))]
    path = write_detector(tmp_path / "faces.onnx", 16, boxes, [1.0, 0.5])
    detect = detector(config(path, boxes=unit), 1)
    bright = Image.new("RGB", (200, 100), (230, 230, 230))
    np.testing.assert_allclose(detect(bright), [[50, 25, 150, 50]], atol=1e-4)
    assert detect(Image.new("RGB", (200, 100), (20, 20, 20))).shape == (0, 4)


def test_what_lies_in_a_box_is_blurred_and_what_lies_apart_stays() -> None:
    image = noisy(100, (128, 128))
    box = np.array([[32.0, 32.0, 64.0, 64.0]])
    found = blurred(image, box, expand=0.1)
    assert found is not None
    before, after = np.asarray(image, np.int16), np.asarray(found, np.int16)
    assert after[34:62, 34:62, 1].std() < 0.6 * before[34:62, 34:62, 1].std()
    reach = 0.1 * 45.3 + 3 * 0.1 * 45.3 / 4 + 2  # grown by a tenth of the diagonal, and a smooth border
    far = int(64 + reach) + 1
    np.testing.assert_array_equal(after[far:], before[far:])
    np.testing.assert_array_equal(after[:, far:], before[:, far:])


@pytest.mark.parametrize("box", [(200, 0, 300, 40), (-90, -90, -50, -50), (10, 10, 10, 30), (30, 30, 10, 10)])
def test_a_box_that_covers_nothing_changes_nothing(box: tuple[float, ...]) -> None:
    assert blurred(noisy(), np.array([box], np.float64), expand=0.1) is None


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 4), (2,)],
        [(1, 2, 4), (1, 2)],
        [(2,), (2, 4)],
        [(1, 4), (1,)],
        [(1, 1, 4), (1, 1)],
        [(1, 4, 4), (1, 4)],
        [(1, 1, 4), (1,)],
        [(0, 4), (0,)],
        [(1, 0, 4), (1, 0)],
    ],
)
def test_outputs_are_told_apart_by_their_shapes(shapes: list[tuple[int, ...]]) -> None:
    boxes, scores = _boxes_and_scores([np.ones(s, np.float32) for s in shapes], config(Path("x")))
    assert boxes.shape == (len(scores), 4)


@pytest.mark.parametrize(
    "shapes", [[(2, 4)], [(2, 4), (2, 2)], [(2, 5), (2,)], [(2, 4), (3,)], [(2, 4), (2,), (2, 10)], [(2, 2, 4), (2, 2)]]
)
def test_outputs_of_another_kind_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(LodesetError, match=r"the face detector x gives \[\[.*boxes \[N, 4\] with scores \[N\]"):
        _boxes_and_scores([np.ones(s, np.float32) for s in shapes], config(Path("x")))


def test_detectors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    bright = Image.new("RGB", (50, 50), (250, 250, 250))
    path = write_detector(tmp_path / "faces.onnx", 16, [(4, 4, 12, 8)], [1.0])
    with pytest.raises(LodesetError, match=r"which are no shares of the image: set filter\.faces\.boxes to pixels"):
        detector(config(path), 1)(bright)
    with pytest.raises(
        LodesetError, match=r"takes images of 16 x 16 pixels, .* says 24: remove `filter\.faces: size:`"
    ):
        detector(config(path, size=24), 1)(bright)
    with pytest.raises(LodesetError, match="what is understood is two outputs"):
        detector(config(write_means(tmp_path / "means.onnx", 16)), 1)(bright)
    broken = write_detector(tmp_path / "nan.onnx", 16, [(0, 0, 1, 1)], [float("nan")])
    with pytest.raises(LodesetError, match="no finite numbers"):
        detector(config(broken), 1)(bright)
    with pytest.raises(LodesetError, match=r"no model.*check `filter\.faces: path:`"):
        detector_identity(config(tmp_path / "none.onnx"))


# -- the pool


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    without_engine(blur_faces, monkeypatch)
    made = Pool(tmp_path, Store(str(tmp_path / "runs")), {})
    made.ingested()
    write_detector(tmp_path / "faces.onnx", 16, [BOX], [1.0])
    return made


def with_faces(pool: Pool, **knobs: Any) -> CurationConfig:
    """Only the image `red` is bright enough to be a face."""
    return pool.config(faces={"path": str(pool.folder / "faces.onnx"), **PLAIN, "threshold": 0.6, **knobs})


def run(pool: Pool, config: CurationConfig, ingested: Artifact) -> Outcome:
    stage = graph.build(config)["blur_faces/pool"]
    outcome = stage.function(Context(pool.store, stage, "f", {"images": ingested}, 1, lambda _: None))
    assert outcome.rows.balanced()
    return outcome


def read(pool: Pool, outcome: Outcome, table: str) -> list[dict[str, Any]]:
    return pool.store.table(outcome.tables[table]).to_pylist()


def test_a_blurred_image_takes_the_place_of_its_original(pool: Pool) -> None:
    ingested = pool.ingested()
    outcome = run(pool, with_faces(pool), ingested)
    before = {row["image_id"]: row for row in pool.store.table(ingested.tables["images"]).to_pylist()}
    after = {row["image_id"]: row for row in read(pool, outcome, "images")}
    original = id_of(pictures()["red"])
    (new,) = set(after) - set(before)
    assert set(before) - set(after) == {original}
    assert after[new]["derived_from"] == original
    assert all(after[i] == before[i] for i in set(before) & set(after))
    assert read(pool, outcome, "faces") == [{"image_id": new, "derived_from": original, "faces": 1}]
    assert (outcome.rows.taken, outcome.rows.kept, outcome.details["images_blurred"]) == (6, 6, 1)

    places = [Location(**{k: v for k, v in row.items() if k != "set"}) for row in read(pool, outcome, "locations")]
    assert {place.image_id for place in places} == set(after)
    data = {place.image_id: data for place, data in read_images(places)}  # checks every digest
    images = {
        name: np.asarray(Image.open(io.BytesIO(d))) for name, d in (("new", data[new]), ("old", pictures()["red"]))
    }
    assert images["new"].shape == images["old"].shape
    assert images["new"][20:28, 20:44, 1].std() < images["old"][20:28, 20:44, 1].std()
    np.testing.assert_array_equal(images["new"][48:], images["old"][48:])
    urls = {row["url"] for row in read(pool, outcome, "metadata") if row["image_id"] == new}
    assert urls == {"https://img.bad.com/x", "https://good.org/x"}
    assert original not in {row["image_id"] for row in read(pool, outcome, "metadata")}


def test_content_does_not_depend_on_parts_and_follows_the_faces(pool: Pool) -> None:
    found = [run(pool, with_faces(pool), pool.ingested(parts)).content for parts in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"images", "metadata"} and found[0] != pool.ingested().content
    assert run(pool, with_faces(pool, expand=0.5), pool.ingested()).content != found[0]


def test_a_second_run_and_data_that_moved_read_no_image(pool: Pool) -> None:
    first = run(pool, with_faces(pool), pool.ingested())
    assert (first.details["parts_made"], first.details["images_read"]) == (2, 6)
    again = run(pool, with_faces(pool), pool.ingested())
    assert again.details["parts_made"] == 0 and again.tables == first.tables
    after = run(pool, with_faces(pool), pool.ingested(folder="moved"))
    assert after.details["images_read"] == 0 and after.content == first.content
    uris = [row["uri"] for row in read(pool, after, "locations")]
    assert sum("/moved/" in uri for uri in uris) == 5 and sum(uri.endswith("blurred.tar") for uri in uris) == 1


def test_a_store_that_moved_is_listed_again(pool: Pool) -> None:
    ingested = pool.ingested()
    first = run(pool, with_faces(pool), ingested)
    (pool.folder / "runs").rename(pool.folder / "elsewhere")
    moved = Pool(pool.folder, Store(str(pool.folder / "elsewhere")), pool.names)
    stages = [graph.build(with_faces(one))["blur_faces/pool"] for one in (pool, moved)]
    known = {"ingest/pool": ingested}
    assert stages[0].fingerprint(known) != stages[1].fingerprint(known)
    after = run(moved, with_faces(moved), ingested)
    assert after.details["images_read"] == 0 and after.content == first.content
    for table in ("locations", "blurred_locations"):
        uris = {row["uri"] for row in read(moved, after, table) if row["uri"].endswith(".tar")}
        assert len(uris) == 1 and "/elsewhere/" in uris.pop()


@pytest.mark.parametrize("parts", [1, 2])
def test_two_files_of_the_same_pixels_become_one_image(pool: Pool, parts: int) -> None:
    twin = encoded(noisy(250), "BMP")
    outcome = run(pool, with_faces(pool), pool.ingested(parts, more={"twin": twin}))
    assert (outcome.rows.taken, outcome.rows.kept, dict(outcome.rows.dropped)) == (7, 6, {"exact_duplicate": 1})
    ids = [row["image_id"] for row in read(pool, outcome, "images")]
    assert len(ids) == len(set(ids)) == 6
    assert {row["derived_from"] for row in read(pool, outcome, "faces")} == {id_of(twin), id_of(pictures()["red"])}


def test_photographs_stay_jpeg(pool: Pool) -> None:
    photo = encoded(Image.fromarray(np.maximum(pixels(3, 64, 64), 200)), "JPEG")
    outcome = run(pool, with_faces(pool), pool.ingested(more={"photo": photo}))
    formats = {row["derived_from"]: row["format"] for row in read(pool, outcome, "images") if row["derived_from"]}
    assert formats == {id_of(photo): "JPEG", id_of(pictures()["red"]): "PNG"}


def test_everything_that_reads_the_pool_reads_the_blurred_one(pool: Pool) -> None:
    stages = graph.build(with_faces(pool))
    readers = [s.id for s in stages.values() if any(i.stage.id == "ingest/pool" for i in s.inputs.values())]
    assert readers == ["blur_faces/pool"]
    assert "blur_faces/pool" not in graph.build(pool.config())


def test_shards_hold_the_blurred_bytes_and_say_where_they_come_from(pool: Pool) -> None:
    config = with_faces(pool)
    outcome = run(pool, config, pool.ingested())
    rows = [{"image_id": row["image_id"], "set": "all", "mode": "as_is"} for row in read(pool, outcome, "images")]
    chosen = pool.store.commit_part("retrieve", "k", {"selected": pa.Table.from_pylist(rows, schema=records.SELECTED)})
    selected = artifact("retrieve", "all", Outcome({"selected": (chosen.files["selected"],)}, Rows(6, 6)))
    stage = graph.build(config)["write_shards/all"]
    inputs = {"selected": selected, "images:pool": artifact("blur_faces", "pool", outcome)}
    context = Context(pool.store, stage, "f", inputs, 1, lambda _: None)
    nothing = shards_before(pool.store, None, pa.chunked_array([[]], pa.string()))
    (shard,) = write_shards.plan(pool.store, context, config.shards, nothing, write_shards.Said({}, ()))
    part = write_shards.write_shard(pool.store, "shards/x", shard)
    assert part.files["shard"].rows == 6
    (blurred_row,) = (row for row in read(pool, outcome, "images") if row["derived_from"])
    (told,) = (entry.told for entry in shard.entries if entry.place.image_id == blurred_row["image_id"])
    assert f'"derived_from": "{id_of(pictures()["red"])}"' in told
    content = Path(pool.store.path(part.files["shard"].path)).read_bytes()
    assert blurred_row["image_id"].encode() in content and pictures()["red"] not in content
    assert sum(b"derived_from" in entry.told.encode() for entry in shard.entries) == 1


def test_trace_tells_both_images_and_the_report_shows_the_blurred_one(pool: Pool) -> None:
    ingested = pool.ingested()
    outcome = run(pool, with_faces(pool), ingested)
    artifacts = {"ingest/pool": ingested, "blur_faces/pool": artifact("blur_faces", "pool", outcome)}
    (row,) = read(pool, outcome, "faces")
    for image_id, tables in (
        (row["derived_from"], {"images", "locations", "metadata", "faces"}),
        (row["image_id"], {"faces", "blurred_images", "blurred_locations", "metadata"}),
    ):
        steps = trace(pool.store, artifacts, image_id)
        assert {step["table"] for step in steps} == tables
        assert {"stage": "blur_faces/pool", "table": "faces", **row} in steps
    found = pictures_of(pool.store, artifacts, [row["image_id"]], 10**8)[row["image_id"]]
    assert found.uri and (found.width, found.height, found.sets) == (64, 64, ("pool",))
