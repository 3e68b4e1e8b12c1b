"""The sample world says the truth about itself: everything is counted again here, from the bytes on disk."""

import errno
import functools
import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lodeset.infra.demo import world as making
from lodeset.infra.demo.copies import LEAK_KINDS, NEAR_KINDS
from lodeset.infra.demo.draw import CONCEPTS, DISTRACTORS, draw
from lodeset.infra.demo.truth import Truth, load_truth
from lodeset.infra.demo.world import CURATED, make_world, write_config
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.config import PruneJob
from lodeset.training.config import TrainingConfig

IMAGES = 200


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """In this process every picture is drawn once for all tests: most of them ask for the same world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "_drawn", functools.cache(making._drawn))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "new"
    make_world(folder, images=IMAGES, seed=3)
    return folder


@pytest.fixture(scope="module")
def truth(world: Path) -> Truth:
    return load_truth(world)


@pytest.fixture(scope="module")
def pool(world: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of every file of the pool, sidecars left out."""
    files = [(str(path), path.read_bytes()) for path in sorted((world / "pool/loose").rglob("*.*"))]
    for path in sorted((world / "pool").glob("*.tar")):
        files += [(f"{path.name}/{name}", data) for name, data in _members(path) if not _is_sidecar(name)]
    return files


def test_every_pool_file_is_accounted_for(pool: list[tuple[str, bytes]], truth: Truth) -> None:
    readable = [data for _, data in pool if _pixels(data) is not None]
    ids = Counter(_image_id(data) for data in readable)
    assert len(pool) == truth.files == IMAGES + len(truth.tiny) + sum(truth.rejects.values())
    assert len(readable) == IMAGES + len(truth.tiny)
    assert set(ids) == set(truth.concepts)
    assert sum(ids.values()) - len(ids) == truth.exact_duplicates > 0


def test_broken_files_are_of_the_kinds_told(pool: list[tuple[str, bytes]], truth: Truth) -> None:
    found: Counter[str] = Counter()
    for name, data in pool:
        if _pixels(data) is None:
            bomb = data[:4] == b"\x89PNG" and int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]) >= 50_000**2
            jpeg = data[:2] == b"\xff\xd8"
            assert bomb or name.endswith(".jpg")
            found["bomb" if bomb else "truncated" if jpeg else "text" if data else "empty"] += 1
            assert not bomb or len(data) < 200
    assert found == truth.rejects


def test_tiny_images_are_the_only_ones_below_16_pixels(pool: list[tuple[str, bytes]], truth: Truth) -> None:
    sizes = {_image_id(data): image.size for _, data in pool if (image := _pixels(data)) is not None}
    assert {image_id for image_id, size in sizes.items() if min(size) < 16} == set(truth.tiny)
    ordinary = [size for image_id, size in sizes.items() if image_id not in truth.tiny]
    assert len(set(ordinary)) > 100


def test_near_duplicates_are_alike_and_no_others_are(pool: list[tuple[str, bytes]], truth: Truth) -> None:
    images = {_image_id(data): image for _, data in pool if (image := _pixels(data)) is not None}
    grouped = {image_id: number for number, group in enumerate(truth.near) for image_id in group.ids}
    assert len(grouped) == sum(len(group.ids) for group in truth.near), "an image is in two groups"
    for group in truth.near:
        source, *copies = (images[image_id] for image_id in group.ids)
        for kind, copy in zip(group.kinds, copies, strict=True):
            if kind == "crop":
                assert all(0.85 * s <= c < s for s, c in zip(source.size, copy.size, strict=True))
                found = cv2.matchTemplate(np.asarray(source), np.asarray(copy), cv2.TM_CCOEFF_NORMED)
                assert found.max() > 0.9
            else:
                assert _likeness(ImageOps.mirror(source) if kind == "flip" else source, copy) > 0.8, kind
    assert {kind for group in truth.near for kind in group.kinds} == set(NEAR_KINDS)

    ids = [image_id for image_id in images if image_id not in truth.tiny]
    hashes = np.stack([imagehash.phash(images[image_id]).hash.ravel() for image_id in ids])
    for a, b in np.argwhere(np.triu((hashes[:, None] != hashes[None]).sum(axis=2) <= 4, 1)):
        together = grouped.get(ids[a], -1) == grouped.get(ids[b], -2)
        assert together or _likeness(images[ids[a]], images[ids[b]]) < 0.95, "copies that nobody planted"


def test_leaked_images_are_copies_of_reference_images(world: Path, pool: list[tuple[str, bytes]], truth: Truth) -> None:
    data_by_id = {_image_id(data): data for _, data in pool}
    reference = [path.read_bytes() for path in (world / "reference").rglob("*.*")]
    for image_id, kind in truth.leaked.items():
        likeness = max(_likeness(_readable(data_by_id[image_id]), _readable(data)) for data in reference)
        assert likeness > 0.95
        assert (data_by_id[image_id] in reference) == (kind == "exact")
    assert set(truth.leaked.values()) == set(LEAK_KINDS)
    assert len(reference) == 2 * len(truth.leaked)


def test_curated_and_target_images_are_not_in_the_pool(world: Path, truth: Truth) -> None:
    assert truth.curated == CURATED
    counts = Counter(shown for shown in truth.concepts.values() if shown in CONCEPTS)
    rare = {concept for concept, _ in counts.most_common()[4:]}
    for name, shown in truth.curated.items():
        assert set(shown) <= rare
        for _, data in _members(world / "curated" / f"{name}.tar"):
            assert _pixels(data) is not None
            assert _image_id(data) not in truth.concepts
    rows = pq.read_table(world / "target.parquet").to_pylist()
    per_class = Counter((row["label"], row["split"]) for row in rows)
    assert set(per_class) == {(label, split) for label in CONCEPTS for split in ("gallery", "test")}
    assert len(set(per_class.values())) == 2, "gallery and test are each balanced"
    assert len({row["name"] for row in rows}) == len(rows)
    assert not {_image_id(row["image"]) for row in rows} & set(truth.concepts)


def test_classes_have_a_long_tail(truth: Truth) -> None:
    shown = Counter(truth.concepts.values())
    assert set(shown) == {*CONCEPTS, *DISTRACTORS}
    counts = sorted((shown[concept] for concept in CONCEPTS), reverse=True)
    assert counts[0] > 5 * counts[-1] > 0
    assert 0.2 < sum(shown[kind] for kind in DISTRACTORS) / sum(shown.values()) < 0.4


def test_formats_and_modes_vary(pool: list[tuple[str, bytes]]) -> None:
    opened = [Image.open(io.BytesIO(data)) for _, data in pool if _pixels(data) is not None]
    assert {image.format for image in opened} == {"JPEG", "PNG", "WEBP", "GIF"}
    assert {image.mode for image in opened} >= {"RGB", "RGBA", "L", "P"}
    assert len({image.getexif().get(0x0112) for image in opened} & {3, 6, 8}) >= 2


def test_tars_repeat_one_name_and_describe_some_images(world: Path, truth: Truth) -> None:
    tars = [_members(path) for path in sorted((world / "pool").glob("*.tar"))]
    names = [Counter(name for name, _ in members) for members in tars]
    assert len(tars) >= 6
    assert sum(count - 1 for counted in names for count in counted.values()) == truth.repeated_names
    assert {name.rpartition(".")[2] for counted in names for name in counted if _is_sidecar(name)} == {
        "json",
        "txt",
        "cls",
    }
    for members in tars:
        images = {name.partition(".")[0]: _image_id(data) for name, data in members if not _is_sidecar(name)}
        for name, data in members:
            concept = truth.concepts[images[name.partition(".")[0]]] if _is_sidecar(name) else ""
            shown = str([*CONCEPTS, *DISTRACTORS].index(concept)) if name.endswith(".cls") else concept
            assert not concept or shown in data.decode()


def test_an_image_depends_on_its_generator_alone() -> None:
    for concept in (*CONCEPTS, *DISTRACTORS):
        first, again, other = (draw(concept, np.random.default_rng(seed), 90, 70) for seed in (1, 1, 2))
        assert first.shape == (70, 90, 3)
        assert np.array_equal(first, again)
        assert np.abs(first.astype(int) - other).mean() > 5


def test_the_same_seed_gives_the_same_files_however_many_processes_draw(world: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make_world(tmp_path, images=IMAGES, seed=3, cpus=2, report=lambda done, of: told.append((done, of)))
    assert told == sorted(told) and told[-1][0] == told[-1][1] > IMAGES / 2, "a bar that rises to its end"
    names = sorted(str(path.relative_to(world)) for path in world.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert all((world / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_the_configuration_is_valid_and_its_sets_exist(world: Path, tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_bytes((world / "truth.json").read_bytes())
    path = write_config(tmp_path)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    TrainingConfig.model_validate(tree.pop("training"))
    (job,) = tree.pop("pruning")
    assert PruneJob.model_validate(job).points == (0.5, 0.78)
    config = CurationConfig.model_validate(tree)
    assert {curated.name for curated in config.curated} == set(CURATED)
    for source in (*config.pool, *config.curated, *config.reference, *config.targets):
        assert list(world.glob(source.uri)), source.uri


def test_mistakes_are_explained(world: Path, tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match="not an empty folder: choose another"):
        make_world(world)
    with pytest.raises(LodesetError, match=r"50 images .* request at least 200"):
        make_world(tmp_path, images=50)
    with pytest.raises(LodesetError, match="no finished sample world"):
        load_truth(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(LodesetError, match="not an empty folder: choose another"):
        make_world(tmp_path / "file")


def test_an_interrupted_world_is_made_anew(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making, "_write_target", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_world(tmp_path, images=IMAGES, seed=3)
    assert (tmp_path / "pool").is_dir()
    with pytest.raises(LodesetError, match="no finished sample world"):
        load_truth(tmp_path)
    assert make_world(tmp_path, images=IMAGES, seed=3) == load_truth(tmp_path) == load_truth(world)


@pytest.mark.parametrize("written", ["_write_pool", "_write_loose", "_write_tar", "_write_target"])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(making, written, full)
    with pytest.raises(LodesetError, match=r"cannot be written to .*No space left.*free some space"):
        make_world(tmp_path, images=IMAGES, seed=3)


def test_a_folder_that_cannot_be_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("drawn in vain")

    monkeypatch.setattr(making, "_draw_some", never)
    (tmp_path / "file").touch()
    with pytest.raises(LodesetError, match=r"cannot be written to .*choose another folder"):
        make_world(tmp_path / "file" / "demo")
    (tmp_path / ".lodeset.yaml").mkdir()
    with pytest.raises(LodesetError, match=r"cannot be written to .*choose another folder"):
        write_config(tmp_path)


def _members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, file.read()) for member in tar if (file := tar.extractfile(member)) is not None]


def _is_sidecar(name: str) -> bool:
    return name.endswith((".json", ".txt", ".cls"))


def _image_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _pixels(data: bytes) -> Image.Image | None:
    """Upright RGB over white, or None where Pillow refuses."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _readable(data: bytes) -> Image.Image:
    image = _pixels(data)
    assert image is not None
    return image


def _likeness(a: Image.Image, b: Image.Image) -> float:
    """Correlation of grey 32 x 32 thumbnails."""
    first, second = (_thumbnail(image) for image in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _thumbnail(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64).ravel()
