"""The shards of a run: what each holds, and one of them member by member, read through the index."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query, Request
from starlette.responses import Response

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import thumb_of
from lodeset.infra.dashboard.selection import Selection
from lodeset.infra.dashboard.site import TheSite, number_of
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import WriteShardsDetails
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.tar_writing import TAR_RECORD

router = APIRouter()

PAGE, MEMBERS = 50, 60  # shards, images
LABELS = 12
JSON_BYTES = 2**20  # of one member

RunNumber = Annotated[int | None, Query(ge=1)]
_SHARDS = """
SELECT shard, count(*) AS images, sum(shard_bytes) AS bytes, count(DISTINCT label) AS labels
FROM inspected WHERE shard IS NOT NULL GROUP BY shard
"""
_SETS = """
SELECT shard, name, count(*) AS n FROM (
    SELECT shard, unnest(selected_for) AS name FROM inspected WHERE shard IN ({marks})
) GROUP BY ALL ORDER BY shard, n DESC, name
"""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard as the index and its file tell it.

    Attributes:
        path: in the store; the index may name shards of an earlier run by a relative path.
        size_bytes: None if no manifest lists the file.
        images: those that count. `dead` images lie in it and count no more, in `dead_bytes`.
    """

    name: str
    path: str
    size_bytes: int | None
    images: int
    labels: int
    sets: Sequence[tuple[str, int]]
    dead: int
    dead_bytes: int


@router.get("/shards")
def shards(
    request: Request, site: TheSite, data: TheData, run: RunNumber = None, start: Annotated[int, Query(ge=0)] = 0
) -> Response:
    """All shards, a page at a time."""
    written = data.artifact("write_shards/all")
    if written is None:
        return render.page(request, "shards.html.jinja", number=number_of(data), written=None)
    details = read_as(WriteShardsDetails, written.details)
    dead = _dead(data, written)
    found, total = _listed(data, written, dead, start)
    reasons: dict[str, tuple[int, int]] = {}
    for (_, reason), (count, size) in dead.items():
        before = reasons.get(reason, (0, 0))
        reasons[reason] = before[0] + count, before[1] + size
    return render.page(
        request,
        "shards.html.jinja",
        number=number_of(data),
        written=written,
        details=details,
        folder=data.store.full_url(details.folder),
        shards=found,
        total=total,
        start=start,
        size=PAGE,
        dead=sorted(reasons.items(), key=lambda one: -one[1][0]),
        since=[
            (change, why, n)
            for change, of in (details.since or {}).items()
            if change != "folder"
            for why, n in of.items()
        ],
        sets=_composition(data, "SELECT unnest(selected_for) AS name FROM inspected WHERE shard IS NOT NULL", []),
        labels=_composition(data, "SELECT label AS name FROM inspected WHERE shard IS NOT NULL", []),
    )


@router.get("/shards/members")
def members(
    request: Request,
    site: TheSite,
    data: TheData,
    shard: str,
    run: RunNumber = None,
    start: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """One shard: what its images are, in the order in which they lie."""
    written = data.artifact("write_shards/all")
    sizes = data.rows("SELECT count(*) AS n, sum(shard_bytes) AS bytes FROM inspected WHERE shard = ?", [shard])[0]
    if written is None or not sizes["n"]:
        raise HTTPException(404, f"The index of run {number_of(data)} lists nothing in {shard[:200]}.")
    rows = data.rows(
        f"SELECT * FROM inspected WHERE shard = ? ORDER BY shard_offset, image_id LIMIT {MEMBERS} OFFSET {start}",
        [shard],
    )
    path = _path(written, shard)
    address = render.address(site, "/images")
    more = {"run": run} if run is not None else {}
    return render.page(
        request,
        "members.html.jinja",
        number=number_of(data),
        shard=shard,
        path=path,
        size_bytes=_sizes(written).get(path),
        total=sizes["n"],
        image_bytes=sizes["bytes"],
        dead=[(reason, *found) for (name, reason), found in _dead(data, written).items() if name == shard],
        members=[
            (row, thumb_of(site, row, run=run, outcome="", caption=f"at {row['shard_offset']:,}")) for row in rows
        ],
        start=start,
        size=MEMBERS,
        sets=_composition(data, "SELECT unnest(selected_for) AS name FROM inspected WHERE shard = ?", [shard]),
        labels=_composition(data, "SELECT label AS name FROM inspected WHERE shard = ?", [shard]),
        all_url=f"{address}?{Selection(shard=(shard,)).url(**more)}",
    )


@router.get("/shards/json/{image_id}")
def told(
    request: Request,
    data: TheData,
    image_id: Annotated[str, Path(pattern=rf"^[0-9a-f]{{{ID_HEX_DIGITS}}}$")],
    run: RunNumber = None,
) -> Response:
    """What the shard says of an image, read from the tar behind it."""
    written = data.artifact("write_shards/all")
    rows = data.rows("SELECT * FROM inspected WHERE image_id = ? AND shard IS NOT NULL LIMIT 1", [image_id])
    if written is None or not rows:
        raise HTTPException(404, f"Image {image_id} is in no shard of run {number_of(data)}.")
    (row,) = rows
    path = _path(written, row["shard"])
    found = read_json(data.store, path, row["shard_offset"], row["shard_bytes"])
    return render.page(
        request,
        "told.html.jinja",
        number=number_of(data),
        image_id=image_id,
        row=row,
        path=path,
        told=json.dumps(found, indent=2, ensure_ascii=False),
    )


def _listed(
    data: Data, written: Artifact, dead: Mapping[tuple[str, str], tuple[int, int]], start: int
) -> tuple[list[Shard], int]:
    """A page of shards by name, and how many there are."""
    total = data.rows("SELECT count(DISTINCT shard) AS n FROM inspected")[0]["n"]
    rows = data.rows(f"{_SHARDS} ORDER BY shard LIMIT {PAGE} OFFSET {start}")
    names = [row["shard"] for row in rows]
    sets: dict[str, list[tuple[str, int]]] = {}
    for row in data.rows(_SETS.format(marks=", ".join("?" * len(names))), names) if names else ():
        sets.setdefault(row["shard"], []).append((row["name"], row["n"]))
    sizes = _sizes(written)
    found = []
    for row in rows:
        name = row["shard"]
        gone = [counts for (shard, _), counts in dead.items() if shard == name]
        found.append(
            Shard(
                name=name,
                path=_path(written, name),
                size_bytes=sizes.get(_path(written, name)),
                images=row["images"],
                labels=row["labels"],
                sets=sets.get(name, ()),
                dead=sum(count for count, _ in gone),
                dead_bytes=sum(size for _, size in gone),
            )
        )
    return found, total


def _path(written: Artifact, shard: str) -> str:
    folder = read_as(WriteShardsDetails, written.details).folder
    path = posixpath.normpath(posixpath.join(folder, shard))
    if path.startswith(("../", "/")):
        raise LodesetError(f"the index names a shard outside the store: {shard}")
    return path


def _sizes(written: Artifact) -> dict[str, int]:
    return {file.path: file.size_bytes for file in written.tables.get("shards", ())}


def _dead(data: Data, written: Artifact) -> dict[tuple[str, str], tuple[int, int]]:
    """Images that lie in shards and count no more, and their bytes, by shard and reason."""
    table = data.store.table(
        written.tables.get("tombstones", ()), ["shard", "reason", "image_id", "size_bytes"], records.TOMBSTONES
    )
    counted = table.group_by(["shard", "reason"]).aggregate([("image_id", "count"), ("size_bytes", "sum")])
    return {
        (row["shard"], row["reason"]): (row["image_id_count"], row["size_bytes_sum"]) for row in counted.to_pylist()
    }


def _composition(data: Data, names: str, values: Sequence[Any]) -> list[tuple[str, int]]:
    """How often each name comes, the most frequent ones first."""
    rows = data.rows(
        f"SELECT name, count(*) AS n FROM ({names}) WHERE name IS NOT NULL GROUP BY name ORDER BY n DESC, name LIMIT {LABELS}",
        values,
    )
    return [(row["name"], row["n"]) for row in rows]


def read_json(store: Store, path: str, offset: int, size_bytes: int) -> Any:
    """The JSON member that follows the image whose payload lies at `offset` of a tar.

    Raises:
        LodesetError: the file is not there, or it holds something else at this place.
    """
    after = offset + -(-size_bytes // TAR_RECORD) * TAR_RECORD
    try:
        header = tarfile.TarInfo.frombuf(_read(store, path, after, TAR_RECORD), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise LodesetError(f"{path} has no member at byte {after:,}: {error}") from error
    if not header.name.endswith(".json") or header.size > JSON_BYTES:
        raise LodesetError(
            f"{path}: the member at byte {after:,}, {header.name[:80]} of {header.size:,} bytes, is no JSON of at most {JSON_BYTES:,}"
        )
    try:
        return json.loads(_read(store, path, after + TAR_RECORD, header.size))
    except (ValueError, RecursionError) as error:
        raise LodesetError(f"{path}: {header.name[:80]} cannot be read as JSON") from error


def _read(store: Store, path: str, start: int, size: int) -> bytes:
    with store.explained(f"reading {path}"):
        try:
            return bytes(store.fs.cat_file(store.path(path), start=start, end=start + size))
        except FileNotFoundError as error:
            raise LodesetError(f"{path} is not in the store: compacted, or deleted") from error
