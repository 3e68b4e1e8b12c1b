"""A source read whole, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.sources.members import Sample
from lodeset.pipeline.sources.reading import read_slice
from lodeset.pipeline.sources.slices import Slice, chosen_members, cut, members_of, split_loose
from lodeset.pipeline.stages.ingest.run import ingest_slice


def pieces(path: Path) -> list[Slice]:
    files = expand([Source(uri=str(path))], "pool")
    out: list[Slice] = []
    for f in files:
        if f.kind != "loose":
            members = members_of(f)
            out += cut(f, chosen_members(f, members), 10**6)
    return out + split_loose([f for f in files if f.kind == "loose"], 10**6)


def read(path: Path) -> list[Sample]:
    return [sample for piece in pieces(path) for sample in read_slice(piece, 10**6)]


def rejects(path: Path) -> list[dict[str, Any]]:
    """Of a source in one slice; every table must hold what it is given."""
    (piece,) = pieces(path)
    tables, counts = ingest_slice("pool", piece, Ingest())
    for table in tables.values():
        table.validate(full=True)
    assert counts["files"] == tables["locations"].num_rows + tables["rejects"].num_rows
    return tables["rejects"].select(["member", "reason", "detail"]).to_pylist()
