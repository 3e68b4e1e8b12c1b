"""write_shards (Beam): `selected` + where the bytes lie -> WebDataset tars and `index.parquet`.

The order comes from the places of the images and a seed: blocks of images that lie together are shuffled, shards are filled
with whole blocks' images, and inside a shard every image is shuffled. So a worker reads its sources nearly in sequence, and
what it writes depends on nothing but the selection and the order of the places: to the byte, on any machine, with any number
of workers, however ingest was cut.

Shards lie in `<store>/shards/<digest of the plan>/`, a part each: data that moved to places of another order between a
killed run and the next makes another plan, and shards of two plans never meet.

A run over a selection that changed goes on from the shards of the run before it: it writes shards of what is new, lists in its
index what still counts of the old ones (`../<folder>/<shard>`), and in `tombstones` what no longer does, and why. `compact`
writes everything anew.
"""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.algorithms.images.decoding import EXTENSIONS
from lodeset.pipeline.algorithms.sampling import seeded_order
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import watching
from lodeset.pipeline.dag.stage import Context, Outcome, read_as
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import json_text, redacted
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.specs import SHARDS, WriteShardsDetails, WriteShardsRuntime, WriteShardsSpec
from lodeset.pipeline.stages.copies import MOST, SAID, said_of_copies, stands_for
from lodeset.pipeline.stages.standing import Standing, Told, changes, counted, leaked, shards_before, tombstones
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.tar_writing import TAR_RECORD, add_member, open_tar

VERSION = WriteShardsSpec.VERSION
STAGE, INDEX = "write_shards", "shard_index"
BLOCK_IMAGES = 64


@dataclass(frozen=True)
class Entry:
    """One image as it goes into a shard."""

    place: Location
    extension: str
    told: str  # the JSON member


@dataclass(frozen=True)
class Shard:
    key: str
    name: str
    entries: tuple[Entry, ...]  # in the order in which they are written


def run(context: Context[WriteShardsSpec, WriteShardsRuntime]) -> Outcome:
    import apache_beam as beam  # here for the reason given in ingest

    from lodeset.pipeline.engines.beam import attempted, pipeline, raise_failures

    store, spec = context.store, context.spec
    selected = store.table(context.inputs["selected"].tables["selected"])
    if not selected.num_rows:
        raise LodesetError(
            "nothing was selected, so there are no shards to write: look at `lodeset report`, at what dedup and retrieve dropped"
        )
    standing = shards_before(store, context.previous, selected["image_id"])
    said = _said(store, context, selected["image_id"].to_pylist())
    shards = plan(store, context, spec, standing, said)
    if context.runtime.rewritten is not None:
        shards = _read_from(store, context.runtime.rewritten, shards)
    folder = f"shards/{digest(context.fingerprint, [s.key for s in shards])[:16]}"
    before = set(store.committed(STAGE, [s.key for s in shards]))
    left = sum(len(s.entries) for s in shards if s.key not in before)
    there = set(store.names(f"parts/{STAGE}"))
    if left:
        unmade = [s for s in shards if s.key not in before]
        looked = watching(context, STAGE, there, left, "images", len(unmade))
        with looked, pipeline(context.cpus, context.runtime.beam) as p:
            wanted = p | "shards" >> beam.Create(unmade) | beam.Reshuffle()
            _, unwritten = attempted(wanted, "write", _write, store, folder)
            raise_failures(unwritten)
    committed = store.committed(STAGE, [s.key for s in shards])
    parts = [committed[s.key] for s in shards]
    written = store.table([p.files["entries"] for p in parts], None, records.SHARDS)
    buried = tombstones(store, context, standing.dead)
    told = Told(
        index=pa.concat_tables([standing.live, written]),
        tombstones=buried,
        changes=changes(context, standing, buried, written["image_id"], selected),
        copies=pa.Table.from_pylist([redacted(row) for row in said.copies], schema=records.COPIES),
    )
    published = _publish(store, folder, told)
    written_bytes = sum(p.files["shard"].size_bytes for p in parts)
    since = None if context.previous is None else read_as(WriteShardsDetails, context.previous.details)
    return Outcome(
        tables={
            "shards": (*standing.files, *(p.files["shard"] for p in parts)),
            **{name: (file,) for name, file in published.items()},
        },
        rows=Rows(taken=context.inputs["selected"].rows.kept, kept=told.index.num_rows),
        # What is trained on: the same images in other shards change nothing downstream.
        content={SHARDS: content_of(told.index)},
        details=WriteShardsDetails(
            folder=folder,
            shards=len(standing.files) + len(parts),
            shards_numbered=standing.numbered + len(parts),
            parts=len(parts),
            parts_made=len(parts) - len(before),
            size_bytes=written_bytes + sum(file.size_bytes for file in standing.files),
            written_bytes=written_bytes,
            dead_bytes=int(pc.sum(told.tombstones["size_bytes"]).as_py() or 0),
            warnings=leaked(told.tombstones),
            since=None if since is None else {"folder": since.folder, **counted(told.changes)},
        ),
    )


def _read_from(store: Store, held: Artifact, shards: Sequence[Shard]) -> list[Shard]:
    """The same shards, whose images are read from those that hold them: their sources may be gone."""
    stand: dict[str, Location] = {}
    folder = read_as(WriteShardsDetails, held.details).folder
    for row in store.table(held.tables["index"], records.SHARDS.names, records.SHARDS).to_pylist():
        uri = store.full_url(posixpath.normpath(f"{folder}/{row['shard']}"))
        stand[row["image_id"]] = Location(row["image_id"], uri, row["image_id"], row["offset"], row["size_bytes"])
    return [
        replace(one, entries=tuple(replace(e, place=stand.get(e.place.image_id, e.place)) for e in one.entries))
        for one in shards
    ]


def content_of(index: pa.Table) -> str:
    """What an index lists, wherever it lies."""
    return digest(sorted(index["image_id"].to_pylist()))


# -- which image goes where


@dataclass(frozen=True)
class Said:
    """What the sources said: image_id -> its row of `metadata`, and rows of `copies`."""

    own: Mapping[str, Mapping[str, Any]]
    copies: Sequence[Mapping[str, Any]]


def _said(store: Store, context: Context, selected: Sequence[str]) -> Said:
    dropped = stands_for(store, context.inputs["dedup"])
    copies = {image_id: dropped[image_id] for image_id in set(selected) & set(dropped)}
    wanted = pa.array(sorted({*selected, *(copy for of in copies.values() for copy in of)}), pa.string())
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in _sets(context):
        found = _rows_of(store, context.inputs[f"images:{name}"].tables.get("metadata", ()), wanted)
        for row in sorted(found, key=lambda r: str(r["source"])):
            rows.setdefault(row["image_id"], []).append(row)
    own = {image_id: rows[image_id][0] for image_id in selected if image_id in rows}
    return Said(own, said_of_copies(selected, copies, rows))


def plan(store: Store, context: Context, spec: WriteShardsSpec, standing: Standing, said: Said) -> list[Shard]:
    """The shards to write, by metadata alone."""
    selected = store.table(context.inputs["selected"].tables["selected"])
    selected = selected.filter(pc.invert(pc.is_in(selected["image_id"], standing.live["image_id"])))
    why: dict[str, list[dict[str, Any]]] = {}
    for row in selected.to_pylist():
        why.setdefault(row["image_id"], []).append({k: v for k, v in row.items() if k != "image_id" and v is not None})
    entries = _entries(store, context, why, said)
    blocks = [entries[i : i + BLOCK_IMAGES] for i in range(0, len(entries), BLOCK_IMAGES)]
    names = [block[0].place.image_id for block in blocks]
    mixed = [entry for i in seeded_order(names, spec.seed) for entry in blocks[i]]
    shards = []
    for number, run_ in enumerate(_filled(mixed, int(spec.size_mb * 2**20)), standing.numbered):
        order = seeded_order([e.place.image_id for e in run_], spec.seed)
        chosen = tuple(run_[i] for i in order)
        key = digest(STAGE, VERSION, context.fingerprint, number, [e.place.image_id for e in chosen])
        shards.append(Shard(key, f"shard-{number:06d}.tar", chosen))
    return shards


def _sets(context: Context) -> list[str]:
    """The sets whose images may be written; the pool first."""
    names = (role.removeprefix("images:") for role in context.inputs if role.startswith("images:"))
    return sorted(names, key=lambda name: (name != "pool", name))


def _entries(store: Store, context: Context, why: dict[str, list[dict[str, Any]]], said: Said) -> list[Entry]:
    """The selected images by the place of their first copy; the pool's copy comes before those of other sets."""
    entries: list[Entry] = []
    left = set(why)
    copies: dict[str, list[Mapping[str, Any]]] = {}
    for row in said.copies:
        copies.setdefault(row["image_id"], []).append(row)
    for name in _sets(context):
        tables = context.inputs[f"images:{name}"].tables
        wanted = pa.array(sorted(left), pa.string())
        images = _rows_of(store, tables["images"], wanted, ["image_id", "width", "height", "format", "derived_from"])
        about = {row["image_id"]: row for row in images}
        places = _rows_of(store, tables["locations"], wanted, ["image_id", "uri", "member", "offset", "size_bytes"])
        for row in sorted(places, key=lambda r: (r["uri"], r["offset"], r["member"])):
            image_id = row["image_id"]
            if image_id not in left or image_id not in about:
                continue
            left.discard(image_id)
            entries.append(
                Entry(
                    Location(**row),
                    EXTENSIONS[about[image_id]["format"]],
                    _told(about[image_id], said.own.get(image_id), copies.get(image_id, ()), why[image_id]),
                )
            )
    if left:
        raise LodesetError(
            f"{len(left)} selected images lie nowhere, e.g. {min(left)}: run again, so that ingest lists the sources anew"
        )
    return entries


def _rows_of(
    store: Store, files: Sequence[File], wanted: pa.Array, columns: list[str] | None = None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in files:
        table = store.table([file], columns)
        rows += table.filter(pc.is_in(table["image_id"], wanted)).to_pylist()
    return rows


def _told(
    image: Mapping[str, Any],
    said: Mapping[str, Any] | None,
    copies: Sequence[Mapping[str, Any]],
    why: list[dict[str, Any]],
) -> str:
    """What the `.json` member says: why the image is there, and what its source said about it and about copies that it stands
    for. No place, so that the same selection gives the same bytes wherever the data lies; no credentials of URLs, because
    shards are passed on."""
    tree: dict[str, Any] = {k: v for k, v in image.items() if v is not None}
    if said is not None:
        tree |= _known(said)
    if copies:
        tree["metadata_of_copies"] = [{"image_id": row["copy_id"], **_known(row)} for row in copies[:MOST]]
    tree["selected"] = [
        {**row, "similarity": round(row["similarity"], 5)} if "similarity" in row else row for row in why
    ]
    return json_text(redacted(tree))


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    tree = {name: row[name] for name in SAID if row[name] is not None}
    return tree if row["extra"] is None else {**tree, "extra": json.loads(row["extra"])}


def _filled(entries: Sequence[Entry], limit: int) -> Iterator[list[Entry]]:
    run_: list[Entry] = []
    size = 2 * TAR_RECORD
    for entry in entries:
        more = sum(
            TAR_RECORD + -(-n // TAR_RECORD) * TAR_RECORD for n in (entry.place.size_bytes, len(entry.told.encode()))
        )
        if run_ and size + more > limit:
            yield run_
            run_, size = [], 2 * TAR_RECORD
        run_.append(entry)
        size += more
    if run_:
        yield run_


# -- writing


def _write(shard: Shard, store: Store, folder: str) -> None:
    write_shard(store, folder, shard)


def write_shard(store: Store, folder: str, shard: Shard) -> Part:
    """Reads a shard's images in the order of their sources, holds them, and writes them in the shard's order."""
    found = store.part(STAGE, shard.key)
    if found is not None:
        return found
    started = time.perf_counter()
    by_place = sorted((e.place for e in shard.entries), key=lambda p: (p.uri, p.offset, p.member))
    payload = {place.image_id: data for place, data in read_images(by_place)}
    rows = []
    relative = f"{folder}/{shard.name}"
    with store.writing(relative) as sink, open_tar(sink) as tar:
        for entry in shard.entries:
            image_id = entry.place.image_id
            data = payload.pop(image_id)
            rows.append(
                {"image_id": image_id, "shard": shard.name, "offset": tar.offset + TAR_RECORD, "size_bytes": len(data)}
            )
            add_member(tar, f"{image_id}.{entry.extension}", data)
            add_member(tar, f"{image_id}.json", entry.told.encode())
    file = File(relative, len(rows), sink.size_bytes, sink.sha256())
    table = pa.Table.from_pylist(rows, schema=records.SHARDS)
    return store.commit_part(
        STAGE,
        shard.key,
        {"entries": table},
        {"images": len(rows)},
        time.perf_counter() - started,
        files={"shard": file},
    )


def _publish(store: Store, folder: str, told: Told) -> dict[str, File]:
    """`index.parquet`, `tombstones.parquet` and `changes.parquet` beside the shards; the index in the order of the shards and
    of the entries inside."""
    key = digest(INDEX, VERSION, folder)
    found = store.part(INDEX, key)
    if found is None:
        files = {name: store.write_named(f"{folder}/{name}.parquet", table) for name, table in vars(told).items()}
        found = store.commit_part(INDEX, key, {}, files=files)
    return dict(found.files)
