"""Take-down: an image leaves every table, shard and page of a store, and is never taken in again.

Parts and artifacts are rewritten in place, the only exception to the rule that they are written once. A first journal
lists the images; then clean copies are made, a second journal lists which copy replaces which file, and the copies are
put in place. The next take-down completes an interrupted one, and no run starts before that.

Images are searched in everything that the store holds, not only in what is finished today: a configuration may have
changed.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lodeset.infra.audits import drop_audits
from lodeset.infra.card.card import drop_cards
from lodeset.infra.looking.summary import REPORTS
from lodeset.infra.upkeep.compact import every_artifact, sweep
from lodeset.infra.upkeep.taken import copies_of, every_part, is_in, kept_for, resolved, selected_for, with_derived
from lodeset.pipeline.dag import attempts
from lodeset.pipeline.dag.claims import claim, live
from lodeset.pipeline.dag.damage import Damage, noted, withdraw
from lodeset.pipeline.dag.manifests import sealed
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.errors import DamagedError, HeldError, LodesetError
from lodeset.pipeline.shown import json_text
from lodeset.pipeline.specs import SHARDS
from lodeset.pipeline.stages import search, write_shards
from lodeset.pipeline.stages.inspect.graph import ABOUT_RUNS
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.forgotten import CLAIM, JOURNAL, PLANNED, remember
from lodeset.pipeline.tables.records import BY_NAME, UNLISTED, kept_by
from lodeset.pipeline.tables.tar_writing import TAR_RECORD, add_member, open_tar

# Models that have seen the image keep what they learned.
TRAINED = ("train", "finish", "distill", "prune")


@dataclass(frozen=True)
class Forgotten:
    """The result of a take-down: images, rows by table, number of rewritten shards; copies that stay; what a store
    cannot undo.
    """

    image_ids: tuple[str, ...]
    rows: Mapping[str, int]
    shards: int
    copies: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass
class _Plan:
    """Clean copies by the path that they replace, the images that left each of these (if their stage counted them as
    kept), the digests of rewritten indexes, and parts that are removed as a whole, because search indexes cannot be
    edited by image; so are what pages about runs read.
    """

    clean: dict[str, tuple[str, File]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    whole: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


def forget(store: Store, asked: Sequence[str], with_copies: bool) -> Forgotten:
    """Take images out of the store, by image_id or by the URL of their source.

    Args:
        with_copies: also take out the near-duplicates that dedup found for these images in its last run.

    Raises:
        LodesetError: there is no store, or no image in it has a given URL.
        HeldError: a run is working on the store.
    """
    if not store.names("artifacts"):
        raise LodesetError(f"no run has finished a stage in {store.url}: is this the store of the configuration?")
    with claim(store, CLAIM, f"a take-down in {store.url}"):
        others = [name for name in live(store) if name != CLAIM]
        if others:
            raise HeldError(f"a run is working on {store.url} ({', '.join(others)}): wait for it, or stop it")
        damaged: list[Damage] = []
        while True:
            try:
                ids, copies, plan = _taken_down(store, asked, with_copies)
                break
            except DamagedError:
                # An unreadable file may contain the image and must not delay its take-down, so it is removed as a
                # whole.
                damage = noted(store)
                if not damage:
                    raise
                damaged += withdraw(store, damage).damage
    shards = sum(path.endswith(".tar") and path.startswith("shards/") for path in plan.clean)
    warnings = (*_warnings(store, plan), *([_DAMAGED.format(len(damaged), damaged[0].path)] if damaged else []))
    return Forgotten(tuple(sorted(ids)), plan.rows, shards, tuple(sorted(copies)), warnings)


_DAMAGED = "{} damaged files were removed together with what listed them (e.g. {}): `lodeset run` makes them again"


def _taken_down(store: Store, asked: Sequence[str], with_copies: bool) -> tuple[set[str], set[str], _Plan]:
    """The images that were taken out, the copies of them that stay, and what was done.

    Raises:
        DamagedError: something in the store cannot be read; the take-down can be repeated.
    """
    _complete(store)
    ids = with_derived(store, {i for request in asked for i in resolved(store, request)})
    copies = copies_of(store, ids)
    if with_copies:
        ids, copies = with_derived(store, ids | copies), set()
    # From here on the take-down can only be completed.
    store.put_absent(JOURNAL, sealed({"ids": sorted(ids), "asked": list(asked)}))
    return ids, copies, _complete(store) or _Plan()


# -- clean copies


def _plan(store: Store, ids: set[str]) -> _Plan:
    plan, offsets = _Plan(), {}
    parts = list(every_part(store))
    carriers = kept_for(store, ids) | selected_for(store, ids)  # their JSON says something of these images
    for stage, part in parts:
        if stage == write_shards.STAGE and _mentions(store, part.files["entries"], ids | carriers, "entries"):
            offsets[part.files["shard"].path] = _shard(store, plan, part.files["shard"], ids)
    for stage, part in parts:
        if stage == search.STAGE or (stage in ABOUT_RUNS and _names_any(store, part, ids)):
            plan.whole.append((stage, part.key))
        elif stage in ABOUT_RUNS:
            continue
        elif stage == "ingest":
            _ingested(store, plan, part, ids)
        else:
            _part(store, plan, part, ids, offsets)
    return plan


def _names_any(store: Store, part: Part, ids: set[str]) -> bool:
    """Whether a part names one of the images, or may hold its vector without its name (a map by UMAP)."""
    for name, file in part.files.items():
        if file.path.endswith(".parquet"):
            if _mentions(store, file, ids, name):
                return True
        else:
            with store.opened(file) as source, np.load(source, allow_pickle=False) as arrays:
                if "sample" in arrays.files:
                    return True
    return False


def _part(store: Store, plan: _Plan, part: Part, ids: set[str], offsets: Mapping[str, Mapping[str, int]]) -> None:
    for name, file in part.files.items():
        if name == "blurred" and _mentions(store, part.files["images"], ids, "images"):
            _scrubbed(store, plan, file, ids)
        if not file.path.endswith(".parquet"):
            continue
        # `entries` of a shard are stored apart from it and refer to it as the index next to it does.
        beside = posixpath.dirname(part.files["shard"].path if name == "entries" else file.path)
        moved = offsets if "offset" in _columns(store, file) else {}
        if not moved and not _mentions(store, file, ids, name):
            continue
        before = store.table([file])
        after = _with_offsets(_without(before, ids, name), beside, moved)
        named = sum(int(pc.sum(is_in(before[column], ids)).as_py() or 0) for column in _blanked(name, before))
        removed = before.num_rows - after.num_rows + named
        if not after.equals(before):
            _write(store, plan, file, name, after, removed)
            plan.lost[file.path] = _kept(name, before) - _kept(name, after)
            if name == "index":
                plan.content[file.path] = write_shards.content_of(after)


def _kept(name: str, table: pa.Table) -> int:
    """Number of images that a table counts as kept by its stage."""
    how = BY_NAME.get(name, UNLISTED).kept
    if how == "flag":
        return int(pc.sum(table["kept"]).as_py() or 0)
    return int(pc.count_distinct(table["image_id"]).as_py()) if how == "rows" else 0


def _ingested(store: Store, plan: _Plan, part: Part, ids: set[str]) -> None:
    """A forgotten location becomes a reject, so that the files of a part still add up."""
    if not _mentions(store, part.files["locations"], ids, "locations"):
        return
    tables = {name: store.table([file]) for name, file in part.files.items()}
    places = tables["locations"].filter(is_in(tables["locations"]["image_id"], ids))
    shown = {"reason": pa.repeat("forgotten", len(places)), "detail": pa.repeat("", len(places))}
    columns = [shown[n] if n in shown else places[n] for n in records.REJECTS.names]
    rejects = pa.concat_tables([tables["rejects"], pa.table(columns, schema=records.REJECTS)])
    for name, table in tables.items():
        after = rejects if name == "rejects" else _without(table, ids, name)
        if not after.equals(table):
            removed = 0 if name == "rejects" else table.num_rows - after.num_rows
            _write(store, plan, part.files[name], name, after, removed)
            plan.lost[part.files[name].path] = _kept(name, table) - _kept(name, after)


def _columns(store: Store, file: File) -> list[str]:
    with store.opened(file) as source:
        return list(pq.read_schema(source).names)


def _mentions(store: Store, file: File, ids: set[str], name: str) -> bool:
    columns = [c for c in _columns(store, file) if c in BY_NAME.get(name, UNLISTED).naming]
    table = store.table([file], columns) if columns else None
    return table is not None and any(pc.any(is_in(table[c], ids)).as_py() for c in columns)


def _blanked(name: str, table: pa.Table) -> list[str]:
    """Columns of rows that only mention an image, and stay without the mention."""
    known = BY_NAME.get(name, UNLISTED)
    return [] if known.about else [c for c in known.mentions if c in table.column_names]


def _without(table: pa.Table, ids: set[str], name: str) -> pa.Table:
    known = BY_NAME.get(name, UNLISTED)
    existing = set(table.column_names)
    for column in existing & set(known.about):
        table = table.filter(pc.invert(is_in(table[column], ids)))
    for column in existing & set(known.mentions):
        at, hit = table.schema.get_field_index(column), is_in(table[column], ids)
        table = table.set_column(at, column, pc.if_else(hit, pa.scalar(None, pa.string()), table[column]))
    for column in existing & set(known.groups):
        # A group is named after its smallest image_id; groups named after a removed image get the smallest id of the
        # rest.
        group = table[column].to_pylist()
        first: dict[str, str] = {}
        for image_id, name in zip(table["image_id"].to_pylist(), group, strict=True):
            if name in ids:
                first[name] = min(image_id, first.get(name, image_id))
        renamed = pa.array([first.get(name, name) for name in group], pa.string())
        table = table.set_column(table.schema.get_field_index(column), column, renamed)
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
    """Rewrite a shard without the members of these images; return the new offsets of the others."""
    relative, offsets, rows = _copy_name(file), dict[str, int](), 0
    with (
        store.opened(file) as source,
        store.writing(relative) as sink,
        tarfile.open(fileobj=source, mode="r|") as old,
        open_tar(sink) as new,
    ):
        for member in old:
            image_id, _, extension = member.name.partition(".")
            data = old.extractfile(member)
            if image_id in ids or data is None:
                continue
            content = data.read()
            if extension == "json":
                content = _without_mentions(content, ids)
            else:
                offsets[image_id], rows = new.offset + TAR_RECORD, rows + 1
            add_member(new, member.name, content)
    plan.clean[file.path] = (relative, File(file.path, rows, sink.size_bytes, sink.sha256()))
    return offsets


def _without_mentions(data: bytes, ids: set[str]) -> bytes:
    """An image's JSON without the metadata of forgotten copies, and without the names of forgotten images that it was
    selected for.
    """
    before = json.loads(data)
    tree = dict(before)
    copies = [copy for copy in before.get("metadata_of_copies", ()) if copy["image_id"] not in ids]
    if copies:
        tree["metadata_of_copies"] = copies
    else:
        tree.pop("metadata_of_copies", None)
    if "selected" in before:
        tree["selected"] = [
            {key: value for key, value in row.items() if key != "query_id" or value not in ids}
            for row in before["selected"]
        ]
    return data if tree == before else json_text(tree).encode()


def _scrubbed(store: Store, plan: _Plan, file: File, ids: set[str]) -> None:
    """Overwrite the bytes of removed blurred images with zeros, because tables hold the offsets of the others."""
    data = io.BytesIO(store.bytes_of(file))
    with tarfile.open(fileobj=data) as tar:
        for member in tar.getmembers():
            if member.name.partition(".")[0] in ids:
                data.seek(member.offset)
                blank = tarfile.TarInfo("forgotten")
                blank.size = member.size
                data.write(blank.tobuf(tarfile.USTAR_FORMAT))
                data.seek(member.offset_data)
                data.write(bytes(member.size))
    relative = _copy_name(file)
    with store.writing(relative) as sink:
        sink.write(data.getvalue())
    plan.clean[file.path] = (relative, File(file.path, file.rows, sink.size_bytes, sink.sha256()))


# -- in place


def _complete(store: Store) -> _Plan | None:
    """Do what the journals list, however much of it was done before; return the plan if this call made it."""
    journal = store.read_json(JOURNAL)
    if journal is None:
        return None
    plan, ids = None, set(journal["ids"])
    if store.read(PLANNED) is None:
        remember(store, ids, journal["asked"])
        plan = _plan(store, ids)
        planned = {
            "files": {path: {"copy": copy, "file": asdict(file)} for path, (copy, file) in plan.clean.items()},
            "whole": plan.whole,
            "lost": plan.lost,
            "content": plan.content,
        }
        store.put_absent(PLANNED, sealed(planned))
    _replace(store, store.read_json(PLANNED) or {})
    sweep(store)
    for name in store.names(REPORTS):
        store.delete(f"{REPORTS}/{name}")  # pages contain pictures; `run` and `report` write new ones
    drop_audits(store, ids)
    drop_cards(store)  # digests and counts are others now, and licenses are texts from sources
    for number in attempts.numbers(store):
        store.delete(attempts.path_of(number))  # the error of a run may name an image
    store.delete(PLANNED)
    store.delete(JOURNAL)
    return plan


def _replace(store: Store, planned: Mapping[str, Any]) -> None:
    files = {path: File(**entry["file"]) for path, entry in planned["files"].items()}
    whole = {f"parts/{stage}/{key}" for stage, key in planned["whole"]}
    for artifact in every_artifact(store):
        # `lodeset inspect` makes it again.
        if artifact.stage in ABOUT_RUNS and any(posixpath.dirname(file.path) in whole for file in artifact.files()):
            store.delete_artifact(artifact)
    for stage, key in planned["whole"]:
        part = store.part(stage, key)
        if part is not None:
            store.delete_part(stage, part)
    for stage, part in every_part(store):
        if any(file.path in files for file in part.files.values()):
            changed = {name: files.get(file.path, file) for name, file in part.files.items()}
            tree = asdict(replace(part, files=changed))
            store.replace_json(f"parts/{stage}/{part.key}/manifest.json", tree)
    for artifact in every_artifact(store):
        tables = {name: tuple(files.get(f.path, f) for f in of) for name, of in artifact.tables.items()}
        if tables != dict(artifact.tables):
            store.replace_artifact(_less(artifact, planned, tables))
    for path, entry in planned["files"].items():
        store.replace(entry["copy"], path)


def _less(artifact: Artifact, planned: Mapping[str, Any], tables: Mapping[str, tuple[File, ...]]) -> Artifact:
    """The artifact with other files: its kept rows are reduced by the removed ones, so that later counts still add
    up.
    """
    rows, keeping = artifact.rows, kept_by(artifact.stage)
    of = artifact.tables.get(keeping.name, ()) if keeping is not None else ()
    lost = sum(planned["lost"].get(file.path, 0) for file in of if keeping and file not in tables[keeping.name])
    if lost:
        dropped = {**rows.dropped, "forgotten": rows.dropped.get("forgotten", 0) + lost}
        rows = Rows(rows.taken, rows.kept - lost, dropped)
    content = dict(artifact.content)
    for file in artifact.tables.get("index", ()):
        # The training data changed, so what was trained on them must change, too.
        if file.path in planned["content"]:
            content[SHARDS] = planned["content"][file.path]
    return replace(artifact, tables=tables, rows=rows, content=content)


def _warnings(store: Store, plan: _Plan) -> tuple[str, ...]:
    warnings_ = []
    if not any(plan.rows.values()):
        warnings_.append(
            "nothing in the store referred to it: it was only added to the list of images that are never taken in"
        )
    trained = sorted({artifact.stage for artifact in every_artifact(store) if artifact.stage in TRAINED})
    if trained and plan.content:
        stages = ", ".join(trained)
        warnings_.append(
            f"{stages} ran before: models that were trained on it keep what they learned; the next run trains again"
        )
    return tuple(warnings_)
