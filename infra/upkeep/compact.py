"""Compact a store: rewrite its shards without the images that no longer count."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lodeset.pipeline.dag.claims import claim, live
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import HeldError
from lodeset.pipeline.specs import WriteShardsDetails
from lodeset.pipeline.stages import write_shards
from lodeset.pipeline.tables.forgotten import CLAIM


@dataclass(frozen=True)
class Compacted:
    """The current shards, and the bytes of the shards that nothing refers to anymore."""

    folder: str
    shards: int
    images: int
    size_bytes: int
    superseded_bytes: int
    deleted: bool


def compacted(after: Artifact, old: list[File], deleted: bool) -> Compacted:
    details = read_as(WriteShardsDetails, after.details)
    bytes_of_old = sum(file.size_bytes for file in old)
    return Compacted(details.folder, details.shards, after.rows.kept, details.size_bytes, bytes_of_old, deleted)


def superseded(store: Store, after: Artifact, delete: bool) -> list[File]:
    """The shards that earlier artifacts of the same name, limit and sets list, and no other artifact of the store; with
    `delete` they are deleted together with those artifacts.

    Raises:
        HeldError: they are to be deleted while a run is working on the store.
    """
    everything = store.history(after.stage, after.set)
    at = next((n for n, artifact in enumerate(everything) if artifact.fingerprint == after.fingerprint), -1)
    old = [artifact for artifact in everything[at + 1 :] if _alike(store, artifact, after)]
    kept = [artifact for artifact in everything if artifact not in old]
    needed = {file.path for artifact in kept for files in artifact.tables.values() for file in files}
    listed = {file.path: file for artifact in old for files in artifact.tables.values() for file in files}
    gone = [file for path, file in sorted(listed.items()) if path not in needed]
    if delete:
        with claim(store, CLAIM, f"a deletion in {store.url}"):
            others = [name for name in live(store) if name != CLAIM]
            if others:
                raise HeldError(f"a run is working on {store.url} ({', '.join(others)}): delete after it has ended")
            # Delete what lists them first, so that no reader follows a manifest to a missing file.
            for artifact in old:
                store.delete_artifact(artifact)
            _delete(store, {file.path for file in gone})
            sweep(store)
    return gone


def _alike(store: Store, first: Artifact, second: Artifact) -> bool:
    """Whether two artifacts belong to versions of the same configuration: the same name, limit and sets."""

    def identity(artifact: Artifact) -> tuple[object, ...]:
        selected = artifact.inputs["selected"]
        stage, _, set_ = selected["stage"].partition("/")
        made_from = store.artifact(stage, set_, selected["fingerprint"])
        return artifact.config.get("name"), artifact.config.get("limit"), made_from and dict(made_from.config)

    return identity(first) == identity(second)


def _delete(store: Store, paths: set[str]) -> None:
    for stage in (write_shards.STAGE, write_shards.INDEX):
        for key in store.names(f"parts/{stage}"):
            part = store.part(stage, key)
            if part is not None and any(file.path in paths for file in part.files.values()):
                store.delete_part(stage, part)
    for path in paths:
        store.delete(path)


def every_artifact(store: Store) -> Iterator[Artifact]:
    for stage in store.names("artifacts"):
        for set_ in store.names(f"artifacts/{stage}"):
            yield from store.history(stage, set_)


def sweep(store: Store) -> None:
    """Delete files that killed runs left in parts and among shards and that no manifest lists. Nothing may be working
    on the store.
    """
    listed = {file.path for artifact in every_artifact(store) for files in artifact.tables.values() for file in files}
    folders = set()
    for stage in store.names("parts"):
        for key in store.names(f"parts/{stage}"):
            folders.add(f"parts/{stage}/{key}")
            part = store.part(stage, key)
            listed |= {file.path for file in part.files.values()} if part is not None else set()
    folders |= {f"shards/{name}" for name in store.names("shards")}
    for folder in folders:
        for name in store.names(folder):
            leftover = _LEFT.search(name) or (folder.startswith("parts/") and _OF_AN_ATTEMPT.match(name))
            if leftover and f"{folder}/{name}" not in listed:
                store.delete(f"{folder}/{name}")


# Files with the names that a store, or a take-down, gives them; any other file was put there by somebody else.
_LEFT = re.compile(r"\.(parquet|tar|npy|faiss)(\.clean-[0-9a-f]+)?(\.[0-9a-f]{32})?$")
_OF_AN_ATTEMPT = re.compile(r"[0-9a-f]{12}-")
