"""Long lists of manifests, in pieces that artifacts share.

The artifact of a grown pool lists nearly what the one before it listed. Written in full each time, such lists grow with the square
of the number of runs. Here a long list is cut where the digest of a row says so, which makes equal stretches of two lists equal
pieces, wherever rows were added or removed. Pieces are files named after their bytes, `lists/<sha256>.json`; a list of many pieces
is itself cut into pieces. So a run writes what has changed, and a few pieces above it.

Content-defined chunking, as in LBFS (Muthitacharoen, Chen, Mazieres 2001), on rows instead of bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

SHORT = 64  # rows of a list that stays in its manifest
PIECE = 64  # rows of a piece, on average
LONGEST = 16 * PIECE

Put = Callable[[str, bytes], None]  # the digest of a piece, and its bytes
Get = Callable[[str], bytes]


def packed(rows: Sequence[Any], put: Put) -> Any:
    """Rows (JSON) as a manifest holds them: as they are, or `{"pieces": [digest, ...], "depth": d}`, once the pieces are put."""
    if len(rows) <= SHORT:
        return list(rows)
    depth = 0
    while len(rows) > SHORT:
        rows, depth = [_piece(stretch, put) for stretch in _cut(rows)], depth + 1
    return {"pieces": list(rows), "depth": depth}


def unpacked(tree: Any, get: Get) -> list[Any]:
    """The rows of a list.

    Raises:
        ValueError: a piece is not what was written.
    """
    if isinstance(tree, list):
        return tree
    rows: list[Any] = tree["pieces"]
    for _ in range(tree["depth"]):
        rows = [row for digest in rows for row in _opened(digest, get(digest))]
    return rows


def pieces(tree: Any, get: Get) -> set[str]:
    """The digests of all pieces of a list."""
    if isinstance(tree, list):
        return set()
    rows: list[Any] = tree["pieces"]
    found = set(rows)
    for _ in range(tree["depth"] - 1):
        rows = [row for digest in rows for row in _opened(digest, get(digest))]
        found.update(rows)
    return found


def _cut(rows: Sequence[Any]) -> list[list[Any]]:
    stretches: list[list[Any]] = [[]]
    for row in rows:
        stretches[-1].append(row)
        ends = int.from_bytes(hashlib.sha256(_text(row)).digest()[:4], "big") % PIECE == 0
        if ends or len(stretches[-1]) == LONGEST:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _piece(rows: Sequence[Any], put: Put) -> str:
    data = _text(rows)
    digest = hashlib.sha256(data).hexdigest()
    put(digest, data)
    return digest


def _opened(digest: str, data: bytes) -> list[Any]:
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"a piece of its lists, {digest[:12]}, is not what was written")
    rows: list[Any] = json.loads(data)
    return rows


def _text(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
