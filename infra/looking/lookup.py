"""Find the image that an id, the beginning of one, a path, a URL, or a picture file stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.infra.looking.trace import IMAGES, LOCATIONS
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS, image_id
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.forgotten import FOLDER, asked_digest, forgotten

SHORTEST = 4  # minimum number of digits of an abbreviated id
SHOWN = 5  # number of candidates that messages list
_HEX = re.compile(rf"[0-9a-f]{{{SHORTEST},{ID_HEX_DIGITS}}}")


@dataclass(frozen=True)
class Meant:
    """Images of a run, and rejected files, that a text may stand for; `read` is the id of the current content of the
    file of that name.
    """

    ids: tuple[str, ...]
    rejects: tuple[Mapping[str, Any], ...] = ()
    read: str | None = None


def meant(
    store: Store, artifacts: Mapping[str, Artifact], asked: str, folders: Sequence[Path], files: bool = True
) -> Meant:
    """The images of a run's sets, or of past take-downs, that `asked` stands for.

    Args:
        folders: folders that relative paths may start from.
        files: whether `asked` may also be a file of this machine, whose bytes say which image it is.
    """
    text = asked.lower()
    if _HEX.fullmatch(text):
        ids = _beginning(store, artifacts, text)
        if ids or len(text) == ID_HEX_DIGITS:
            return Meant(tuple(ids))
    read = _of_file(asked, folders) if files else None
    spellings = tuple(dict.fromkeys([asked, *(str((folder / asked).resolve()) for folder in folders)]))
    ids, rejects = _at(store, artifacts, asked, spellings)
    if not ids and not rejects and read is not None:
        ids = _beginning(store, artifacts, read)
    ids += [image_id for image_id in _forgotten_as(store, asked) if image_id not in ids]
    return Meant(tuple(dict.fromkeys(ids)), tuple(rejects), read)


def one_of(candidates: Sequence[str], asked: str) -> str:
    """The only image; raises ConfigError if there are several."""
    if len(candidates) > 1:
        examples = ", ".join(candidates[:SHOWN]) + (", ..." if len(candidates) > SHOWN else "")
        raise ConfigError(f"{shown(asked)} stands for {len(candidates):,} images: give one of their ids ({examples})")
    return candidates[0]


def _tables(
    store: Store, artifacts: Mapping[str, Artifact], names: Sequence[str], columns: list[str]
) -> Iterator[pa.Table]:
    for artifact in artifacts.values():
        for name in names:
            for file in artifact.tables.get(name, ()):
                if file.rows:
                    yield store.table([file], columns)


def _beginning(store: Store, artifacts: Mapping[str, Artifact], prefix: str) -> list[str]:
    matches: set[str] = {image_id for image_id in forgotten(store) if image_id.startswith(prefix)}
    for table in _tables(store, artifacts, IMAGES, ["image_id"]):
        matches |= set(table["image_id"].filter(pc.starts_with(table["image_id"], prefix)).to_pylist())
    return sorted(matches)


def _of_file(asked: str, folders: Sequence[Path]) -> str | None:
    """The id of a file's current bytes."""
    for path in (Path(asked), *(folder / asked for folder in folders)):
        try:
            if path.is_file():
                return image_id(path.read_bytes())
        except (OSError, ValueError):
            continue
    return None


def _at(
    store: Store, artifacts: Mapping[str, Artifact], asked: str, spellings: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Images at a path, given in full or by its end, or with this URL; and rejected files there."""
    ids: list[str] = []
    for table in _tables(store, artifacts, ("metadata",), ["image_id", "url"]):
        ids += table["image_id"].filter(pc.equal(table["url"], asked)).to_pylist()
    if not ids:
        for table in _tables(store, artifacts, LOCATIONS, ["image_id", "uri", "member"]):
            ids += table["image_id"].filter(_lies(table, spellings)).to_pylist()
    rejects: list[dict[str, Any]] = []
    for id_, artifact in artifacts.items():
        for file in artifact.tables.get("rejects", ()) if artifact.stage == "ingest" else ():
            table = store.table([file])
            rejects += [
                {"stage": id_, "table": "rejects", **row} for row in table.filter(_lies(table, spellings)).to_pylist()
            ]
    return sorted(set(ids)), rejects


def _lies(table: pa.Table, spellings: Sequence[str]) -> pa.ChunkedArray:
    """Rows whose location has one of these spellings: the file, the member, the end of either, or both joined as in
    messages.
    """
    uri, member = table["uri"], pc.fill_null(table["member"], "")
    joined: list[Callable[[], pa.ChunkedArray]] = [
        lambda: uri,
        lambda: member,
        *(lambda by=by: pc.binary_join_element_wise(uri, member, by) for by in (" ", "#", "/", "::")),
    ]
    hit = pa.chunked_array([pa.repeat(False, table.num_rows)])
    for place in (make() for make in joined):
        for text in spellings:
            hit = pc.or_(hit, pc.or_(pc.equal(place, text), pc.ends_with(place, "/" + text.lstrip("./"))))
    return pc.fill_null(hit, False)


def _forgotten_as(store: Store, asked: str) -> list[str]:
    """Images that were forgotten at this request."""
    matches = []
    for gone in sorted(forgotten(store)):
        if asked_digest(asked) in takedown_of(store, gone).get("asked_sha256", ()):
            matches.append(gone)
    return matches


def takedown_of(store: Store, forgotten_id: str) -> dict[str, Any]:
    """What a store keeps of a take-down."""
    return store.read_json(f"{FOLDER}/{forgotten_id}.json") or {}
