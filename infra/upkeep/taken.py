"""Find the images of a take-down in everything that a store holds, not only in what is finished today."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.dag.store import Part, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables import records


def resolved(store: Store, request: str) -> set[str]:
    text = request.lower()
    if len(text) == ID_HEX_DIGITS and all(c in "0123456789abcdef" for c in text):
        return {text}
    matches = {
        image_id
        for table in tables(store, "metadata", ("image_id", "url"))
        for image_id in table["image_id"].filter(pc.equal(table["url"], request)).to_pylist()
    }
    if not matches:
        raise LodesetError(
            f"{request} is neither an image_id ({ID_HEX_DIGITS} hex digits) nor the URL of an image in {store.url}"
        )
    # If only a copy was dropped, the picture still exists, and its JSON contains that URL.
    return matches | kept_for(store, matches)


def kept_for(store: Store, ids: set[str]) -> set[str]:
    """The images that were ever kept instead of these."""
    kept: set[str] = set()
    for table in tables(store, "duplicates", ("image_id", "reason", "matched_id")):
        of_these = pc.and_(is_in(table["image_id"], ids), pc.is_in(table["reason"], pa.array(["near", "included"])))
        kept.update(table["matched_id"].filter(of_these).to_pylist())
    return kept - {None} - ids


def selected_for(store: Store, ids: set[str]) -> set[str]:
    """The images that were ever selected because these looked like them."""
    chosen: set[str] = set()
    for table in tables(store, "selected", ("image_id", "query_id")):
        chosen.update(table["image_id"].filter(is_in(table["query_id"], ids)).to_pylist())
    return chosen - ids


def with_derived(store: Store, ids: set[str]) -> set[str]:
    """Add the images that these were made from, or that were made from them (blurred faces, removed locations)."""
    pairs = [
        (made, of)
        for name in ("faces", "images")
        for table in tables(store, name, ("image_id", "derived_from"))
        for made, of in zip(table["image_id"].to_pylist(), table["derived_from"].to_pylist(), strict=True)
        if of is not None
    ]
    while True:
        more = {image_id for pair in pairs if not ids.isdisjoint(pair) for image_id in pair} - ids
        if not more:
            return ids
        ids = ids | more


def copies_of(store: Store, ids: set[str]) -> set[str]:
    """Other images in the groups of these, according to the last run of dedup."""
    files = [file for artifact in store.history("dedup", "pool")[:1] for file in artifact.tables["duplicates"]]
    table = store.table(files, ["image_id", "group_id"], records.DUPLICATES)
    groups = table["group_id"].filter(is_in(table["image_id"], ids)).to_pylist()
    return set(table["image_id"].filter(is_in(table["group_id"], groups)).to_pylist()) - ids


def every_part(store: Store) -> Iterator[tuple[str, Part]]:
    for stage in store.names("parts"):
        for key in store.names(f"parts/{stage}"):
            part = store.part(stage, key)
            if part is not None:
                yield stage, part


def tables(store: Store, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The tables of this name of every part."""
    for _, part in every_part(store):
        if name in part.files:
            yield store.table([part.files[name]], columns)


def is_in(column: pa.ChunkedArray, ids: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(ids), pa.string()))
