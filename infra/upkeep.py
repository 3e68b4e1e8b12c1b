"""What a store that runs for years needs: shards written anew without what they no longer stand for."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.dag.stage import PREVIOUS
from pipeline.dag.store import Artifact, File, Store


@dataclass(frozen=True)
class Compacted:
    """The shards as they are now, and the bytes of those that nothing refers to any more."""

    folder: str
    shards: int
    images: int
    size_bytes: int
    superseded_bytes: int
    deleted: bool


def compacted(after: Artifact, old: list[File], deleted: bool) -> Compacted:
    details = after.details
    bytes_of_old = sum(file.size_bytes for file in old)
    return Compacted(
        details["folder"], details["shards"], after.rows.kept, details["size_bytes"], bytes_of_old, deleted
    )


def superseded(store: Store, before: Artifact, after: Artifact, delete: bool) -> list[File]:
    """The shards that `before`, or what it went on from, lists and no other artifact of the store does; deleted if asked to,
    with the artifacts that list them."""
    history = {one.fingerprint: one for one in store.history(before.stage, before.set)}
    chain: dict[str, Artifact] = {}
    one: Artifact | None = before
    while one is not None and one.fingerprint != after.fingerprint:
        chain[one.fingerprint] = one
        one = history.get(one.inputs.get(PREVIOUS, {}).get("fingerprint", ""))
    others = [a for fingerprint, a in history.items() if fingerprint not in chain]
    needed = {file.path for a in (*others, after) for files in a.tables.values() for file in files}
    listed = {file.path: file for a in chain.values() for files in a.tables.values() for file in files}
    old = [file for path, file in sorted(listed.items()) if path not in needed]
    if delete and old:
        # First what lists them, so that no reader follows a manifest to a file that is gone.
        for artifact in chain.values():
            store.delete_artifact(artifact)
        gone = {file.path for file in old}
        for stage in (before.stage, "shard_index"):
            for key in store.names(f"parts/{stage}"):
                part = store.part(stage, key)
                if part is not None and any(file.path in gone for file in part.files.values()):
                    store.delete_part(stage, part)
        for path in gone:
            store.delete(path)
    return old
