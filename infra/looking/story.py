"""Tell what happened to one image, in a sentence and in detail."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from lodeset.infra.looking.lookup import SHORTEST, Meant, meant, one_of, takedown_of
from lodeset.infra.looking.trace import IMAGES, LOCATIONS, trace
from lodeset.infra.report.pictures import short_name
from lodeset.pipeline.by_hand import BY_HAND
from lodeset.pipeline.dag.runs import artifacts_of, newest_first
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.forgotten import forgotten

# Number of runs before the shown one in which an image is searched or followed.
RUNS_BACK = 50

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Traced:
    """`image_id` is None for a file that ingest rejected; `steps` are rows of tables, in the order of the DAG."""

    image_id: str | None
    sentence: str
    steps: tuple[Row, ...]


def traced(
    store: Store, artifacts: Mapping[str, Artifact], asked: str, folders: Sequence[Path], name: str, before: int | None
) -> Traced:
    """The story of the image, or rejected file, that `asked` stands for (see `infra.looking.lookup`).

    Args:
        name, before: if the shown run does not contain it, the runs of this name up to this number are searched.

    Raises:
        ConfigError: `asked` stands for several images.
        LodesetError: the store contains nothing by this name.
    """
    matches = meant(store, artifacts, asked, folders)
    since = ""
    if not (matches.ids or matches.rejects):
        matches, artifacts, since = _earlier(store, asked, folders, name, before)
    gone = [image_id for image_id in matches.ids if image_id in forgotten(store)]
    if matches.ids and matches.rejects and not gone:
        raise ConfigError(
            f"{shown(asked)} stands for {len(matches.ids):,} images and {len(matches.rejects):,} rejected files: give "
            f"an image_id ({matches.ids[0]}, ...) or the whole path"
        )
    if matches.ids:
        image_id = one_of(matches.ids, asked)
        if image_id in gone:
            return Traced(image_id, _forgotten(store, image_id), matches.rejects)
        steps = trace(store, artifacts, image_id)
        return Traced(
            image_id, since + _sentence(store, artifacts, image_id, steps) + _now(matches, image_id), tuple(steps)
        )
    if matches.rejects:
        return Traced(None, since + _rejected(matches.rejects), matches.rejects)
    read = f" (an image with the id {matches.read})" if matches.read else ""
    raise LodesetError(
        f"no run of this store knows an image {shown(asked)}{read}: give an image_id, at least {SHORTEST} of its "
        "first digits, a path, a URL or a picture file. `lodeset table CONFIG locations` lists the locations of all "
        "images, and `... rejects` the rejected files"
    )


def _earlier(
    store: Store, asked: str, folders: Sequence[Path], name: str, before: int | None
) -> tuple[Meant, Mapping[str, Artifact], str]:
    """The matches of an earlier run."""
    for tried, run in enumerate(newest_first(store, name)):
        if tried == RUNS_BACK:
            break
        if before is not None and run.number >= before:
            continue
        artifacts = artifacts_of(store, run)
        matches = meant(store, artifacts, asked, folders)
        if matches.ids or matches.rejects:
            return matches, artifacts, f"no longer in the sources; according to run {run.number} of {_day(run.ended)}: "
    return meant(store, {}, asked, folders), {}, ""


def _forgotten(store: Store, image_id: str) -> str:
    takedown = takedown_of(store, image_id)
    why = " (requested by its URL)" if takedown.get("asked_sha256") else ""
    day = str(takedown.get("when", "an unknown day"))[:10]
    return f"forgotten on {day}{why}: taken out of every table, shard and page, and never taken in again"


def _rejected(rows: Sequence[Row]) -> str:
    first = rows[0]
    if first["reason"] == "forgotten":
        return "forgotten (`lodeset forget`): taken out of every table, shard and page, and never taken in again"
    detail = f": {shown(first['detail'])}" if first["detail"] else ""
    more = f"; {len(rows) - 1} more rejects of that name" if len(rows) > 1 else ""
    return f"rejected by {first['stage']} as {first['reason']}{detail}{more}"


def _now(matches: Meant, image_id: str) -> str:
    if matches.read is None or matches.read == image_id:
        return ""
    return f". The file has other bytes now (image_id {matches.read})"


def _sentence(store: Store, artifacts: Mapping[str, Artifact], image_id: str, steps: Sequence[Row]) -> str:
    """The sentence, which starts with the last thing that happened to the image."""

    def of(table: str, stage: str = "") -> list[Row]:
        return [row for row in steps if row["table"] == table and row["stage"].startswith(stage)]

    judged = next((row for row in of("duplicates", "dedup") if row["image_id"] == image_id), None)
    dropped = next(iter(of("filtered")), None)
    buried = next(iter(of("tombstones")), None)
    thinned = next((row for row in of("semantic") if row["image_id"] == image_id), None)
    if thinned is not None:
        return (
            f"dropped as a semantic duplicate of {thinned['matched_id']} in cluster {thinned['cluster']} "
            f"(cosine {thinned['similarity']:.3f})"
        )
    if judged is not None and not judged["kept"]:
        copied = _copy(store, artifacts, judged, of("edges"), of("leaks"))
        return copied + (
            f"; {buried['shard']} still holds its bytes, but the index no longer lists it" if buried else ""
        )
    if dropped is not None and dropped["reason"] == BY_HAND:
        return f"dropped by hand{_lists(of('by_hand'))}"
    if dropped is not None:
        limit = (
            f" ({dropped['score']:.4g}, where the limit is {dropped['threshold']:.4g})"
            if "score" in dropped and "threshold" in dropped
            else ""
        )
        return f"dropped by the filter {dropped['reason']}{limit}"
    listed = next((row for row in of("index") if row["image_id"] == image_id), None)
    chosen = [row for row in of("selected") if row["image_id"] == image_id]
    since = _kept_since(store, artifacts, image_id) if judged is not None else ""
    if judged is not None and judged["reason"] == BY_HAND:
        since = f"; kept by hand{_lists(of('by_hand'))}{since}"
    if listed is not None:
        why = ", ".join(dict.fromkeys(f"{row['set']} ({row['mode']})" for row in chosen))
        return f"in {listed['shard']}" + (f", selected for {why}" if why else "") + since
    if chosen:
        return f"selected for {', '.join(row['set'] for row in chosen)}; its shard is not written yet" + since
    if judged is not None:
        done = "retrieve/all" in artifacts
        return (
            "kept by dedup, and selected by no curated set" if done else "kept by dedup; the selection is not made yet"
        ) + since
    sets = list(
        dict.fromkeys(
            row["set"] for row in steps if row["table"] in IMAGES and row.get("image_id") == image_id and "set" in row
        )
    )
    derived = next((row for row in of("faces") if row.get("derived_from") == image_id), None)
    if derived is not None:
        return f"its faces were blurred, which made the image {derived['image_id']}"
    if "pool" not in sets:
        return f"an image of {', '.join(f'`{name}`' for name in sets)}, not of the pool"
    if "embed/pool" in artifacts and not of("vectors", "embed/pool"):
        return "dropped by embed/pool: it has no vector"
    return "in the pool, but not yet judged by dedup"


def _lists(named: Sequence[Row]) -> str:
    """Which lists by hand name an image."""
    names = ", ".join(row["list"] for row in named)
    return f" (list{'s' if len(named) > 1 else ''} {names})" if names else ""


def _copy(
    store: Store, artifacts: Mapping[str, Artifact], judged: Row, edges: Sequence[Row], leaks: Sequence[Row]
) -> str:
    matched = judged.get("matched_id")
    score = ""
    for edge in edges:
        if matched in (edge["image_id_a"], edge["image_id_b"]):
            score = (
                f", score {edge['score']:.1f}"
                if "score" in edge
                else f", similarity {edge['similarity']:.3f}"
                if "similarity" in edge
                else ""
            )
    if not score and "similarity" in judged:
        score = f", similarity {judged['similarity']:.3f}"
    file = _file_of(store, artifacts, matched) if matched else "an image that was forgotten"
    sets = ", ".join(dict.fromkeys(f"`{row['set']}`" for row in leaks if row.get("image_id") == matched))
    if judged["reason"] == "reference":
        return f"dropped as a copy of {file} in the reference set {sets}{score}"
    if judged["reason"] == "included":
        return f"dropped as a copy of {file} in the included set {sets}{score}"
    since = _kept_since(store, artifacts, matched) if matched else ""
    return f"dropped as a copy of {file}{score}{since.replace('; kept', '; that image has been kept', 1)}"


def _file_of(store: Store, artifacts: Mapping[str, Artifact], image_id: str) -> str:
    for artifact in artifacts.values():
        for name in LOCATIONS:
            for file in artifact.tables.get(name, ()):
                table = store.table([file], ["image_id", "uri", "member"])
                for row in table.filter(pc.equal(table["image_id"], image_id)).slice(0, 1).to_pylist():
                    return f"{shown(short_name(row['uri'], row['member']))} ({image_id[:12]})"
    return image_id


def _kept_since(store: Store, artifacts: Mapping[str, Artifact], image_id: str) -> str:
    """When dedup first kept the image in the uninterrupted sequence of runs up to now."""
    shown_one = artifacts.get("dedup/pool")
    if shown_one is None:
        return ""
    history = store.history("dedup", "pool")
    at = next((n for n, artifact in enumerate(history) if artifact.fingerprint == shown_one.fingerprint), len(history))
    same = [artifact for artifact in history[at:] if artifact.config.get("name") == shown_one.config.get("name")]
    first = None
    for artifact in same[:RUNS_BACK]:
        table = store.table(artifact.tables["duplicates"], ["image_id", "kept"])
        row = pc.index(table["image_id"], image_id).as_py()
        if row < 0 or not table["kept"][row].as_py():
            break
        first = artifact
    return f"; kept since {_day(first.created)}" if first is not None else ""


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
