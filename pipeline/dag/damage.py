"""What in a store is missing or not what was written, and how a run gets it made again.

Readers note damage when they meet it, and `verify` looks for it. Before a run starts, what is damaged is withdrawn: the artifacts
that list it, and the parts that made it. To the run, these are not made yet. Parts are functions of their keys, so what is made
again is what was there before, and what lies downstream stays finished.

A source whose bytes changed while its size and time stayed the same is dealt with in the same way: the parts that were read from it
are withdrawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.compute as pc

from lodeset.pipeline.dag.manifests import PART, RUN, Artifact, File, Part, Run, parsed
from lodeset.pipeline.dag.store import DAMAGED, Store, artifact_manifest, part_manifest, run_path
from lodeset.pipeline.errors import DamagedError

# Every file of an artifact below these folders is one of a part, too.
_OF_PARTS = ("parts/", "shards/", "pruned/")
# What ingest found in all sources together, under keys that cannot tell two states of a source of the same size and time apart.
OVER_SOURCES = ("ingest_keys", "ingest_exact", "ingest_unique", "ingest_listing", "ingest_draw")
_THREADS = 4

Told = TypeVar("Told")


@dataclass(frozen=True)
class Damage:
    """One file of the store, by its path there; with `source`, one place outside of it."""

    path: str
    why: str
    source: bool = False


@dataclass(frozen=True)
class Contents:
    """Every manifest of a store that can be read, and what is wrong with the others."""

    parts: tuple[tuple[str, Part], ...]  # with their stages
    artifacts: tuple[Artifact, ...]
    runs: tuple[Run, ...]
    damage: tuple[Damage, ...]

    def files(self) -> list[File]:
        """Every file that is listed."""
        of_parts = (file for _, part in self.parts for file in part.files.values())
        return sorted({*of_parts, *(f for one in self.artifacts for f in one.files())}, key=lambda file: file.path)


def contents(store: Store) -> Contents:
    """Reads every manifest; in threads, because far away each is a request."""
    parts = [(stage, key) for stage in store.names("parts") for key in store.names(f"parts/{stage}")]
    made = [
        (stage, set_, fingerprint)
        for stage in store.names("artifacts")
        for set_ in store.names(f"artifacts/{stage}")
        for fingerprint in store.names(f"artifacts/{stage}/{set_}")
    ]
    damage: list[Damage] = []

    def read(relative: str, parse: Callable[[bytes], Told]) -> Told | None:
        data = store.read(relative)
        if data is None:
            return None
        try:
            return parse(data)
        except ValueError as error:
            damage.append(Damage(relative, str(error)))
            return None

    def misplaced(relative: str, belongs: str) -> bool:
        if relative != belongs:
            damage.append(Damage(relative, f"it is the manifest of {belongs}"))
        return relative != belongs

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda at: read(part_manifest(*at), functools.partial(parsed, PART)), parts))
        finished = list(pool.map(lambda at: read(artifact_manifest(*at), store.parsed_artifact), made))
        runs = list(
            pool.map(lambda number: read(run_path(number), functools.partial(parsed, RUN)), store.run_numbers())
        )
    return Contents(
        tuple(
            (at[0], part)
            for at, part in zip(parts, found, strict=True)
            if part is not None and not misplaced(part_manifest(*at), part_manifest(at[0], part.key))
        ),
        tuple(
            one
            for at, one in zip(made, finished, strict=True)
            if one is not None
            and not misplaced(artifact_manifest(*at), artifact_manifest(one.stage, one.set, one.fingerprint))
        ),
        tuple(run for run in runs if run is not None),
        tuple(sorted(damage, key=lambda one: one.path)),
    )


# -- what is damaged


def noted(store: Store) -> list[Damage]:
    """What readers met, and have left a note of."""
    found = []
    for name in store.names(DAMAGED):
        try:
            told = store.read_json(f"{DAMAGED}/{name}")
        except DamagedError:
            continue
        if told is not None and set(told) >= {"path", "why"}:
            found.append(Damage(told["path"], told["why"], told.get("source") == "yes"))
    return found


def missing(store: Store, files: Iterable[File]) -> list[Damage]:
    """Files that are not there, or not of their size."""
    listed = list(files)
    there = _sizes(store, listed)
    found = []
    for file in listed:
        size = there.get(file.path)
        if size is None:
            found.append(Damage(file.path, "a manifest lists it, and it is missing"))
        elif size != file.size_bytes:
            found.append(Damage(file.path, f"it has {size:,} bytes, and {file.size_bytes:,} were written"))
    return found


def _sizes(store: Store, files: Sequence[File]) -> dict[str, int]:
    """The size of each file that is there. Far away, one listing a folder of the first two levels: a request for each file would
    take minutes."""
    found: dict[str, int] = {}
    if store.local:
        for file in files:
            try:
                found[file.path] = Path(store.path(file.path)).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found
    for folder in sorted({"/".join(file.path.split("/")[:2]) for file in files}):
        with store.explained(f"listing {folder}"):
            try:
                listed = store.fs.find(store.path(folder), detail=True)
            except FileNotFoundError:
                continue
        start = store.path("").rstrip("/") + "/"
        found |= {path.removeprefix(start): int(info["size"]) for path, info in listed.items()}
    return found


def changed(store: Store, files: Collection[File]) -> Iterator[Damage]:
    """Files whose bytes are not those that were written. Reads all of them."""

    def look(file: File) -> Damage | None:
        try:
            store.check(file, anew=True)
        except DamagedError as error:
            return Damage(file.path, error.why)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from (damage for damage in pool.map(look, files) if damage is not None)


def without_part(held: Contents) -> list[Damage]:
    """Files of artifacts that no part lists: the part's manifest is damaged or gone, and a take-down would pass them over."""
    listed = {file.path for _, part in held.parts for file in part.files.values()}
    found = {file.path for one in held.artifacts for file in one.files()} - listed
    return [
        Damage(path, "an artifact lists it, and the manifest of its part is missing or damaged")
        for path in sorted(found)
        if path.startswith(_OF_PARTS)
    ]


def family(path: str) -> str:
    """What is likely to be damaged where this is: parts of the same stage, shards of the same folder."""
    return "/".join(path.split("/")[:2]) + "/"


# -- making it again


@dataclass(frozen=True)
class Withdrawn:
    """Artifacts and parts that are no longer finished, and why."""

    artifacts: tuple[Artifact, ...]
    parts: int
    damage: tuple[Damage, ...]


def withdraw(store: Store, damage: Sequence[Damage]) -> Withdrawn:
    """Takes back what lists damaged files, or was read from changed sources, so that the next run makes it again. The run must have
    the store for itself."""
    held = contents(store)
    everything = (*(one for one in damage if _still(store, held, one)), *held.damage, *without_part(held))
    bad = {one.path for one in everything if not one.source}
    sources = {one.path for one in everything if one.source}
    gone = [
        (stage, part)
        for stage, part in held.parts
        if part_manifest(stage, part.key) in bad
        or any(file.path in bad for file in part.files.values())
        or (sources and (stage in OVER_SOURCES or _read_from(store, stage, part, sources)))
    ]
    taken = {(stage, part.key) for stage, part in gone}
    left = {f.path for stage, part in held.parts if (stage, part.key) not in taken for f in part.files.values()}
    artifacts = [
        one
        for one in held.artifacts
        if store.relative_manifest(one) in bad
        or any(f.path in bad or (f.path.startswith(_OF_PARTS) and f.path not in left) for f in one.files())
    ]
    # First what lists files, so that no reader follows a manifest to a file that is gone.
    for one in artifacts:
        store.delete_artifact(one)
    for stage, part in gone:
        store.delete_part(stage, part)
    for path in sorted(bad):
        folder, _, name = path.rpartition("/")
        if path.startswith("parts/") and name == "manifest.json":
            for beside in store.names(folder):
                store.delete(f"{folder}/{beside}")
        store.delete(path)
    for name in store.names(DAMAGED):
        store.delete(f"{DAMAGED}/{name}")
    return Withdrawn(tuple(artifacts), len(gone), everything)


def _still(store: Store, held: Contents, one: Damage) -> bool:
    """Whether it is damaged now: somebody may have put a file back."""
    if one.source:
        return True
    whole = {file.path: file for file in held.files()}.get(one.path)
    if whole is not None:
        try:
            store.check(whole, anew=True)
        except DamagedError:
            return True
        return False
    return all(one.path != part_manifest(stage, part.key) for stage, part in held.parts) and all(
        one.path != store.relative_manifest(artifact) for artifact in held.artifacts
    )


def _read_from(store: Store, stage: str, part: Part, sources: set[str]) -> bool:
    """Whether ingest read a part from one of these places."""
    for name in ("locations", "rejects") if stage == "ingest" else ():
        try:
            uris = store.table([part.files[name]], ["uri"])["uri"]
        except DamagedError:
            return True
        if pc.any(pc.is_in(uris, pc.cast(sorted(sources), uris.type))).as_py():
            return True
    return False
