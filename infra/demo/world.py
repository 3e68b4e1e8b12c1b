"""The sample world: a pool of drawn images with every flaw of a crawl, its companion sets, and the truth about them.

    pool/crawl-0000*.tar  pool/loose/**   the pool: tars (some with captions, labels or URLs next to images), loose files
    curated/alpha.tar  curated/beta.tar   what to look for: rare concepts, in images that are not in the pool
    reference/**                          an evaluation set, half of which has leaked into the pool
    target.parquet                        labeled gallery and test images of every concept, never in the pool
    truth.json                            written last
    .unfinished                           exists until then: a folder that contains it is made again

File names say nothing about the content of an image; captions and labels do.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from lodeset.infra.demo.copies import (
    LEAK_KINDS,
    REJECTS,
    StoredFile,
    broken_files,
    copy_of,
    near_copies,
    saved,
    upright,
)
from lodeset.infra.demo.draw import CONCEPTS, DISTRACTORS, draw
from lodeset.infra.demo.truth import UNFINISHED, NearGroup, Truth
from lodeset.pipeline.engines.failures import unwrapped
from lodeset.pipeline.engines.processes import Died, pool, task
from lodeset.pipeline.errors import LodesetError

FEWEST_IMAGES = 200
FULL_SIZE = 2400  # pool images; in a smaller world the companion sets shrink in proportion
CURATED: Mapping[str, tuple[str, ...]] = {"alpha": ("letters", "leaves"), "beta": ("trees", "fish", "butterflies")}

_MADE = ("pool", "curated", "reference", "target.parquet", "truth.json")
STEPS = 800  # of training
_TINY = 3
_ZIPF_EXPONENT = 1.0
_DISTRACTING = 0.3  # share of the pool's originals with unwanted content
_CURATED_EACH = 30  # images of each concept of a curated set
_DRAWN_AT_ONCE = 16  # images per task
_NAMES = (*CONCEPTS, *DISTRACTORS)  # a label in a `.cls` file is an index into it
_SIDES = (96, 225)  # pixels
_TAR_SHARES = (0.22, 0.16, 0.13, 0.1, 0.08, 0.06)  # of the pool's files; the rest are loose files
_SIDECARS = (("json", "txt"), ("json",), ("txt",), ("cls",), (), ())
_REPEATED_NAME_TAR = 4  # has no sidecars, which a repeated name would make ambiguous
_MANNERS = ("jpeg", "turned", "webp", "png", "rgba", "grey", "palette", "gif")  # turned: JPEG with an EXIF orientation
_MANNER_SHARES = (0.55, 0.05, 0.18, 0.1, 0.04, 0.03, 0.03, 0.02)
# EXIF orientation -> how upright pixels are transformed before they are stored (CIPA DC-008, 4.6.4, tag 274).
_STORED_TURN = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Job:
    """A picture to draw: its concept, and its own seed, so that neither order nor process changes it."""

    seed: tuple[int, int, int]
    concept: str


Drawn = Callable[[int, int], None]  # called with the number of pictures drawn so far and the total


def make_world(
    folder: Path, images: int = FULL_SIZE, seed: int = 0, cpus: int = 1, report: Drawn = lambda done, of: None
) -> Truth:
    """Write a sample world; the same arguments and library versions give the same files on any number of cores.

    Args:
        folder: new, empty, or left by an interrupted call.
        images: number of readable image files in the pool: a sixth are copies, a quarter show unwanted content.
        seed: seed of every random choice.
        cpus: number of processes that draw.
        report: called while pictures are drawn.

    Raises:
        LodesetError: the folder is in use or cannot be written, or `images` is too small for every concept and flaw to
            occur.
    """
    if images < FEWEST_IMAGES:
        raise LodesetError(
            f"a sample world of {images} images cannot contain every flaw: request at least {FEWEST_IMAGES}"
        )
    with _writing(folder):
        _take(folder)
        truth = _make(folder, images, seed, functools.partial(_drawn_by, cpus, report))
        (folder / UNFINISHED).unlink()
    return truth


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LodesetError(
            f"the sample world cannot be written to {folder} ({error.strerror or error}): "
            "choose another folder, or free some space there, and run again"
        ) from error


def _take(folder: Path) -> None:
    """Create the folder and check that it can be written, before anything is drawn."""
    if folder.exists() and not folder.is_dir():
        raise LodesetError(f"{folder} exists and is not an empty folder: choose another for the sample world")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / UNFINISHED).exists():
        for name in _MADE:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif any(folder.iterdir()):
        raise LodesetError(f"{folder} exists and is not an empty folder: choose another for the sample world")
    (folder / UNFINISHED).write_text("`lodeset demo` makes the contents of this folder again\n", encoding="utf-8")


def _make(folder: Path, images: int, seed: int, drawn: Callable[[Sequence[Job]], list[StoredFile]]) -> Truth:
    names, scale = tuple(CONCEPTS), min(1.0, images / FULL_SIZE)
    leaks, near, exact = _at_least(6, 30 * scale), images // 10, images // 20
    each = _at_least(8, _CURATED_EACH * scale)
    splits = {"gallery": _at_least(6, 60 * scale), "test": _at_least(3, 60 * scale)}
    concepts_of = {
        "reference": _evenly(names, 2 * leaks),
        **{name: _evenly(shown, each * len(shown)) for name, shown in CURATED.items()},
        **{split: _evenly(names, count * len(names)) for split, count in splits.items()},
        "pool": _long_tail(images - near - exact - leaks),
    }
    jobs = [
        Job((seed, stream, index), concept)
        for stream, concepts in enumerate(concepts_of.values(), 1)
        for index, concept in enumerate(concepts)
    ]
    files = iter(drawn(jobs))
    files_of = {name: list(itertools.islice(files, len(concepts))) for name, concepts in concepts_of.items()}
    reference, originals = files_of["reference"], files_of["pool"]
    target = [(split, file) for split in splits for file in files_of[split]]

    rng = np.random.default_rng([seed, 0])
    groups = near_copies(originals, near, rng)
    again = [originals[i] for i in rng.choice(len(originals), exact, replace=False)]
    leaked = [(LEAK_KINDS[i % 3], copy_of(file, LEAK_KINDS[i % 3], rng)) for i, file in enumerate(reference[::2])]
    tiny = [
        saved(upright(file.data).resize((8, 8)), "png", file.concept)
        for file in (originals[i] for i in rng.choice(len(originals), _TINY, replace=False))
    ]
    copies_made = [copy for _, copies in groups for _, copy in copies]
    pool = [*originals, *copies_made, *again, *(file for _, file in leaked), *tiny, *broken_files(originals)]

    _write_pool(folder / "pool", [pool[i] for i in rng.permutation(len(pool))])
    _write_loose(folder / "reference", reference)
    (folder / "curated").mkdir()
    for name in CURATED:
        _write_tar(
            folder / "curated" / f"{name}.tar", [(f"{i:04d}", file) for i, file in enumerate(files_of[name])], ()
        )
    _write_target(folder / "target.parquet", target)
    truth = Truth(
        images=images,
        files=len(pool),
        seed=seed,
        concepts={file.image_id: file.concept for file in pool if file.concept is not None},
        near=tuple(
            NearGroup((source.image_id, *(copy.image_id for _, copy in copies)), tuple(kind for kind, _ in copies))
            for source, copies in groups
        ),
        exact_duplicates=exact,
        rejects=REJECTS,
        tiny=tuple(file.image_id for file in tiny),
        repeated_names=1,
        leaked={file.image_id: kind for kind, file in leaked},
        curated=CURATED,
    )
    (folder / "truth.json").write_text(json.dumps(asdict(truth), indent=1) + "\n", encoding="utf-8")
    return truth


def write_config(folder: Path, images: int = FULL_SIZE) -> Path:
    """Write `lodeset.yaml`, a complete run over the sample world of `images` images in `folder`, and return its path.

    Raises:
        LodesetError: the folder cannot be written.
    """
    from lodeset.pipeline.algorithms.hardware import has_bf16  # imported here because it loads torch

    shown = {name: ", ".join(concepts) for name, concepts in CURATED.items()}
    path = folder / "lodeset.yaml"
    text = f"""\
# A whole run over the sample world: curation, training, pruning. Paths are relative to this file.
store: ./runs

pool:                                  # uncurated, with copies and broken files
  - {{uri: "pool/*.tar"}}
  - {{uri: pool/loose/}}

curated:                               # what to look for
  - name: alpha                        # {shown["alpha"]}: the four pool images nearest to each of its images
    uri: curated/alpha.tar
    retrieve: {{mode: sample, k: 4}}
  - name: beta                         # {shown["beta"]}: pool clusters in which four or more of its images fall
    uri: curated/beta.tar
    include: true                      # its own images are trained on too
    retrieve: {{mode: cluster, per_cluster: 100, min_matches: 4, limit: 400}}

reference:                             # must never reach training, nor may any copy of it
  - {{name: reference, uri: reference/}}

targets:                               # kNN on images that the pool never held
  - {{name: target, uri: target.parquet, label: label, split: split, linear_steps: 0}}

filter: {{min_side: 16}}                 # pixels
dedup: {{threshold: auto}}               # calibrated on copies made from this pool
cluster: {{k: {max(4, images // 24)}}}
shards: {{size_mb: 4}}                   # small, so that there are several

training:                              # minutes on two cores; more steps learn more
  recipe: tiny
  steps: {STEPS}
  batch: 16                            # few images, many steps: the run is short
  precision: {"bf16" if has_bf16() else "fp32"}
  log_every: 25
  checkpoint_every: 400
  model: {{dim: 128, depth: 4, heads: 2}}
  heads: {{prototypes: 128}}
  crops:                               # light varies more than in the recipe, hue and scale less
    {{global_size: 48, local_size: 24, global_scale: [0.5, 1.0], local_scale: [0.2, 0.6], brightness: 0.5, contrast: 0.5,
     saturation: 0.3, hue: 0.06, grey: 0.1, solarise: 0, blur: [0, 0, 0]}}
  teacher: {{momentum_start: 0.97, temperature_end: 0.04}}
  optimiser: {{base_lr: 1.0e-2, layer_decay: 1.0, patch_embed_lr: 1.0}}

pruning:                               # without labels; shares of the parameters
  - {{method: entropic, targets: [units, heads], sweep: [1.0e-3, 1.0e-2, 1.0e-1, 1, 10], remove: [0.5, 0.78]}}
"""
    with _writing(folder):
        # A half-written configuration would be taken for the user's own.
        temporary = folder / ".lodeset.yaml"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


def _at_least(fewest: int, count: float) -> int:
    return max(fewest, round(count))


def _evenly(names: Sequence[str], count: int) -> list[str]:
    return [names[i % len(names)] for i in range(count)]


def _long_tail(count: int) -> list[str]:
    """`count` names: unwanted content, and concepts, of which the one of rank r is about 1/r as frequent as the first
    (Zipf); each occurs at least three times.
    """
    names, others = tuple(CONCEPTS), _evenly(tuple(DISTRACTORS), round(_DISTRACTING * count))
    shares = 1 / np.arange(1, len(names) + 1)
    tail = [_at_least(3, (count - len(others)) * share) for share in shares[1:] / shares.sum()]
    counts = [count - len(others) - sum(tail), *tail]
    return [*others, *(name for name, times in zip(names, counts, strict=True) for _ in range(times))]


def _drawn_by(cpus: int, report: Drawn, jobs: Sequence[Job]) -> list[StoredFile]:
    """The pictures of `jobs`, drawn in `cpus` processes, or in this process if that is 1.

    Raises:
        LodesetError: a process died.
    """
    runs = [jobs[start : start + _DRAWN_AT_ONCE] for start in range(0, len(jobs), _DRAWN_AT_ONCE)]
    if cpus == 1:
        alone: list[StoredFile] = []
        for run in runs:
            alone += _draw_some(run)
            report(len(alone), len(jobs))
        return alone
    workers, tasks = pool(cpus), []
    for run in runs:
        tasks.append(task(_draw_apart, run))
        workers.start(tasks[-1])
        report(sum(len(call.result) for call in tasks if isinstance(call.result, list)), len(jobs))
    files: list[StoredFile] = []
    for call in tasks:
        result = workers.wait(call)
        if isinstance(result, Died):
            raise LodesetError(f"a process that drew the sample world died ({result.detail}): run again")
        files += unwrapped(result)
        report(sum(len(call.result) for call in tasks if isinstance(call.result, list)), len(jobs))
    return files


def _draw_apart(jobs: Sequence[Job]) -> list[StoredFile]:
    cv2.setNumThreads(0)  # every core has a process
    return _draw_some(jobs)


def _draw_some(jobs: Sequence[Job]) -> list[StoredFile]:
    return [_drawn(job) for job in jobs]


def _drawn(job: Job) -> StoredFile:
    rng = np.random.default_rng(job.seed)
    width = int(rng.integers(*_SIDES))
    height = int(np.clip(width * 2 ** rng.uniform(-0.5, 0.5), *_SIDES))
    return _encoded(Image.fromarray(draw(job.concept, rng, width, height)), job.concept, rng)


def _encoded(image: Image.Image, concept: str, rng: np.random.Generator) -> StoredFile:
    """The image in one of a crawl's formats and modes."""
    manner = rng.choice(_MANNERS, p=_MANNER_SHARES)
    if manner in ("jpeg", "webp"):
        return saved(image, manner, concept, quality=int(rng.integers(55, 96)))
    if manner == "turned":
        orientation = int(rng.choice(list(_STORED_TURN)))
        exif = Image.Exif()
        exif[0x0112] = orientation
        return saved(image.transpose(_STORED_TURN[orientation]), "jpeg", concept, quality=85, exif=exif)
    if manner == "rgba":
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).rounded_rectangle(
            (0, 0, image.width - 1, image.height - 1), min(image.size) // 5, fill=255
        )
        image.putalpha(mask)
    elif manner == "grey":
        image = image.convert("L")
    elif manner in ("palette", "gif"):
        image = image.quantize(128)
    return saved(image, "gif" if manner == "gif" else "png", concept)


def _write_pool(folder: Path, files: Sequence[StoredFile]) -> None:
    folder.mkdir(parents=True)
    start = 0
    for number, (share, sidecars) in enumerate(zip(_TAR_SHARES, _SIDECARS, strict=True)):
        end = start + round(share * len(files))
        named = [(f"{i:06d}", file) for i, file in enumerate(files[start:end], start)]
        if number == _REPEATED_NAME_TAR:
            first, *_, last = (
                i for i, (_, file) in enumerate(named) if file.concept is not None and file.suffix == "jpg"
            )
            named[last] = (named[first][0], named[last][1])
        _write_tar(folder / f"crawl-{number:05d}.tar", named, sidecars)
        start = end
    _write_loose(folder / "loose", files[start:])


def _write_tar(path: Path, named: Iterable[tuple[str, StoredFile]], sidecars: Sequence[str]) -> None:
    """Write a WebDataset tar: `<key>.<suffix>` and, for readable images, members of the same key that describe it."""
    with tarfile.open(path, "w") as tar:
        for key, file in named:
            members = {file.suffix: file.data}
            if file.concept is not None:
                caption, label = f"A picture of {file.concept}.", _NAMES.index(file.concept)
                described = {
                    "caption": caption,
                    "label": file.concept,
                    "url": f"https://images.example/{key}.{file.suffix}",
                }
                texts = {"json": json.dumps(described), "txt": caption, "cls": str(label)}
                members |= {suffix: texts[suffix].encode() for suffix in sidecars}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _write_loose(folder: Path, files: Iterable[StoredFile]) -> None:
    for i, file in enumerate(files):
        path = folder / f"{i % 16:x}" / f"{i:05d}.{file.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)


def _write_target(path: Path, rows: Sequence[tuple[str, StoredFile]]) -> None:
    columns = {
        "image": pa.array([file.data for _, file in rows], pa.binary()),
        "label": [file.concept for _, file in rows],
        "split": [split for split, _ in rows],
        "name": [f"{i:05d}.{file.suffix}" for i, (_, file) in enumerate(rows)],
    }
    pq.write_table(pa.table(columns), path)
