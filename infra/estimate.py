"""Estimate how long a stage takes and how much it stores, from its last run here or from rough rates."""

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

# The number of images in a file is unknown before it is read. Web images have from 3.5 kB (thumbnails) to
# several hundred kB (photographs); after the first run the set's own mean is used.
GUESSED_SOURCE_BYTES = 50_000


@dataclass(frozen=True)
class Count:
    """Number of input images; `guessed` if it follows from the sizes of files that have not been opened yet."""

    images: int
    guessed: bool = False


@dataclass(frozen=True)
class Estimate:
    """Estimated figures; None if nothing is known yet."""

    images: int | None = None
    images_guessed: bool = False
    seconds: float | None = None
    size_bytes: int | None = None


def estimates(store: Store, decisions: Mapping[str, Decision], cpus: int) -> list[Estimate]:
    """One estimate per decision, in the same order; zero for finished stages."""
    counts: dict[str, Count | None] = {}
    results = []
    for id_, decision in decisions.items():
        counts[id_] = count = _count(store, decision, decisions, counts)
        if decision.artifact is not None:
            results.append(Estimate(decision.artifact.rows.taken, False, 0.0, 0))
            continue
        stage, images = decision.stage, None if count is None else count.images
        history = store.history(stage.name, stage.set)
        results.append(
            Estimate(
                images,
                count is not None and count.guessed,
                _seconds(stage, images, history, cpus),
                _bytes(stage, images, history, counts),
            )
        )
    return results


def _count(
    store: Store, decision: Decision, decisions: Mapping[str, Decision], counts: Mapping[str, Count | None]
) -> Count | None:
    """The images that a finished stage took; otherwise those that its inputs kept or, if unfinished, took; for ingest
    those that are listed.
    """
    stage = decision.stage
    if decision.artifact is not None:
        return Count(decision.artifact.rows.taken)
    if stage.name == "ingest":
        return _listed(store, stage)
    known = []
    # If one of the inputs is a selection, only the selection counts.
    inputs = {role: i for role, i in stage.inputs.items() if role == "selected"} or stage.inputs
    for needed in inputs.values():
        # Fitted and trained artifacts are not sources of images; neither are locations and metadata.
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
        if earlier.rows.taken and listed.size_bytes and listed.limit is None:
            yield listed.size_bytes / earlier.rows.taken


def _seconds(stage: Stage, images: int | None, history: list[Artifact], cpus: int) -> float | None:
    amount = stage.work or images
    for last in history:
        done = last.details.get("work") if stage.work else last.rows.taken
        if done and _made_in_one_run(last):
            return last.seconds / done * (done if amount is None else amount)
    if amount is None or not stage.seconds_per_image:
        return None
    # The stages' rates are for two cores; starting an engine takes a few more seconds.
    return 5.0 + stage.seconds_per_image * amount * 2 / max(1, min(cpus, stage.max_cpus))


def _made_in_one_run(last: Artifact) -> bool:
    """Whether its time covers all of its work: it neither found parts of an earlier run nor continued from a
    checkpoint.
    """
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
        # The bytes of the sources go into the shards unchanged.
        above = [needed.stage for needed in stage.inputs.values()]
        # Blurred images take about as many bytes as the originals.
        above += [needed.stage for source in above if source.name == "blur_faces" for needed in source.inputs.values()]
        read = [source for source in above if source.name == "ingest"]
        if any(source.spec.limits.limit is not None for source in read):
            return None  # the share of the bytes that a sample takes is unknown
        listed = sum(count.images for source in read if (count := counts[source.id]) is not None)
        source_bytes: int = sum(source.spec.size_bytes for source in read)
        return round(images * source_bytes / max(1, listed))
    each = bytes_per_image(stage.name)
    if stage.name == "score":
        each *= len(stage.spec.scorers)  # one row per filter
    return each * images or None
