"""What a card says, read from the artifacts of a finished run.

Nothing here names an image, a URL of an image or a place on a machine: a card is passed on with the shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.infra.looking.held import Held
from lodeset.pipeline.algorithms.images.decoding import EXTENSIONS
from lodeset.pipeline.by_hand import BY_HAND
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import without_secrets
from lodeset.pipeline.specs import RetrieveDetails, WriteShardsDetails
from lodeset.pipeline.tables import records

LICENCES_SHOWN = 50
LICENCE_LENGTH = 120  # characters; some sources put a whole text there
# Sections of the configuration that say where and how a run works, not what it makes.
_PLACES = ("store", "resources")


@dataclass(frozen=True)
class Contribution:
    """Images of the shards that one set selected in one mode, and the images of the set itself, if it was ingested."""

    set: str
    mode: str
    images: int
    own: int | None
    retrieved: int | None  # hits before collisions and limits


@dataclass(frozen=True)
class Step:
    """One stage of one set: taken = kept + dropped."""

    id: str
    taken: int
    kept: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Licences:
    """What the sources say of the images in the shards.

    Attributes:
        counts: the most frequent licences, with the number of images for which a source names them.
        others: number of further licences, and of the times that they are named.
        silent: images of which no source says anything.
        several: images for which sources name different licences.
    """

    counts: tuple[tuple[str, int], ...]
    others: tuple[int, int]
    silent: int
    several: int


@dataclass(frozen=True)
class Facts:
    """`extensions`: images by the extension of their member. `shared`: images that several sets selected."""

    run: Run
    folder: str  # of the index, relative to the store
    images: int
    dead: int  # images that lie in the shards and do not count
    size_bytes: int
    shards: tuple[File, ...]
    index: File
    extensions: Mapping[str, int]
    contributions: tuple[Contribution, ...]
    shared: int
    steps: tuple[Step, ...]
    licences: Licences
    config: Mapping[str, Any]

    @property
    def pool(self) -> Step | None:
        return next((step for step in self.steps if step.id == "ingest/pool"), None)


def facts(store: Store, held: Held) -> Facts:
    """What the card of a run says.

    Raises:
        LodesetError: no run has written shards, or a file that a manifest lists is missing or damaged.
    """
    run, written = held.run, held.artifacts.get("write_shards/all")
    if run is None or written is None:
        which = "no finished run" if run is None else f"run {run.number}"
        raise LodesetError(
            f"{which} of {store.url} has shards to describe: `lodeset run` writes them, and `--run N` chooses another run"
        )
    details = read_as(WriteShardsDetails, written.details)
    ids = store.table(written.tables["index"], ["image_id"], records.SHARDS)["image_id"].combine_chunks()
    described = _described(written, held.artifacts)
    contributions, shared = _contributions(store, held.artifacts, ids)
    return Facts(
        run=run,
        folder=details.folder,
        images=written.rows.kept,
        dead=sum(file.rows for file in written.tables.get("tombstones", ())),
        size_bytes=details.size_bytes,
        shards=written.tables["shards"],
        index=written.tables["index"][0],
        extensions=_extensions(store, described, ids),
        contributions=contributions,
        shared=shared,
        steps=tuple(Step(id_, one.rows.taken, one.rows.kept, one.rows.dropped) for id_, one in held.artifacts.items()),
        licences=_licences(store, described, ids),
        config={name: _public(name, value) for name, value in run.config.items() if name not in _PLACES},
    )


def _described(written: Artifact, artifacts: Mapping[str, Artifact]) -> list[Artifact]:
    """The artifacts with `images` and `metadata` of what may be in the shards; the pool's first."""
    roles = sorted(role for role in written.inputs if role.startswith("images:"))
    of = [written.inputs[role]["stage"] for role in sorted(roles, key=lambda role: (role != "images:pool", role))]
    return [artifacts[id_] for id_ in of if id_ in artifacts]


def _rows(store: Store, files: Sequence[File], ids: pa.Array, columns: list[str], schema: pa.Schema) -> pa.Table:
    """The rows about these images, a file at a time."""
    found = [schema.empty_table().select(columns)]
    for file in files:
        table = store.table([file], columns, schema)
        found.append(table.filter(pc.is_in(table["image_id"], ids)))
    return pa.concat_tables(found)


def _extensions(store: Store, described: Sequence[Artifact], ids: pa.Array) -> dict[str, int]:
    """Shards take an image from the first set that has it; the same bytes are of the same format in every set."""
    columns = ["image_id", "format"]
    tables = [_rows(store, one.tables["images"], ids, columns, records.IMAGES) for one in described]
    if not tables:
        return {}
    each = pa.concat_tables(tables).group_by("image_id").aggregate([("format", "min")])
    counts: dict[str, int] = {}
    for row in each.group_by("format_min").aggregate([([], "count_all")]).to_pylist():
        extension = EXTENSIONS[row["format_min"]]
        counts[extension] = counts.get(extension, 0) + row["count_all"]
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _contributions(
    store: Store, artifacts: Mapping[str, Artifact], ids: pa.Array
) -> tuple[tuple[Contribution, ...], int]:
    selected = artifacts.get("retrieve/all")
    if selected is None:
        return (), 0
    rows = _rows(store, selected.tables["selected"], ids, ["image_id", "set", "mode"], records.SELECTED)
    sets = rows.group_by("image_id").aggregate([([], "count_all")])
    shared = int(pc.sum(pc.greater(sets["count_all"], 1)).as_py() or 0)
    counted = rows.group_by(["set", "mode"]).aggregate([([], "count_all")])
    found = []
    for row in sorted(counted.to_pylist(), key=lambda row: (row["set"], row["mode"])):
        own, asked = artifacts.get(f"ingest/{row['set']}"), artifacts.get(f"retrieve/{row['set']}")
        hits = (
            None
            if asked is None or row["mode"] in ("as_is", BY_HAND)
            else read_as(RetrieveDetails, asked.details).retrieved
        )
        kept = None if own is None else own.rows.kept
        if own is None and asked is not None:
            kept = read_as(RetrieveDetails, asked.details).queries
        found.append(Contribution(row["set"], row["mode"], row["count_all"], kept, hits))
    return tuple(found), shared


def _licences(store: Store, described: Sequence[Artifact], ids: pa.Array) -> Licences:
    files = [file for one in described for file in one.tables.get("metadata", ())]
    rows = _rows(store, files, ids, ["image_id", "licence"], records.METADATA)
    text = pc.utf8_trim_whitespace(rows["licence"])
    told = pa.table({"image_id": rows["image_id"], "licence": text}).filter(pc.fill_null(pc.not_equal(text, ""), False))
    pairs = told.group_by(["image_id", "licence"]).aggregate([])
    by_image = pairs.group_by("image_id").aggregate([([], "count_all")])
    counted = [
        (r["licence"], r["count_all"]) for r in pairs.group_by("licence").aggregate([([], "count_all")]).to_pylist()
    ]
    counted.sort(key=lambda entry: (-entry[1], entry[0]))
    shown, rest = counted[:LICENCES_SHOWN], counted[LICENCES_SHOWN:]
    return Licences(
        counts=tuple((_short(licence), count) for licence, count in shown),
        others=(len(rest), sum(count for _, count in rest)),
        silent=len(ids) - by_image.num_rows,
        several=int(pc.sum(pc.greater(by_image["count_all"], 1)).as_py() or 0),
    )


def _short(text: str) -> str:
    text = without_secrets(text)
    return text if len(text) <= LICENCE_LENGTH else f"{text[: LICENCE_LENGTH - 1]}…"


def _public(name: str, value: Any) -> Any:
    """A value of the configuration without credentials, and without the folders that local files lie in."""
    if isinstance(value, dict):
        return {key: _public(key, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_public(name, entry) for entry in value]
    if not isinstance(value, str):
        return value
    local = value.removeprefix("file://")
    if local.startswith("/"):
        return f"…/{local.rstrip('/').rpartition('/')[2]}"
    return without_secrets(f"{name}={value}").partition("=")[2]
