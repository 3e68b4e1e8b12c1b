"""What ingest refused, as letters to be dealt with: listed with their history, read again, or accepted.

A reject says what is wrong with some bytes. Trouble of a file system is never one: it stops the run. Still, a reject may pass: a
slow machine, a full memory, a decoder that a later version mends. The tables of ingest hold the last word on each place; how often
it was examined, and since when it is refused, is kept beside them in `rejects/retried/`, by digests of places.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from lodeset.pipeline.dag.claims import claim, live
from lodeset.pipeline.dag.manifests import sealed
from lodeset.pipeline.dag.store import Artifact, Part, Store
from lodeset.pipeline.errors import ConfigError, HeldError
from lodeset.pipeline.tables.forgotten import CLAIM

RETRIED, ACCEPTED = "rejects/retried", "rejects/accepted"
INGEST = "ingest"
# What ingest found over the images of all slices; its keys do not change with what is in a slice.
OVER_SLICES = ("ingest_exact", "ingest_unique")
# Reasons that say as much about the machine, its memory and its installed packages as about the bytes.
TRANSIENT = frozenset({"too_slow", "too_much_memory", "killed_decoder", "unsupported_format"})
# Nothing is wrong with these bytes: they were left out on purpose, or taken out.
ON_PURPOSE = frozenset({"excluded", "forgotten"})


@dataclass(frozen=True)
class Reject:
    """One place that ingest refused. Times are seconds since 1970, None where lodeset 0.1.0 examined it.

    Attributes:
        detail: the last message.
        transient: whether it may pass on another machine, or with another version.
        attempts: how often it was examined.
        first, last: when it was first refused, and last.
        version: of the code that examined it last.
        accepted: whether somebody has looked at it and let it be.
        part: the key of the part, a slice of a source, that holds it.
    """

    set: str
    uri: str
    member: str
    offset: int
    size_bytes: int
    reason: str
    detail: str
    transient: bool
    attempts: int
    first: float | None
    last: float | None
    version: str
    accepted: bool
    part: str

    @property
    def key(self) -> str:
        return place_key(self.set, self.uri, self.member, self.offset)


@dataclass(frozen=True)
class Chosen:
    """Which rejects are meant: all conditions must hold; None means any.

    Attributes:
        before: only what versions of lodeset before this one examined last.
        accepted: whether accepted ones are meant, too.
    """

    reason: str | None = None
    transient: bool | None = None
    before: str | None = None
    accepted: bool = False


@dataclass(frozen=True)
class Retried:
    """Rejects that the next run reads again, with the parts (slices of sources) that it makes anew for that."""

    rejects: int
    parts: int
    stages: tuple[str, ...]


def place_key(set_: str, uri: str, member: str, offset: int) -> str:
    return hashlib.sha256(json.dumps([set_, uri, member, offset]).encode()).hexdigest()[:32]


def rejects(store: Store, artifacts: Iterable[Artifact], chosen: Chosen) -> Iterator[Reject]:
    """The rejects of these artifacts of ingest, in the order of their sources.

    Raises:
        ConfigError: `chosen.before` is no version, or no reject has the reason.
    """
    retried, accepted = _history(store), _accepted(store)
    before = _version(chosen.before) if chosen.before is not None else None
    for artifact in artifacts:
        for file in artifact.tables.get("rejects", ()):
            part = store.part(INGEST, _part_key(file.path))
            if before is not None and part is not None and part.version and _version(part.version) >= before:
                continue
            for row in store.table([file]).to_pylist():
                found = _reject(row, part, retried, accepted)
                if _is_chosen(found, chosen):
                    yield found


def _reject(
    row: Mapping[str, Any], part: Part | None, retried: Mapping[str, list[float]], accepted: set[str]
) -> Reject:
    key = place_key(row["set"], row["uri"], row["member"], row["offset"])
    last = part.created if part is not None and part.created else None
    earlier = retried.get(key, [])
    known = [when for when in (*earlier, last or 0.0) if when]
    return Reject(
        **{name: row[name] for name in ("set", "uri", "member", "offset", "size_bytes", "reason", "detail")},
        transient=row["reason"] in TRANSIENT,
        attempts=1 + len(earlier),
        first=min(known, default=None),
        last=last,
        version=part.version if part is not None else "",
        accepted=key in accepted,
        part=part.key if part is not None else "",
    )


def _is_chosen(reject: Reject, chosen: Chosen) -> bool:
    return (
        (chosen.reason is None or reject.reason == chosen.reason)
        and (chosen.transient is None or reject.transient == chosen.transient)
        and (chosen.accepted or not reject.accepted)
    )


def by_reason(found: Iterable[Reject]) -> list[tuple[str, list[Reject]]]:
    """Rejects by reason, the commonest first."""
    grouped: dict[str, list[Reject]] = {}
    for reject in found:
        grouped.setdefault(reject.reason, []).append(reject)
    return sorted(grouped.items(), key=lambda pair: (-len(pair[1]), pair[0]))


def retry(store: Store, artifacts: Sequence[Artifact], chosen: Chosen) -> Retried:
    """Take back the parts that hold these rejects, so that the next run reads their slices of the sources again, and no others.

    Nothing downstream is made again unless it turns out that images have come in.

    Raises:
        HeldError: a run or a take-down is at work on the store.
    """
    with claim(store, CLAIM, f"a change in {store.url}"):
        others = [name for name in live(store) if name != CLAIM]
        if others:
            raise HeldError(f"a run is working on {store.url} ({', '.join(others)}): wait for it, or stop it")
        found = [reject for reject in rejects(store, artifacts, chosen) if reject.reason not in ON_PURPOSE]
        wanted = {reject.key for reject in found}
        files = {
            file.path
            for artifact in artifacts
            for file in artifact.tables.get("rejects", ())
            if wanted
            & {place_key(r["set"], r["uri"], r["member"], r["offset"]) for r in store.table([file]).to_pylist()}
        }
        if not files:
            return Retried(0, 0, ())
        # Whatever else these slices refuse is examined again, too.
        every = rejects(store, artifacts, Chosen(accepted=True))
        again = [reject for reject in every if reject.part in {_part_key(path) for path in files}]
        told = {
            reject.key: {"when": reject.last or 0.0, "reason": reject.reason, "version": reject.version}
            for reject in again
        }
        store.put_absent(f"{RETRIED}/{_stamp()}.json", sealed({"rejects": told}))
        parts = [part for path in sorted(files) if (part := store.part(INGEST, _part_key(path))) is not None]
        gone = {file.path for part in parts for file in part.files.values()}
        taken = []
        for set_ in store.names(f"artifacts/{INGEST}"):
            for artifact in store.history(INGEST, set_):
                if any(file.path in gone for file in artifact.files()):
                    store.delete_artifact(artifact)
                    taken.append(artifact.id)
        for stage in OVER_SLICES:
            for key in store.names(f"parts/{stage}"):
                over = store.part(stage, key)
                if over is not None:
                    store.delete_part(stage, over)
        for part in parts:
            store.delete_part(INGEST, part)
    return Retried(len(found), len(parts), tuple(dict.fromkeys(taken)))


def accept(store: Store, artifacts: Sequence[Artifact], chosen: Chosen, by: str, why: str) -> int:
    """Note that somebody has looked at these rejects and lets them be; return how many were new."""
    keys = sorted(reject.key for reject in rejects(store, artifacts, chosen) if not reject.accepted)
    if keys:
        noted = {"keys": keys, "by": by, "why": why, "when": time.time()}
        store.put_absent(f"{ACCEPTED}/{_stamp()}.json", sealed(noted))
    return len(keys)


def known_reasons(store: Store, artifacts: Iterable[Artifact]) -> Counter[str]:
    """How many rejects have each reason, accepted ones included."""
    return Counter(reject.reason for reject in rejects(store, artifacts, Chosen(accepted=True)))


def _history(store: Store) -> dict[str, list[float]]:
    """When each place was examined before its last time."""
    found: dict[str, list[float]] = {}
    for name in store.names(RETRIED):
        for key, told in ((store.read_json(f"{RETRIED}/{name}") or {}).get("rejects", {})).items():
            found.setdefault(key, []).append(float(told["when"]))
    return found


def _accepted(store: Store) -> set[str]:
    return {
        key for name in store.names(ACCEPTED) for key in (store.read_json(f"{ACCEPTED}/{name}") or {}).get("keys", ())
    }


def _part_key(path: str) -> str:
    return path.split("/")[2]


def _stamp() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise ConfigError(f"{text!r} is not a version: give one such as 0.2.0") from None
