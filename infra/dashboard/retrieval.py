"""What queries found in the pool, and what became of it. Files are read with filters, a few row groups at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.remembered import remembered
from lodeset.pipeline.dag.store import Artifact, File
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables import records

_HITS = pa.schema([records.MATCHES.field(name) for name in ("query_id", "image_id", "similarity")])

State = Literal["taken", "collision", "given away", "listed", "not selected"]


@dataclass(frozen=True)
class Hit:
    """An image that a query found.

    Attributes:
        rank: 1 for the most similar one.
        state: taken; a collision with a query of the same set that is more similar (`by` names it); given away to another
            set (`by`); listed by hand; or not selected, because dedup or a filter has dropped it since.
    """

    image_id: str
    rank: int
    similarity: float | None
    state: State
    by: str = ""


def sets(data: Data) -> dict[str, Artifact]:
    """What curated sets asked of the pool, by set; the balanced draw, which asks without queries, as `pool`."""
    made = data.inspected.held.artifacts
    found = {
        artifact.set: artifact for artifact in made.values() if artifact.stage == "retrieve" and artifact.set != "all"
    }
    balanced = made.get("balance/pool")
    return found | ({"pool": balanced} if balanced is not None else {})


def artifact_of(data: Data, name: str) -> Artifact:
    """Raises LodesetError: no set of this name asks anything of the pool."""
    known = sets(data)
    if name not in known:
        raise LodesetError(f"no curated set is called {name[:80]}; there are: {', '.join(known) or 'none'}")
    return known[name]


def queries(data: Data, name: str, start: int, size: int) -> tuple[list[str], int]:
    """Some query images of a set by image_id, and how many there are in all."""
    if name in data.sets and name != "pool":
        total = data.rows("SELECT count(*) AS n FROM inspected WHERE set = ? AND x IS NOT NULL", [name])[0]["n"]
        rows = data.rows(
            "SELECT image_id FROM inspected WHERE set = ? AND x IS NOT NULL ORDER BY image_id LIMIT ? OFFSET ?",
            [name, size, start],
        )
        return [row["image_id"] for row in rows], total
    ids = _asking(data, name)  # images of the pool, named by a list
    return ids[start : start + size], len(ids)


@remembered(16)
def _asking(data: Data, name: str) -> list[str]:
    found = set[str]()
    for file in artifact_of(data, name).tables["matches"]:
        table = pq.read_table(data.path_of(file), columns=["query_id"], read_dictionary=["query_id"])
        found |= set(pc.unique(table["query_id"]).to_pylist())
    return sorted(one for one in found if one is not None)


@remembered(16)
def _ranges(data: Data, name: str) -> list[tuple[File, str, str]]:
    """The files with the hits of a set, and the first and last query in each; a search writes its queries in order."""
    found = []
    for file in artifact_of(data, name).tables["matches"]:
        metadata = pq.read_metadata(data.path_of(file))
        column = metadata.schema.names.index("query_id")
        kept = [metadata.row_group(n).column(column).statistics for n in range(metadata.num_row_groups)]
        known = [one for one in kept if one is not None and one.has_min_max]
        if len(known) == len(kept) and known:
            found.append((file, min(str(one.min) for one in known), max(str(one.max) for one in known)))
        elif file.rows:
            found.append((file, "", "g"))  # after all hexadecimal digits
    return found


def hits(data: Data, name: str, query_ids: Sequence[str], most: int) -> dict[str, tuple[int, list[Hit]]]:
    """For each query, how many images it found, and at most `most` of them, the most similar first."""
    tables = [_HITS.empty_table()]
    for file, first, last in _ranges(data, name):
        wanted = [one for one in query_ids if first <= one <= last]
        if wanted:
            filters = [("query_id", "in", wanted)]
            tables.append(pq.read_table(data.path_of(file), schema=_HITS, columns=_HITS.names, filters=filters))
    table = pa.concat_tables(tables)
    order = [("query_id", "ascending"), ("similarity", "descending"), ("image_id", "ascending")]
    table = table.sort_by(order)
    counts = {one["values"]: one["counts"] for one in pc.value_counts(table["query_id"]).to_pylist()}
    rows: dict[str, list[dict[str, Any]]] = {}
    start = 0
    for query_id, count in counts.items():  # in the order of the table
        rows[query_id] = table.slice(start, min(count, most)).to_pylist()
        start += count
    taken = _selected(data, sorted({row["image_id"] for some in rows.values() for row in some}))
    found: dict[str, tuple[int, list[Hit]]] = {}
    for query_id in query_ids:
        shown = []
        for rank, row in enumerate(rows.get(query_id, ()), start=1):
            state, by = _state(name, query_id, taken.get(row["image_id"], {}))
            shown.append(Hit(row["image_id"], rank, row["similarity"], state, by))
        found[query_id] = counts.get(query_id, 0), shown
    return found


def _selected(data: Data, ids: Sequence[str]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The rows of `selected` of these images, by image and set."""
    together = data.artifact("retrieve/all")
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for file in together.tables["selected"] if together is not None and ids else ():
        columns = ["image_id", "set", "mode", "query_id"]
        table = pq.read_table(data.path_of(file), columns=columns, filters=[("image_id", "in", list(ids))])
        for row in table.to_pylist():
            found.setdefault(row["image_id"], {})[row["set"]] = row
    return found


def _state(name: str, query_id: str, taken: Mapping[str, Mapping[str, Any]]) -> tuple[State, str]:
    own = taken.get(name)
    if own is None:
        return ("given away", next(iter(taken))) if taken else ("not selected", "")
    if own["mode"] in ("as_is", "by_hand"):
        return "listed", ""
    return ("taken", "") if own["query_id"] == query_id else ("collision", str(own["query_id"]))


def shared(data: Data) -> list[tuple[tuple[str, str], int]]:
    """How many images two sets select both, for every two sets that share any."""
    rows = data.rows(
        """
        WITH several AS (SELECT row, unnest(selected_for) AS name FROM inspected WHERE len(selected_for) > 1)
        SELECT a.name AS one, b.name AS other, count(*) AS n FROM several a JOIN several b ON a.row = b.row AND a.name < b.name
        GROUP BY ALL ORDER BY n DESC, one, other
        """
    )
    return [((row["one"], row["other"]), row["n"]) for row in rows]


def similarities(data: Data, name: str, bins: int) -> list[tuple[float, float, int]]:
    """How similar the images that a set selects are to their queries: the number between two values, from the least on."""
    rows = data.query(
        "SELECT query_similarity AS s FROM inspected WHERE list_contains(selected_for, ?) AND query_similarity IS NOT NULL",
        [name],
    )
    values = rows["s"]
    if not len(values):
        return []
    low, high = float(pc.min(values).as_py()), float(pc.max(values).as_py())
    width = (high - low) / bins or 1.0
    place = pc.min_element_wise(pc.floor(pc.divide(pc.subtract(values.cast(pa.float64()), low), width)), bins - 1)
    counts = {int(one["values"]): one["counts"] for one in pc.value_counts(place).to_pylist()}
    return [(low + n * width, low + (n + 1) * width, counts.get(n, 0)) for n in range(bins if high > low else 1)]
