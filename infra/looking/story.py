"""What became of one image, in a sentence and in detail."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from lodeset.infra.looking.lookup import SHORTEST, Meant, meant, one_of, told_of
from lodeset.infra.looking.trace import IMAGES, LOCATIONS, trace
from lodeset.infra.report.pictures import short_name
from lodeset.pipeline.dag.runs import artifacts_of, newest_first
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.forgotten import forgotten

# Runs before the one that is shown in which an image is looked for, or looked after.
RUNS_BACK = 50

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Traced:
    """`image_id` is None for a file that ingest refused; `steps` are rows of tables, in the order of the DAG."""

    image_id: str | None
    sentence: str
    steps: tuple[Row, ...]


def traced(
    store: Store, artifacts: Mapping[str, Artifact], asked: str, folders: Sequence[Path], name: str, before: int | None
) -> Traced:
    """The story of the image, or refused file, that `asked` stands for (see `infra.lookup`).

    Args:
        name, before: where the run that is shown does not hold it, the runs of this name up to this number are looked through.

    Raises:
        ConfigError: several images are meant.
        LodesetError: the store knows nothing by this name.
    """
    found = meant(store, artifacts, asked, folders)
    since = ""
    if not (found.ids or found.rejects):
        found, artifacts, since = _earlier(store, asked, folders, name, before)
    gone = [one for one in found.ids if one in forgotten(store)]
    if found.ids and found.rejects and not gone:
        raise ConfigError(
            f"{shown(asked)} stands for {len(found.ids):,} images and {len(found.rejects):,} files that were refused: give an "
            f"image_id ({found.ids[0]}, ...) or the whole path"
        )
    if found.ids:
        image_id = one_of(found.ids, asked)
        if image_id in gone:
            return Traced(image_id, _forgotten(store, image_id), found.rejects)
        steps = trace(store, artifacts, image_id)
        return Traced(
            image_id, since + _sentence(store, artifacts, image_id, steps) + _now(found, image_id), tuple(steps)
        )
    if found.rejects:
        return Traced(None, since + _rejected(found.rejects), found.rejects)
    read = f" (an image with the id {found.read})" if found.read else ""
    raise LodesetError(
        f"no run of this store knows an image {shown(asked)}{read}: give an image_id, at least {SHORTEST} of its first digits, a path, "
        "a URL or a picture file. `lodeset table CONFIG locations` lists where every image lies, and `... rejects` what was refused"
    )


def _earlier(
    store: Store, asked: str, folders: Sequence[Path], name: str, before: int | None
) -> tuple[Meant, Mapping[str, Artifact], str]:
    """What an earlier run knows by this name."""
    for tried, run in enumerate(newest_first(store, name)):
        if tried == RUNS_BACK:
            break
        if before is not None and run.number >= before:
            continue
        artifacts = artifacts_of(store, run)
        found = meant(store, artifacts, asked, folders)
        if found.ids or found.rejects:
            return found, artifacts, f"no longer in the sources; as run {run.number} of {_day(run.ended)} had it: "
    return meant(store, {}, asked, folders), {}, ""


def _forgotten(store: Store, image_id: str) -> str:
    told = told_of(store, image_id)
    why = " (asked for by its URL)" if told.get("asked_sha256") else ""
    return f"forgotten on {str(told.get('when', 'an unknown day'))[:10]}{why}: taken out of every table, cache and shard, and never taken in again"


def _rejected(rows: Sequence[Row]) -> str:
    first = rows[0]
    if first["reason"] == "forgotten":
        return "forgotten (`lodeset forget`): taken out of every table, cache and shard, and never taken in again"
    detail = f": {shown(first['detail'])}" if first["detail"] else ""
    more = f"; {len(rows) - 1} more rejects of that name" if len(rows) > 1 else ""
    return f"rejected by {first['stage']} as {first['reason']}{detail}{more}"


def _now(found: Meant, image_id: str) -> str:
    if found.read is None or found.read == image_id:
        return ""
    return f". The file has other bytes now (image_id {found.read})"


def _sentence(store: Store, artifacts: Mapping[str, Artifact], image_id: str, steps: Sequence[Row]) -> str:
    """From the last thing that happened to it backwards."""

    def of(table: str, stage: str = "") -> list[Row]:
        return [row for row in steps if row["table"] == table and row["stage"].startswith(stage)]

    judged = next((row for row in of("duplicates") if row["image_id"] == image_id), None)
    dropped = next(iter(of("filtered")), None)
    buried = next(iter(of("tombstones")), None)
    if judged is not None and not judged["kept"]:
        told = _copy(store, artifacts, judged, of("edges"), of("leaks"))
        return told + (f"; {buried['shard']} still holds its bytes, but the index no longer lists it" if buried else "")
    if dropped is not None:
        limit = (
            f" ({dropped['score']:.4g}, and the limit is {dropped['threshold']:.4g})"
            if "score" in dropped and "threshold" in dropped
            else ""
        )
        return f"dropped by the filter {dropped['reason']}{limit}"
    listed = next((row for row in of("index") if row["image_id"] == image_id), None)
    chosen = [row for row in of("selected") if row["image_id"] == image_id]
    since = _kept_since(store, artifacts, image_id) if judged is not None else ""
    if listed is not None:
        why = ", ".join(dict.fromkeys(f"{row['set']} ({row['mode']})" for row in chosen))
        return f"in {listed['shard']}" + (f", selected for {why}" if why else "") + since
    if chosen:
        return f"selected for {', '.join(row['set'] for row in chosen)}; its shard is not written yet" + since
    if judged is not None:
        done = "retrieve/all" in artifacts
        return (
            "kept by dedup, and wanted by no curated set" if done else "kept by dedup; the selection is not made yet"
        ) + since
    sets = list(
        dict.fromkeys(
            row["set"] for row in steps if row["table"] in IMAGES and row.get("image_id") == image_id and "set" in row
        )
    )
    derived = next((row for row in of("faces") if row.get("derived_from") == image_id), None)
    if derived is not None:
        return f"its faces were blurred: what came of it is {derived['image_id']}"
    if "pool" not in sets:
        return f"an image of {', '.join(f'`{one}`' for one in sets)}, no image of the pool"
    if "embed/pool" in artifacts and not of("vectors", "embed/pool"):
        return "dropped by embed/pool: it has no vector"
    return "in the pool, and not judged by dedup yet"


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
        return f"dropped as a copy of {file}, which the reference set {sets} holds{score}"
    if judged["reason"] == "included":
        return f"dropped as a copy of {file}, which the included set {sets} brings itself{score}"
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
    """When dedup kept an image first of the runs without a break up to now."""
    shown_one = artifacts.get("dedup/pool")
    if shown_one is None:
        return ""
    history = store.history("dedup", "pool")
    at = next((n for n, one in enumerate(history) if one.fingerprint == shown_one.fingerprint), len(history))
    same = [one for one in history[at:] if one.config.get("name") == shown_one.config.get("name")]
    first = None
    for one in same[:RUNS_BACK]:
        table = store.table(one.tables["duplicates"], ["image_id", "kept"])
        row = pc.index(table["image_id"], image_id).as_py()
        if row < 0 or not table["kept"][row].as_py():
            break
        first = one
    return f"; kept since {_day(first.created)}" if first is not None else ""


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
