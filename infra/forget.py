"""Take-down: an image leaves every table, cache and shard of a store, and is never taken in again.

Parts and artifacts are rewritten where they lie, the only exception to their being written once. First clean copies are made,
then a journal says which replaces what, then they are put in place; a take-down that was cut short is completed by the next one.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import records
from pipeline.algorithms.images import ID_HEX_DIGITS
from pipeline.dag.claims import claim, live
from pipeline.dag.store import Artifact, File, Part, Store
from pipeline.errors import HeldError, LodesetError
from pipeline.stages import generations, search, write_shards
from pipeline.stages.forgotten import CLAIM, JOURNAL, remember
from pipeline.stages.write_shards import TAR_RECORD, add_member, open_tar

# A row goes with the image that it is about; a mention of it in another image's row goes alone.
ABOUT = ("image_id", "image_id_a", "image_id_b", "pool_image_id", "derived_from")
MENTIONS = ("query_id", "matched_id")
# Models that have seen the image keep what they learnt.
TRAINED = ("train", "evaluate", "prune")


@dataclass(frozen=True)
class Forgotten:
    """What was taken out: images, rows by table, shards that were rewritten; copies that stay; what a store cannot undo."""

    image_ids: tuple[str, ...]
    rows: Mapping[str, int]
    shards: int
    copies: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass
class _Plan:
    """Clean copies by the path that they replace, and parts that go whole (what was laid out for searching names no image)."""

    clean: dict[str, tuple[str, File]] = field(default_factory=dict)
    whole: list[tuple[str, Part]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


def forget(store: Store, artifacts: Mapping[str, Artifact], asked: Sequence[str], with_copies: bool) -> Forgotten:
    """Takes images out of the store, by image_id or by the URL that their source gave.

    Args:
        artifacts: of the configuration, by stage id: where URLs and copies are looked up.
        with_copies: near-duplicates of the images in the pool go, too.

    Raises:
        LodesetError: a URL that no image of the configuration has.
        HeldError: a run is at work on the store.
    """
    with claim(store, CLAIM, f"a take-down in {store.url}"):
        others = [name for name in live(store) if name != CLAIM]
        if others:
            raise HeldError(f"a run is at work on {store.url} ({', '.join(others)}): wait for it, or stop it")
        _complete(store)
        ids = _with_derived(store, artifacts, {i for one in asked for i in _resolved(store, artifacts, one)})
        copies = _copies(store, artifacts, ids)
        if with_copies:
            ids, copies = ids | copies, set()
        remember(store, ids, asked)
        plan = _plan(store, ids)
        _publish(store, plan, len(ids))
        _complete(store)
    shards = sum(path.endswith(".tar") and path.startswith("shards/") for path in plan.clean)
    return Forgotten(tuple(sorted(ids)), plan.rows, shards, tuple(sorted(copies)), _warnings(store, plan))


# -- which images


def _resolved(store: Store, artifacts: Mapping[str, Artifact], asked: str) -> set[str]:
    text = asked.lower()
    if len(text) == ID_HEX_DIGITS and all(c in "0123456789abcdef" for c in text):
        return {text}
    found = {
        image_id
        for table in _tables(store, artifacts, "metadata", ("image_id", "url"))
        for image_id in table["image_id"].filter(pc.equal(table["url"], asked)).to_pylist()
    }
    if not found:
        raise LodesetError(
            f"{asked} is neither an image_id ({ID_HEX_DIGITS} hex digits) nor the URL of an image of this configuration"
        )
    return found


def _with_derived(store: Store, artifacts: Mapping[str, Artifact], ids: set[str]) -> set[str]:
    """And the images that these were made of, or that were made of them (blurred faces)."""
    for table in _tables(store, artifacts, "faces", ("image_id", "derived_from")):
        for made, of in zip(table["image_id"].to_pylist(), table["derived_from"].to_pylist(), strict=True):
            if made in ids or of in ids:
                ids = ids | {made, of}
    return ids


def _copies(store: Store, artifacts: Mapping[str, Artifact], ids: set[str]) -> set[str]:
    """Other images in the groups of these."""
    tables = list(_tables(store, artifacts, "duplicates", ("image_id", "group_id")))
    groups = {g for t in tables for g in t["group_id"].filter(_is_in(t["image_id"], ids)).to_pylist()}
    return {i for t in tables for i in t["image_id"].filter(_is_in(t["group_id"], groups)).to_pylist()} - ids


def _tables(store: Store, artifacts: Mapping[str, Artifact], name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    for artifact in artifacts.values():
        for file in artifact.tables.get(name, ()):
            yield store.table([file], columns)


def _is_in(column: pa.ChunkedArray, ids: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(ids), pa.string()))


# -- clean copies


def _plan(store: Store, ids: set[str]) -> _Plan:
    plan, offsets = _Plan(), {}
    shards = ((key, store.part(write_shards.STAGE, key)) for key in store.names(f"parts/{write_shards.STAGE}"))
    for _, part in shards:
        if part is not None and _mentions(store, part.files["entries"], ids):
            path = part.files["shard"].path
            offsets[path] = _shard(store, plan, part.files["shard"], ids)
    for stage in store.names("parts"):
        for key in store.names(f"parts/{stage}"):
            part = store.part(stage, key)
            if part is None:
                continue
            if stage == search.STAGE:
                plan.whole.append((stage, part))
            elif stage == "ingest":
                _ingested(store, plan, part, ids)
            else:
                _part(store, plan, part, ids, offsets)
    return plan


def _part(store: Store, plan: _Plan, part: Part, ids: set[str], offsets: Mapping[str, Mapping[str, int]]) -> None:
    for name, file in part.files.items():
        if name == "blurred" and _mentions(store, part.files["images"], ids):
            _scrubbed(store, plan, file, ids)
        if not file.path.endswith(".parquet"):
            continue
        # `entries` of a shard lie apart from it, and name it as the index beside it does.
        beside = posixpath.dirname(part.files["shard"].path if name == "entries" else file.path)
        moved = offsets if "offset" in _columns(store, file) else {}
        if not moved and not _mentions(store, file, ids):
            continue
        before = store.table([file])
        if name == generations.TABLE:
            hit = _is_in(before["image_id"], ids)
            after = before.set_column(0, "image_id", pc.if_else(hit, pa.scalar(None, pa.string()), before["image_id"]))
            removed = int(pc.sum(hit).as_py() or 0)
        else:
            after = _without(before, ids)
            removed = before.num_rows - after.num_rows
            after = _with_offsets(after, beside, moved)
        if not after.equals(before):
            _write(store, plan, file, name, after, removed)


def _ingested(store: Store, plan: _Plan, part: Part, ids: set[str]) -> None:
    """A place that is forgotten becomes a reject, so that the files of a part still add up."""
    if not _mentions(store, part.files["locations"], ids):
        return
    tables = {name: store.table([file]) for name, file in part.files.items()}
    places = tables["locations"].filter(_is_in(tables["locations"]["image_id"], ids))
    shown = {"reason": pa.repeat("forgotten", len(places)), "detail": pa.repeat("", len(places))}
    columns = [shown[n] if n in shown else places[n] for n in records.REJECTS.names]
    rejects = pa.concat_tables([tables["rejects"], pa.table(columns, schema=records.REJECTS)])
    for name, table in tables.items():
        after = rejects if name == "rejects" else _without(table, ids)
        if not after.equals(table):
            removed = 0 if name == "rejects" else table.num_rows - after.num_rows
            _write(store, plan, part.files[name], name, after, removed)


def _columns(store: Store, file: File) -> list[str]:
    with store.fs.open(store.path(file.path), "rb") as source:
        return list(pq.read_schema(source).names)


def _mentions(store: Store, file: File, ids: set[str]) -> bool:
    columns = [c for c in _columns(store, file) if c in (*ABOUT, *MENTIONS, "group_id")]
    table = store.table([file], columns) if columns else None
    return table is not None and any(pc.any(_is_in(table[c], ids)).as_py() for c in columns)


def _without(table: pa.Table, ids: set[str]) -> pa.Table:
    for name in table.column_names:
        at = table.schema.get_field_index(name)
        if name in ABOUT:
            table = table.filter(pc.invert(_is_in(table[name], ids)))
        elif name in MENTIONS:
            hit = _is_in(table[name], ids)
            table = table.set_column(at, name, pc.if_else(hit, pa.scalar(None, pa.string()), table[name]))
    if "group_id" in table.column_names:
        # A group bears the smallest image_id in it; those that bore one of these get that of what is left of them.
        group = table["group_id"].to_pylist()
        first: dict[str, str] = {}
        for image_id, name in zip(table["image_id"].to_pylist(), group, strict=True):
            if name in ids:
                first[name] = min(image_id, first.get(name, image_id))
        named = pa.array([first.get(name, name) for name in group], pa.string())
        table = table.set_column(table.schema.get_field_index("group_id"), "group_id", named)
    return table


def _with_offsets(table: pa.Table, folder: str, moved: Mapping[str, Mapping[str, int]]) -> pa.Table:
    if not moved or "shard" not in table.column_names:
        return table
    shards = [posixpath.normpath(f"{folder}/{name}") for name in table["shard"].to_pylist()]
    rows = zip(shards, table["image_id"].to_pylist(), table["offset"].to_pylist(), strict=True)
    offsets = [moved[shard].get(i, offset) if shard in moved else offset for shard, i, offset in rows]
    return table.set_column(table.schema.get_field_index("offset"), "offset", pa.array(offsets, pa.int64()))


def _write(store: Store, plan: _Plan, file: File, name: str, table: pa.Table, removed: int) -> None:
    copy = store.write_named(_copy_name(file), table)
    plan.clean[file.path] = (copy.path, File(file.path, copy.rows, copy.size_bytes, copy.sha256))
    plan.rows[name] = plan.rows.get(name, 0) + removed


def _copy_name(file: File) -> str:
    return f"{file.path}.clean-{time.time_ns():x}"


def _shard(store: Store, plan: _Plan, file: File, ids: set[str]) -> dict[str, int]:
    """A shard without the members of these images; where the bytes of the others lie now."""
    relative, offsets, rows = _copy_name(file), dict[str, int](), 0
    with (
        store.fs.open(store.path(file.path), "rb") as source,
        store.writing(relative) as sink,
        tarfile.open(fileobj=source, mode="r|") as old,
        open_tar(sink) as new,
    ):
        for member in old:
            image_id, _, extension = member.name.partition(".")
            data = old.extractfile(member)
            if image_id in ids or data is None:
                continue
            if extension != "json":
                offsets[image_id], rows = new.offset + TAR_RECORD, rows + 1
            add_member(new, member.name, data.read())
    plan.clean[file.path] = (relative, File(file.path, rows, sink.size_bytes, sink.sha256()))
    return offsets


def _scrubbed(store: Store, plan: _Plan, file: File, ids: set[str]) -> None:
    """Blurred images lie where tables say that they do: zeros take the place of those that go."""
    data = io.BytesIO(store.read(file.path) or b"")
    with tarfile.open(fileobj=data) as tar:
        for member in tar.getmembers():
            if member.name.partition(".")[0] in ids:
                data.seek(member.offset)
                data.write(tarfile.TarInfo("forgotten").tobuf(tarfile.USTAR_FORMAT)[:100])
                data.seek(member.offset_data)
                data.write(bytes(member.size))
    relative = _copy_name(file)
    with store.writing(relative) as sink:
        sink.write(data.getvalue())
    plan.clean[file.path] = (relative, File(file.path, file.rows, sink.size_bytes, sink.sha256()))


# -- in place


def _publish(store: Store, plan: _Plan, images: int) -> None:
    """The journal; from here on the take-down can only be completed."""
    journal = {
        "files": {path: {"copy": copy, "file": asdict(file)} for path, (copy, file) in plan.clean.items()},
        "parts": [[stage, part.key] for stage, part in plan.whole],
        "images": images,
    }
    store.put_absent(JOURNAL, json.dumps(journal).encode())


def _complete(store: Store) -> None:
    """Does what the journal says, however much of it was done before."""
    journal = store.read_json(JOURNAL)
    if journal is None:
        return
    files = {path: File(**entry["file"]) for path, entry in journal["files"].items()}
    for stage, key in journal["parts"]:
        part = store.part(stage, key)
        if part is not None:
            store.delete_part(stage, part)
    for stage in store.names("parts"):
        for key in store.names(f"parts/{stage}"):
            part = store.part(stage, key)
            if part is not None and any(file.path in files for file in part.files.values()):
                changed = {name: files.get(file.path, file) for name, file in part.files.items()}
                store.replace_json(
                    f"parts/{stage}/{key}/manifest.json", asdict(Part(key, changed, part.counts, part.seconds))
                )
    for artifact in _every_artifact(store):
        tables = {name: tuple(files.get(f.path, f) for f in of) for name, of in artifact.tables.items()}
        if tables != dict(artifact.tables):
            store.replace_artifact(artifact, tables)
    for path, entry in journal["files"].items():
        store.replace(entry["copy"], path)
    store.delete(JOURNAL)


def _every_artifact(store: Store) -> Iterator[Artifact]:
    for stage in store.names("artifacts"):
        for set_ in store.names(f"artifacts/{stage}"):
            yield from store.history(stage, set_)


def _warnings(store: Store, plan: _Plan) -> tuple[str, ...]:
    trained = sorted({a.stage for a in _every_artifact(store) if a.stage in TRAINED})
    if not trained or not any(path.startswith("shards/") for path in plan.clean):
        return ()
    return (
        f"{', '.join(trained)} ran before: models that were trained on the image keep what they learnt; train again",
    )
