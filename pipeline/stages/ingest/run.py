"""ingest (Beam): sources -> `images`, `locations`, `metadata`, `rejects`.

Two steps in one Beam pipeline. (1) Each file is split into slices, and each slice is read in order, decoded, hashed and
committed as a part by the worker that read it. (2) What crosses the shuffle is 16 bytes an image, and 32 more where its source
says something about it: a group-by-key over the first byte of the image_id finds the exact duplicates between parts and the
digest of the whole set. The driver lists nothing: under a limit a pipeline before that finds what is drawn (`draw`).

A decoder that crashes, hangs or fills memory ends one worker; `lodeset.pipeline.stages.ingest.culprits` finds the image, which becomes a
reject, and the rest of the slice goes on.

An image that several parts hold belongs to the first of them (order of the sources, then of the path); the other parts'
`images` are listed without it. `locations` and `metadata` keep a row for every place.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.algorithms.images.decoding import Examined, Limits, Unreadable, examine
from lodeset.pipeline.config import Ingest
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import watching
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import File, Part, Rows, Store
from lodeset.pipeline.engines.failures import Failed
from lodeset.pipeline.engines.processes import TRIES, Again, Died
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.containers import LOOSE
from lodeset.pipeline.sources.listing import SourceFile, image_bytes
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.slices import Slice, check_unchanged, cut, split_loose
from lodeset.pipeline.specs import IngestRuntime, IngestSpec
from lodeset.pipeline.stages.ingest.culprits import limits_of, rescued, samples_of
from lodeset.pipeline.stages.ingest.draw import LISTING, Draw, drawn, listing_key, members
from lodeset.pipeline.stages.ingest.noted import warnings_of
from lodeset.pipeline.stages.ingest.taken import take
from lodeset.pipeline.stages.ingest.yields import WRONG, Given, checked, nothing_in
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.forgotten import forgotten

VERSION = IngestSpec.VERSION
STAGE, KEYS, EXACT, UNIQUE = "ingest", "ingest_keys", "ingest_exact", "ingest_unique"
# Files whose parts' keys lie in one part.
_KEYS_FILES = 1_000
# Characters of metadata that a slice may hold. Files that repeat one long text (a shared sidecar, a Parquet dictionary) are
# small and say gigabytes.
_METADATA_LENGTH = 128 * 2**20
TABLES = {
    "images": records.IMAGES,
    "locations": records.LOCATIONS,
    "metadata": records.METADATA,
    "rejects": records.REJECTS,
}


@dataclass(frozen=True)
class Work:
    """What a worker needs besides its slice."""

    store: Store
    set: str
    limits: Ingest
    forgotten: frozenset[str] = frozenset()
    examine: Callable[[bytes, Limits], Examined] = examine

    def key(self, piece: Slice) -> str:
        """(Where, what the bytes were when listed, what is computed): see the design's section 4."""
        held = [m.identity for m in piece.members]
        computed = self.limits.model_dump(exclude={"slice_mb", "limit", "on_unreadable"})
        return digest(STAGE, VERSION, self.set, piece.uri, piece.image, piece.states, held, computed)


def run(context: Context[IngestSpec, IngestRuntime]) -> Outcome:
    # Here, because the graph imports this module to make a plan, and Beam takes a second to import.
    import apache_beam as beam

    from lodeset.pipeline.engines.beam import attempted, pipeline, raise_failures

    files, limits = context.runtime.files, context.spec.limits
    store = context.store
    work = Work(store, context.stage.set, limits, forgotten(store), examine)
    slice_bytes = int(limits.slice_mb * 2**20)
    packed = [f for f in files if f.kind != LOOSE]
    loose_files = [f for f in files if f.kind == LOOSE]
    draw = drawn(context, packed, loose_files, limits.limit)
    loose = [(work.key(piece), piece) for piece in split_loose(loose_files, slice_bytes, draw.holds)]
    total = image_bytes(files)
    buckets = _buckets(total, slice_bytes)
    # The name of the set is part of it, because the keys of the parts that are named inside hold it.
    prefix = digest(context.fingerprint, context.stage.set, slice_bytes, buckets)
    memory = int(limits.worker_memory_gb * 2**30)
    before = set(store.names(f"parts/{STAGE}"))

    with watching(context, STAGE, before, total, "size_bytes"), pipeline(context.cpus, context.runtime.beam) as p:
        files_in_order = p | "files" >> beam.Create(list(enumerate(packed)))
        loose_slices = p | "loose" >> beam.Create([((len(packed), i), *piece) for i, piece in enumerate(loose)])
        packed_slices, unsplit = attempted(
            files_in_order, "split", _split, work, slice_bytes, draw, memory_bytes=memory, rescue=_unlistable
        )
        slices = (packed_slices, loose_slices) | "all slices" >> beam.Flatten() | beam.Reshuffle()
        by_file = slices | "keys" >> beam.Map(_group_of) | "by file" >> beam.GroupByKey()
        _, unkept = attempted(by_file, "keep keys", _keep_keys, store, prefix)
        held, unread = attempted(slices, "read", _read, work, buckets, memory_bytes=memory, rescue=rescued)
        _, uncompared = attempted(held | "by first byte" >> beam.GroupByKey(), "exact", _exact_of_bucket, store, prefix)
        raise_failures(unsplit, unkept, unread, uncompared)

    store.committed(
        LISTING, [listing_key(file) for file in packed]
    )  # workers read them: they are what this is made from, too
    ordered = _keys(store, prefix, len(packed))
    keys = [key for _, key in ordered]
    parts = store.committed(STAGE, keys)
    content, repeated = _exact(store, prefix, buckets)
    outcome = _outcome(store, [parts[key] for key in keys], content, repeated, new=set(keys) - before)
    if not outcome.rows.kept:
        raise LodesetError(nothing_in(context.stage.set, store, outcome))
    roots = {key: piece.root for key, piece in loose}
    given = Given(
        [(packed[file], parts[key]) for file, key in ordered if file < len(packed)],
        [(roots[key], parts[key]) for file, key in ordered if file == len(packed)],
    )
    stop, rejects = limits.on_unreadable == "stop", outcome.tables["rejects"]
    told = checked(store, context.stage.set, files, given, rejects, stop, bool(draw.last))
    own = [f"left out, because lodeset made it: {shown(path)}" for path in context.runtime.left_out]
    warnings = [*outcome.details.get("warnings", ()), *told, *own]
    return replace(outcome, details={**outcome.details, "warnings": warnings}) if warnings else outcome


# -- the Beam pipeline


def _buckets(size_bytes: int, slice_bytes: int) -> int:
    """How many keys the group-by uses: a power of two up to 256, one for every four slices."""
    wanted = max(1, size_bytes // (4 * slice_bytes))
    return int(min(256, 1 << (wanted.bit_length() - 1)))


def _split(
    numbered: tuple[int, SourceFile], work: Work, slice_bytes: int, draw: Draw
) -> Iterator[tuple[tuple[int, int], str, Slice]]:
    index, file = numbered
    # What no image of a file can be read for is told under a limit, too.
    taken = [m for m in members(work.store, file) if draw.holds(file, m) or m.reason == WRONG]
    for number, piece in enumerate(cut(file, taken, slice_bytes)):
        yield (index, number), work.key(piece), piece


def _unlistable(
    numbered: tuple[int, SourceFile], died: Died, again: Again, split: Callable[..., Any], work: Work, *rest: Any
) -> list[tuple[tuple[int, int], str, Slice]]:
    """A file whose headers end the worker that reads them each time is one refused member."""
    for _ in range(TRIES - 1):
        result = again(split, numbered, work, *rest)
        if isinstance(result, list):
            return result
        if isinstance(result, Failed):
            raise LodesetError(result.message)
        died = result
    index, file = numbered
    refused = Member("", 0, file.size_bytes, "unreadable_archive", f"reading its list of members: {died.detail}")
    (piece,) = cut(file, [refused], 1)
    return [((index, 0), work.key(piece), piece)]


def _group_of(numbered: tuple[tuple[int, int], str, Slice]) -> tuple[int, tuple[tuple[int, int], str]]:
    order, key, _ = numbered
    return order[0] // _KEYS_FILES, (order, key)


def _keep_keys(grouped: tuple[int, Iterable[tuple[tuple[int, int], str]]], store: Store, prefix: str) -> None:
    """Commits the parts' keys of some files in their order, so that nobody need list the files again to know them."""
    group, found = grouped
    order = sorted(found)
    files = pa.array([file for (file, _), _ in order], pa.int64())
    table = pa.table({"key": pa.array([key for _, key in order], pa.string()), "file": files})
    store.commit_part(KEYS, f"{prefix}-{group:06d}", {"keys": table})


def _keys(store: Store, prefix: str, files: int) -> list[tuple[int, str]]:
    """(number of the file, key) of all parts, in the order of the files; those of loose files come last, under the next number."""
    names = [f"{prefix}-{group:06d}" for group in range(files // _KEYS_FILES + 1)]
    parts = store.committed(KEYS, names)
    # A group whose files hold nothing has no part.
    tables = [store.table([parts[name].files["keys"]]) for name in names if name in parts]
    return [pair for t in tables for pair in zip(t["file"].to_pylist(), t["key"].to_pylist(), strict=True)]


Held = tuple[
    tuple[int, int], str, bytes, bytes
]  # order of the part, its key, its image_ids, image_id + metadata digests


def _read(
    numbered: tuple[tuple[int, int], str, Slice],
    work: Work,
    buckets: int,
    condemned: Mapping[int, Unreadable] | None = None,
) -> Iterator[tuple[int, Held]]:
    """Commits the slice's part (unless it is there) and yields, for each bucket, its image_ids and metadata digests."""
    order, key, piece = numbered
    part = ensure_part(work, key, piece, condemned)
    images = work.store.table([part.files["images"]], ["image_id"]).column(0).to_pylist()
    said = work.store.table([part.files["metadata"]]).to_pylist()
    ids: list[list[bytes]] = [[] for _ in range(buckets)]
    digests: list[list[bytes]] = [[] for _ in range(buckets)]
    for image_id in images:
        raw = bytes.fromhex(image_id)
        ids[raw[0] * buckets // 256].append(raw)
    for row in said:
        row.pop("source")
        raw = bytes.fromhex(row["image_id"])
        digests[raw[0] * buckets // 256].append(raw + bytes.fromhex(digest(row)[:32]))
    for bucket in range(buckets):
        if ids[bucket]:
            yield bucket, (order, part.key, b"".join(ids[bucket]), b"".join(digests[bucket]))


def ensure_part(work: Work, key: str, piece: Slice, condemned: Mapping[int, Unreadable] | None = None) -> Part:
    """The committed part of a slice, made now if it is not there.

    Raises:
        LodesetError: a source is not what it was when it was listed; nothing is committed then.
    """
    found = work.store.part(STAGE, key)
    if found is not None:
        return found
    started = time.perf_counter()
    check_unchanged(piece)
    tables, counts = ingest_slice(
        work.set, piece, work.limits, work.forgotten, condemned=condemned, examine=work.examine
    )
    check_unchanged(piece, set(tables["rejects"]["uri"].to_pylist()))
    return work.store.commit_part(STAGE, key, tables, counts, time.perf_counter() - started)


def ingest_slice(
    set_: str,
    piece: Slice,
    settings: Ingest,
    forgotten: frozenset[str] = frozenset(),
    *,
    condemned: Mapping[int, Unreadable] | None = None,
    examine: Callable[[bytes, Limits], Examined] = examine,
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Reads, decodes and hashes one slice; images to be `forgotten` are rejects. Within it, an image_id has one row of `images`,
    and one of `locations` a place.

    `condemned`: samples, by their number, that are not decoded, because decoding them ended a worker.
    """
    limits = limits_of(settings)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    seen: set[str] = set()
    counts = {"files": 0, "images": 0, "size_bytes": 0}
    said = 0
    for number, sample in samples_of(piece, settings):
        counts["files"] += 1
        counts["size_bytes"] += sample.size_bytes
        where = {
            "set": set_,
            "uri": sample.uri,
            "member": sample.member,
            "offset": sample.offset,
            "size_bytes": sample.size_bytes,
        }
        if sample.reason:
            rows["rejects"].append({**where, "reason": sample.reason, "detail": sample.detail})
            continue
        counts["images"] += 1
        try:
            if condemned and number in condemned:
                raise condemned[number]
            image = take(sample.data, settings, limits, examine)
        except Unreadable as error:
            rows["rejects"].append({**where, "reason": error.reason, "detail": error.detail})
            continue
        found = image.found
        if not image.ids.isdisjoint(forgotten):
            rows["rejects"].append({**where, "reason": "forgotten", "detail": ""})
            continue
        rows["locations"].append({**where, "image_id": found.image_id})
        said += sample.metadata.length
        if said > _METADATA_LENGTH and not sample.metadata.empty:
            counts["files"] += 1
            detail = f"the slice's texts have more than {_METADATA_LENGTH} characters: this one is left out"
            rows["rejects"].append({**where, "reason": "bad_metadata", "detail": detail})
        elif not sample.metadata.empty:
            rows["metadata"].append(
                {"image_id": found.image_id, "source": _source_name(sample), **asdict(sample.metadata)}
            )
        if found.image_id not in seen:
            seen.add(found.image_id)
            told = {"set": set_, "size_bytes": image.size_bytes, "derived_from": image.derived_from}
            rows["images"].append({**asdict(found), **told})
    return {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in TABLES.items()}, counts


def _source_name(sample: Sample) -> str:
    return f"{sample.uri}#{sample.member}@{sample.offset}" if sample.member else sample.uri


def _exact_of_bucket(grouped: tuple[int, Iterable[Held]], store: Store, prefix: str) -> None:
    """Commits one bucket: which ids several parts hold, and the digests of ids and metadata for each first byte."""
    bucket, found = grouped
    owners: set[bytes] = set()
    repeated: list[dict[str, str]] = []
    metadata: set[bytes] = set()
    for _, key, ids, said in sorted(found):
        for at in range(0, len(ids), 16):
            raw = ids[at : at + 16]
            if raw in owners:
                repeated.append({"image_id": raw.hex(), "part": key})
            owners.add(raw)
        metadata.update(said[at : at + 32] for at in range(0, len(said), 32))
    lines = []
    for byte in range(256):
        images = b"".join(sorted(raw for raw in owners if raw[0] == byte))
        if images:
            about = b"".join(sorted(raw for raw in metadata if raw[0] == byte))
            lines.append(
                {
                    "byte": byte,
                    "images": hashlib.sha256(images).hexdigest(),
                    "metadata": hashlib.sha256(about).hexdigest(),
                }
            )
    tables = {
        "digests": pa.Table.from_pylist(lines, schema=_DIGESTS),
        "repeated": pa.Table.from_pylist(repeated, schema=_REPEATED),
    }
    store.commit_part(EXACT, f"{prefix}-{bucket:03d}", tables, {"unique": len(owners)})


_DIGESTS = pa.schema([("byte", pa.int32()), ("images", pa.string()), ("metadata", pa.string())])
_REPEATED = pa.schema([("image_id", pa.string()), ("part", pa.string())])


# -- what the parts add up to


def _exact(store: Store, prefix: str, buckets: int) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The digests of the whole set, and for each part the image_ids that an earlier part owns."""
    keys = [f"{prefix}-{bucket:03d}" for bucket in range(buckets)]
    parts = store.committed(EXACT, keys)
    repeated: dict[str, set[str]] = {}
    lines: list[dict[str, Any]] = []
    for key in keys:
        if key not in parts:
            continue  # a bucket that no id fell into
        lines += store.table([parts[key].files["digests"]]).to_pylist()
        for row in store.table([parts[key].files["repeated"]]).to_pylist():
            repeated.setdefault(row["part"], set()).add(row["image_id"])
    lines.sort(key=lambda line: line["byte"])
    images = digest(STAGE, VERSION, [line["images"] for line in lines])
    return {"images": images, "metadata": digest(images, [line["metadata"] for line in lines])}, repeated


def _without(store: Store, part: Part, repeated: set[str]) -> File:
    """The part's `images` less those that an earlier part owns, as a small part of its own."""
    key = digest(part.key, sorted(repeated))
    unique = store.part(UNIQUE, key)
    if unique is None:
        table = store.table([part.files["images"]])
        keep = pc.invert(pc.is_in(table["image_id"], pa.array(sorted(repeated), pa.string())))
        unique = store.commit_part(UNIQUE, key, {"images": table.filter(keep)})
    return unique.files["images"]


def _outcome(
    store: Store, parts: Sequence[Part], content: dict[str, str], repeated: dict[str, set[str]], new: set[str]
) -> Outcome:
    tables: dict[str, list[File]] = {name: [] for name in TABLES}
    for part in parts:
        for name in TABLES:
            file = part.files[name]
            if name == "images" and part.key in repeated:
                file = _without(store, part, repeated[part.key])
            tables[name].append(file)
    kept = sum(f.rows for f in tables["images"])
    places = sum(f.rows for f in tables["locations"])
    reasons = pc.value_counts(store.table(tables["rejects"], ["reason"], records.REJECTS)["reason"]).to_pylist()
    dropped = {r["values"]: r["counts"] for r in sorted(reasons, key=lambda r: r["values"])}
    if places > kept:
        dropped["exact_duplicate"] = places - kept
    return Outcome(
        # Files without rows say nothing; `images` and `locations` keep theirs, one a part: embed goes by these pairs.
        tables={
            name: tuple(f for f in files if f.rows or name in ("images", "locations")) for name, files in tables.items()
        },
        rows=Rows(taken=sum(p.counts["files"] for p in parts), kept=kept, dropped=dropped),
        content=content,
        details={
            "parts": len(parts),
            "parts_made": len(new),
            "images_decoded": sum(p.counts["images"] for p in parts if p.key in new),
            "size_bytes": sum(p.counts["size_bytes"] for p in parts),
            **({"warnings": noted} if (noted := warnings_of(store, tables["images"])) else {}),
        },
    )
