"""Delete what no kept run needs, and account for every byte of a store.

Every file of the store is put into one class: what the kept runs consist of, parts that save the next run work, records, and so on; or
one of the classes that may go. The sums over all classes are the size of the store.

Kept are the last runs of each data set that wrote shards, what was run since, and runs that were accepted. What no run has on record
stays until it has not changed for a day. What a stage that the configuration still has to make has finished so far stays longer.
While a run is at work, nothing goes that it could take over: only records, reports and logs of old runs.

Deletion goes from manifests to files, so a reader never follows a manifest to a file that is gone, and a deletion that is cut short
leaves a valid store with some files that the next one deletes. What was deleted, and why, is written to `collected/`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lodeset.infra.audits import FOLDER as AUDITS
from lodeset.infra.gates.outcome import FOLDER as GATES
from lodeset.infra.gates.outcome import breaches_kept
from lodeset.infra.looking.summary import CARDS, REPORTS, TRAINED
from lodeset.pipeline.dag.claims import claim, clock, holders
from lodeset.pipeline.dag.damage import Contents, contents
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.manifests import Artifact, Part, Run, sealed
from lodeset.pipeline.dag.runner import LOGS
from lodeset.pipeline.dag.stage import PREVIOUS, Stage, read_as
from lodeset.pipeline.dag.store import RUNS, Store
from lodeset.pipeline.errors import DamagedError, HeldError, LodesetError
from lodeset.pipeline.remote.uploads import abort, orphaned_uploads
from lodeset.pipeline.stages.inspect.graph import ABOUT_RUNS, INSPECT
from lodeset.pipeline.tables.forgotten import CLAIM, JOURNAL
from lodeset.training.specs import TrainDetails

KEEP = 10  # runs
OLDER_THAN_S = 86_400.0
COLLECTED, SHARDS = "collected", "write_shards/all"
RECORDS_KEPT = 20

# Kinds of files: six that stay, and three that go.
KINDS: Mapping[str, str] = {
    "runs": "what the kept runs consist of",
    "work": "parts that the next run can use again",
    "young": "nothing refers to it yet: it was changed lately, or a stage that is not finished can use it",
    "busy": "a run is at work and could use it",
    "records": "records: runs, attempts, claims, reports, cards, lists of what was forgotten",
    "foreign": "not lodeset's",
    "dropped run": "only runs that are not kept need it",
    "left over": "nothing refers to it, and it is old: a run that was killed left it",
    "log": "logs of stages that are gone",
}
GOING = ("dropped run", "left over", "log")

_RECORDS = ("attempts", "claims", "damaged", "forgotten", "accepted", "rejects", "submissions", COLLECTED)
_DATA = ("parts", "artifacts", "lists", "shards", "training", "pruned", LOGS)
# A file that is being written, or a clean copy of a take-down.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}$|\.clean-[0-9a-f]+$|\.reserved$")
_LOG = re.compile(r"-([0-9a-f]{12})\.log$")


@dataclass(frozen=True)
class Entry:
    """A file of the store, by its path there, and why it stays or goes."""

    path: str
    size_bytes: int
    kind: str


@dataclass(frozen=True)
class Collected:
    """What a deletion would delete, or has deleted. `sums` has files and bytes by kind, over the whole store; `uploads` are paths of
    multipart uploads that nobody finished.
    """

    entries: tuple[Entry, ...]  # those that go
    sums: Mapping[str, tuple[int, int]]
    kept_runs: tuple[int, ...]
    dropped_runs: tuple[int, ...]
    uploads: tuple[str, ...]
    deleted: bool

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def files(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class _Needed:
    artifacts: Mapping[tuple[str, str, str], Artifact]
    parts: Collection[tuple[str, str]]  # that are listed
    work: Collection[tuple[str, str]]  # that are not listed, and save work
    files: Collection[str]
    folders: Collection[str]  # of trained models, with their checkpoints
    prefixes: Collection[str]  # 12 digits of fingerprints: of logs, and of unfinished training
    unfinished: tuple[str, ...]  # names of stages that the configuration has still to make
    busy: bool  # a run is at work


def collect(
    store: Store,
    stages: Mapping[str, Stage],
    *,
    keep: int = KEEP,
    older_than: float = OLDER_THAN_S,
    accepted: Callable[[], Collection[int]] = tuple,
    dry_run: bool = False,
) -> Collected:
    """Delete what no kept run needs; with `dry_run` only say what that is.

    Args:
        stages: the graph of the configuration at hand, empty if it cannot be built: what it would take over stays.
        keep: number of runs kept of each data set, of those that wrote shards; what was run since is kept, too.
        older_than: seconds for which unlisted files must not have changed.
        accepted: gives the numbers of further runs to keep, once nothing else can change them.

    Raises:
        HeldError: a take-down is at work.
        LodesetError: there is no store; or a manifest is damaged, so that nobody knows what it lists.
    """
    if not store.names("artifacts") and not store.names("parts"):
        raise LodesetError(f"nothing was made in {store.url} yet: is this the store of the configuration?")
    if dry_run:
        return _examined(store, stages, keep, older_than, accepted())
    with claim(store, CLAIM, f"a deletion in {store.url}"):
        if store.read(JOURNAL) is not None:
            raise HeldError(f"a take-down in {store.url} was cut short: give the same `lodeset forget` again first")
        found = _examined(store, stages, keep, older_than, accepted())
        _delete(store, found.entries)
        abort(store, [upload for upload in orphaned_uploads(store) if upload.path in found.uploads])
    return replace(found, deleted=True)


def _examined(
    store: Store, stages: Mapping[str, Stage], keep: int, older_than: float, accepted: Collection[int]
) -> Collected:
    files = dict(_every_file(store))  # before the manifests: what is put meanwhile is not seen
    held = contents(store)
    if held.damage:
        raise LodesetError(
            f"{held.damage[0].path} of {store.url} is damaged ({held.damage[0].why}), so nobody knows what it lists: "
            "`lodeset run` repairs the store; then collect again"
        )
    kept, dropped = _runs(held, keep, accepted)
    needed = _needed(store, held, kept, stages)
    now = clock(store)
    classes = _Classes(store, held, needed, frozenset(kept), now - older_than)
    entries = [Entry(path, size, classes.of(path, changed)) for path, (size, changed) in sorted(files.items())]
    sums: dict[str, tuple[int, int]] = dict.fromkeys(KINDS, (0, 0))
    for entry in entries:
        count, size = sums[entry.kind]
        sums[entry.kind] = (count + 1, size + entry.size_bytes)
    gone = tuple(entry for entry in entries if entry.kind in GOING)
    uploads = () if needed.busy else tuple(_uploads(store, now - older_than))
    return Collected(gone, sums, tuple(kept), tuple(dropped), uploads, deleted=False)


def _uploads(store: Store, before: float) -> Iterator[str]:
    """Multipart uploads that began long ago; a killed process left them open, and their parts are paid for."""
    for upload in orphaned_uploads(store):
        if upload.started is None or upload.started.timestamp() < before:
            yield upload.path


def _runs(held: Contents, keep: int, accepted: Collection[int]) -> tuple[list[int], list[int]]:
    """The numbers of the runs that stay, and of those that go. A run that ended before the shards (`--until`) replaces none."""
    by_set: dict[tuple[str, int | None], list[Run]] = defaultdict(list)
    for run in sorted(held.runs, key=lambda run: -run.number):
        by_set[run.name, run.limit].append(run)
    kept = {*accepted}
    for runs in by_set.values():
        published = [run.number for run in runs if run.stages.get(SHARDS) is not None] or [run.number for run in runs]
        oldest = published[:keep][-1]
        kept |= {
            run.number
            for run in runs
            if run.number >= oldest and (run.number in published or run.number > published[0])
        }
    every = {run.number for run in held.runs}
    return sorted(kept & every), sorted(every - kept)


def _needed(store: Store, held: Contents, kept: Collection[int], stages: Mapping[str, Stage]) -> _Needed:
    by_key = {(one.stage, one.set, one.fingerprint): one for one in held.artifacts}
    needed: dict[tuple[str, str, str], Artifact] = {}
    prefixes: set[str] = set()

    def add(id_: str, fingerprint: str) -> None:
        stage, _, set_ = id_.partition("/")
        artifact = by_key.get((stage, set_, fingerprint))
        if artifact is None or (stage, set_, fingerprint) in needed:
            return
        needed[stage, set_, fingerprint] = artifact
        for role, told in artifact.inputs.items():
            if role != PREVIOUS:  # its fingerprint is enough to know the artifact by
                add(told.get("stage", ""), told.get("fingerprint", ""))

    for run in held.runs:
        for id_, made in run.stages.items() if run.number in kept else ():
            if made is not None:
                add(id_, made.fingerprint)
    try:
        decisions = decide(store, stages)
    except DamagedError:
        decisions = {}
    unfinished = set()
    for id_, decision in decisions.items():
        if decision.artifact is not None:
            add(id_, decision.artifact.fingerprint)
            continue
        unfinished.add(decision.stage.name)
        if decision.fingerprint is not None:
            prefixes.add(decision.fingerprint[:12])
    for artifact in [one for one in held.artifacts if one.stage == INSPECT]:
        about = {(*told["stage"].split("/", 1), told["fingerprint"]) for told in artifact.inputs.values()}
        of_run = {source for source in about if source[0] not in ABOUT_RUNS}
        if of_run <= needed.keys():
            # What it was made from besides may be older than the run: the map is frozen, and thumbnails are taken over.
            own = {(artifact.stage, artifact.set, artifact.fingerprint), *(about - of_run)}
            needed |= {source: by_key[source] for source in own if source in by_key}
    if not held.runs:  # of lodeset 0.1.0: nobody knows which artifacts belong together
        for artifact in held.artifacts:
            add(artifact.id, artifact.fingerprint)
    prefixes |= {one.fingerprint[:12] for one in needed.values()}
    files = {file.path for one in needed.values() for file in one.files()}
    listed = {(stage, part.key) for stage, part in held.parts if any(f.path in files for f in part.files.values())}
    listed |= {(GATES, key) for run in kept for key in breaches_kept(store, run)}
    unknown = any(one.used is None for one in needed.values())
    every = {(stage, part.key) for stage, part in held.parts}
    used = {(stage, key) for one in needed.values() for stage, keys in (one.used or {}).items() for key in keys}
    work = (every if unknown else used & every) - listed
    folders = {folder for one in needed.values() for folder in _folder(one)}
    busy = any(holder.claim.startswith("run-") for holder in holders(store))
    return _Needed(needed, listed, work, files, folders, prefixes, tuple(sorted(unfinished)), busy)


def _folder(artifact: Artifact) -> list[str]:
    """Where a trained model lies with its checkpoints, of which its artifact lists only the last."""
    return [read_as(TrainDetails, artifact.details).folder] if artifact.stage in TRAINED else []


class _Classes:
    """Says of every path what kind it is."""

    def __init__(self, store: Store, held: Contents, needed: _Needed, kept: Collection[int], before: float) -> None:
        self._needed, self._kept, self._before = needed, kept, before
        dropped = [a for a in held.artifacts if (a.stage, a.set, a.fingerprint) not in needed.artifacts]
        recorded = {
            (*id_.split("/", 1), m.fingerprint) for r in held.runs for id_, m in r.stages.items() if m is not None
        }
        # Any other artifact that no run recorded belongs to a run that is not done, or never was.
        self._dropped = {
            (a.stage, a.set, a.fingerprint)
            for a in dropped
            if (a.stage, a.set, a.fingerprint) in recorded or a.stage in ABOUT_RUNS
        }
        of_dropped = [a for a in dropped if (a.stage, a.set, a.fingerprint) in self._dropped]
        self._dropped_files = {file.path for a in of_dropped for file in a.files()}
        self._dropped_folders = {folder for a in of_dropped for folder in _folder(a)}
        self._dropped_parts = {
            (stage, key) for a in of_dropped for stage, keys in (a.used or {}).items() for key in keys
        }
        self._parts: dict[tuple[str, str], Part] = {(stage, part.key): part for stage, part in held.parts}
        self._dropped_parts |= {
            at for at, part in self._parts.items() if any(f.path in self._dropped_files for f in part.files.values())
        }
        self._part_of = {f.path: at for at, part in self._parts.items() for f in part.files.values()}
        self._pieces = {path for a in needed.artifacts.values() for path in store.pieces(a)}
        self._dropped_pieces = {path for a in of_dropped for path in store.pieces(a)}

    def of(self, path: str, changed: float) -> str:
        kind = self._of(path, changed)
        if self._needed.busy and kind in GOING and path.partition("/")[0] not in (REPORTS, CARDS, LOGS):
            return "busy"
        return kind

    def _of(self, path: str, changed: float) -> str:
        top, _, rest = path.partition("/")
        name = path.rpartition("/")[2]
        if _TEMPORARY.search(name):
            return self._aged(changed)
        if top in (RUNS, REPORTS, CARDS, GATES, AUDITS):
            number = (rest if top in (CARDS, GATES) else name).partition("/")[0].partition(".")[0].partition("-")[0]
            return "records" if not number.isdecimal() or int(number) in self._kept else "dropped run"
        if top in _RECORDS or not rest:
            return "records" if top in _RECORDS or name.startswith((".", "forgetting")) else "foreign"
        if top not in _DATA:
            return "foreign"
        return {"artifacts": self._artifact, "parts": self._part, "lists": self._piece, LOGS: self._log}.get(
            top, self._file
        )(path, changed)

    def _aged(self, changed: float) -> str:
        return "left over" if changed < self._before else "young"

    def _artifact(self, path: str, changed: float) -> str:
        at = tuple(path.split("/")[1:4])
        if at in self._needed.artifacts:
            return "runs"
        return "dropped run" if at in self._dropped else self._aged(changed)

    def _piece(self, path: str, changed: float) -> str:
        if path in self._pieces:
            return "runs"
        return "dropped run" if path in self._dropped_pieces else self._aged(changed)

    def _log(self, path: str, changed: float) -> str:
        found = _LOG.search(path)
        if found is None or found[1] in self._needed.prefixes or changed >= self._before:
            return "records"
        return "log"

    def _part(self, path: str, changed: float) -> str:
        _, stage, key, name = (*path.split("/", 3), "", "")[:4]
        part = self._parts.get((stage, key))
        if part is None:
            return self._aged(changed)
        if name != "manifest.json" and path not in self._part_of:
            return self._aged(changed)  # of an attempt that lost, or was killed
        return self._of_part((stage, key), changed)

    def _of_part(self, at: tuple[str, str], changed: float) -> str:
        if at in self._needed.parts:
            return "runs"
        if at in self._needed.work:
            return "work"
        if at in self._dropped_parts:
            return "dropped run"
        return "young" if at[0].startswith(self._needed.unfinished) else self._aged(changed)

    def _file(self, path: str, changed: float) -> str:
        """A shard, or a file of a model, which lie apart from parts and artifacts."""
        if path in self._needed.files:
            return "runs"
        folder = "/".join(path.split("/")[:2])
        if path in self._part_of and (found := self._of_part(self._part_of[path], changed)) in ("runs", "work"):
            return found
        if folder.startswith("training/"):
            if any(path.startswith(f"{wanted}/") for wanted in self._needed.folders):
                return "runs"
            if folder.partition("/")[2][:12] in self._needed.prefixes:
                return "young"
            if any(path.startswith(f"{wanted}/") for wanted in self._dropped_folders):
                return "dropped run"
        if path in self._dropped_files:
            return "dropped run"
        return self._of_part(self._part_of[path], changed) if path in self._part_of else self._aged(changed)


def _every_file(store: Store) -> Iterator[tuple[str, tuple[int, float]]]:
    """Path, size in bytes and time of the last change of every file of the store."""
    if store.local:
        for folder, _, names in os.walk(store.root):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    told = os.lstat(path)
                except FileNotFoundError:
                    continue
                yield os.path.relpath(path, store.root), (told.st_size, told.st_mtime)
        return
    with store.explained("listing the store"):
        start = store.path("").rstrip("/") + "/"
        for path, info in store.fs.find(store.root, detail=True).items():
            changed = info.get("LastModified") or info.get("mtime") or info.get("last_modified") or info.get("created")
            when = changed.timestamp() if hasattr(changed, "timestamp") else float(changed or time.time())
            yield path.removeprefix(start), (int(info["size"]), when)


def _delete(store: Store, entries: Iterable[Entry]) -> None:
    listed = sorted(entries, key=_order)
    if not listed:
        return
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    record = sealed({"files": [asdict(entry) for entry in listed]})
    name = f"{COLLECTED}/{stamp}-{uuid.uuid4().hex[:8]}.json"
    with contextlib.suppress(LodesetError):  # a full disk is why somebody collects
        store.put_absent(name, record)
    folders = set()
    for entry in listed:
        store.delete(entry.path)
        folders.add(entry.path.rpartition("/")[0])
    store.put_absent(name, record)
    for old in store.names(COLLECTED)[:-RECORDS_KEPT]:
        store.delete(f"{COLLECTED}/{old}")
    if store.local:
        _remove_empty(store, folders)


def _order(entry: Entry) -> tuple[int, str]:
    """Runs first, then artifacts, then parts, then what they list."""
    top, name = entry.path.partition("/")[0], entry.path.rpartition("/")[2]
    if top in (RUNS, REPORTS, CARDS, GATES, AUDITS):
        return 0, entry.path
    if top == "artifacts":
        return 1, entry.path
    return (2 if top == "parts" and name == "manifest.json" else 3), entry.path


def _remove_empty(store: Store, folders: Iterable[str]) -> None:
    for folder in sorted(folders, key=len, reverse=True):
        path = folder
        while path:
            try:
                Path(store.path(path)).rmdir()
            except OSError:
                break
            path = path.rpartition("/")[0]
