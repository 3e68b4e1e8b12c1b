"""How long a stage will take and how much it will store, from the last time it ran here or from rough rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lodeset.pipeline.dag.decisions import Decision
from lodeset.pipeline.dag.stage import Stage, read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.sources.containers import LOOSE
from lodeset.pipeline.sources.listing import image_bytes
from lodeset.pipeline.specs import METADATA, Listed
from lodeset.pipeline.tables.records import bytes_per_image

# How many images a file holds is not known before it is read. Web images have from 3.5 kB (thumbnails, as
# measured above) to some hundred (photographs); after the first run the set's own mean is used.
GUESSED_SOURCE_BYTES = 50_000


@dataclass(frozen=True)
class Count:
    """Images that come in; `guessed` where they follow from the bytes of files that nobody has opened yet."""

    images: int
    guessed: bool = False


@dataclass(frozen=True)
class Estimate:
    """None where nothing is known yet."""

    images: int | None = None
    images_guessed: bool = False
    seconds: float | None = None
    size_bytes: int | None = None


def estimates(store: Store, decisions: Mapping[str, Decision], cpus: int) -> list[Estimate]:
    """One a decision, in their order; zero for what is finished."""
    counts: dict[str, Count | None] = {}
    found = []
    for id_, decision in decisions.items():
        counts[id_] = count = _count(store, decision, decisions, counts)
        if decision.artifact is not None:
            found.append(Estimate(decision.artifact.rows.taken, False, 0.0, 0))
            continue
        stage, images = decision.stage, None if count is None else count.images
        history = store.history(stage.name, stage.set)
        found.append(
            Estimate(
                images,
                count is not None and count.guessed,
                _seconds(stage, images, history, cpus),
                _bytes(stage, images, history, counts),
            )
        )
    return found


def _count(
    store: Store, decision: Decision, decisions: Mapping[str, Decision], counts: Mapping[str, Count | None]
) -> Count | None:
    """Of a finished stage what it took; otherwise what its inputs kept or, unfinished, took; for ingest what is listed."""
    stage = decision.stage
    if decision.artifact is not None:
        return Count(decision.artifact.rows.taken)
    if stage.name == "ingest":
        return _listed(store, stage)
    known = []
    # Where a selection comes in, what else does is asked about it.
    inputs = {role: i for role, i in stage.inputs.items() if role == "selected"} or stage.inputs
    for needed in inputs.values():
        # What was fitted, or trained, on images is no further source of them; nor is where images lie and what is said of them.
        if needed.stage.frozen or needed.stage.work or needed.of == METADATA:
            continue
        artifact, waiting = decisions[needed.stage.id].artifact, counts[needed.stage.id]
        if artifact is not None:
            known.append(Count(artifact.rows.kept))
        elif waiting is not None:
            most = waiting.images if needed.stage.most is None else needed.stage.most
            known.append(Count(min(waiting.images, most), waiting.guessed))
    return max(known, key=lambda count: count.images, default=None)


def _listed(store: Store, stage: Stage) -> Count:
    files = stage.runtime.files
    loose = sum(file.kind == LOOSE for file in files)
    if loose == len(files):
        count = Count(loose)
    else:
        packed = [file for file in files if file.kind != LOOSE]
        each = next(_bytes_an_image(store, stage), None)
        if each is None:
            inside = image_bytes(packed) / GUESSED_SOURCE_BYTES
        else:
            inside = sum(file.size_bytes for file in packed) / each
        count = Count(loose + max(1, round(inside)), guessed=True)
    limit = stage.spec.limits.limit
    return Count(count.images if limit is None else min(count.images, limit), count.guessed)


def _bytes_an_image(store: Store, stage: Stage) -> Iterator[float]:
    """Of the earlier runs of ingest that read everything, the newest first."""
    for earlier in store.history(stage.name, stage.set):
        listed = read_as(Listed, earlier.config)
        if earlier.rows.taken and listed.limit is None:
            yield listed.size_bytes / earlier.rows.taken


def _seconds(stage: Stage, images: int | None, history: list[Artifact], cpus: int) -> float | None:
    amount = stage.work or images
    for last in history:
        done = last.details.get("work") if stage.work else last.rows.taken
        if done and _made_in_one_run(last):
            return last.seconds / done * (done if amount is None else amount)
    if amount is None or not stage.seconds_per_image:
        return None
    # The rates of the stages are those of two cores; starting an engine takes a few seconds more.
    return 5.0 + stage.seconds_per_image * amount * 2 / max(1, min(cpus, stage.max_cpus))


def _made_in_one_run(last: Artifact) -> bool:
    """Whether its time is that of all its work: it neither found parts of an earlier run nor went on from a checkpoint."""
    details = last.details
    return details.get("parts") == details.get("parts_made") and not details.get("resumed_step")


def _bytes(
    stage: Stage,
    images: int | None,
    history: list[Artifact],
    counts: Mapping[str, Count | None],
) -> int | None:
    if stage.size_bytes is not None:
        return stage.size_bytes
    if history and history[0].rows.taken:
        last = history[0]
        stored = sum(f.size_bytes for files in last.tables.values() for f in files)
        return round(stored * (images / last.rows.taken if images is not None else 1))
    if images is None:
        return None
    if stage.name == "write_shards":
        # The bytes of the sources go into the shards as they are.
        above = [needed.stage for needed in stage.inputs.values()]
        # Blurred images take about the bytes of what they were.
        above += [needed.stage for one in above if one.name == "blur_faces" for needed in one.inputs.values()]
        read = [one for one in above if one.name == "ingest"]
        if any(one.spec.limits.limit is not None for one in read):
            return None  # how much of the bytes a sample takes is not known
        listed = sum(count.images for one in read if (count := counts[one.id]) is not None)
        source_bytes: int = sum(one.spec.size_bytes for one in read)
        return round(images * source_bytes / max(1, listed))
    each = bytes_per_image(stage.name)
    if stage.name == "score":
        each *= len(stage.spec.scorers)  # a row for each filter
    return each * images or None
