"""Mark what lodeset made, so that it is never read as a source: its images would come back as new ones.

A folder's mark is a file `.lodeset` in it, which is copied or moved with the folder; a page's mark is in its head. A
store is also recognized without its mark, by its contents.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from lodeset.pipeline.errors import LodesetError

MARK = ".lodeset"
PAGE = '<meta name="generator" content="lodeset">'
_PAGE_BYTES = 2_048
# A folder that lodeset made: a store, a sample world, the output of a training or pruning run, a model. A `shared`
# folder existed before a store was put into it: the store's own folders are lodeset's, the others are not.
Kind = Literal["store", "shared", "demo", "run", "model"]
FOLDERS = (
    "artifacts",
    "parts",
    "claims",
    "shards",
    "training",
    "pruned",
    "logs",
    "forgotten",
    "runs",
    "reports",
    "cards",
    "damaged",
    "submissions",
    "accepted",
    "attempts",
    "collected",
    "gates",
    "lists",
    "rejects",
)
# Files next to the shards of a run, wherever they were copied to.
_SHARDS = ("index.parquet", "tombstones.parquet", "changes.parquet")
# Folders of every store that has finished a stage.
_SIGNS = ("artifacts/ingest", "parts/ingest")
_TEXT = "{kind}\nlodeset made this folder and never reads it as a source of images. Delete this file if it should.\n"


def text(kind: Kind) -> bytes:
    return _TEXT.format(kind=kind).encode()


def store_kind(names: Iterable[str]) -> Kind:
    """The kind of a store's folder, by the names in it."""
    others = [name for name in names if not name.startswith(".") and name not in FOLDERS]
    return "shared" if any(not name.endswith(".json") for name in others) else "store"


def mark(folder: Path, kind: Kind, filled: bool = False) -> None:
    """Create a folder with its mark. A folder that already contains other things is left unmarked, because not all of
    it is lodeset's, unless lodeset `filled` it.

    Raises:
        LodesetError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            if filled or not any(folder.iterdir()):
                with (folder / MARK).open("xb") as file:
                    file.write(text(kind))
    except OSError as error:
        raise LodesetError(f"{folder} cannot be written: {error.strerror or error}") from error


def kind_of(folder: str) -> str:
    """The kind of folder that lodeset made here, or "" if it did not make it."""
    try:
        with open(posixpath.join(folder, MARK), "rb") as file:
            return _first_line(file.readline(100))
    except OSError:
        if all(os.path.isdir(posixpath.join(folder, sign)) for sign in _SIGNS):
            return store_kind(path.name for path in Path(folder).iterdir())
        if all(Path(folder, name).is_file() for name in _SHARDS):
            return "store"
    return ""


def _first_line(data: bytes) -> str:
    return data.split(b"\n", 1)[0].decode("utf-8", "replace").strip()


def remote_kind(fs: object, folder: str) -> str:
    """The same for a folder on another file system, by its mark alone."""
    try:
        return _first_line(fs.cat_file(f"{folder}/{MARK}"))  # type: ignore[attr-defined]  # any fsspec file system
    except Exception:  # missing, or not accessible (a bucket's parent): drivers raise arbitrary errors
        return ""


def is_page(path: str) -> bool:
    """Whether a local file is a page that lodeset wrote."""
    if not path.lower().endswith((".html", ".htm")):
        return False
    try:
        with open(path, "rb") as file:
            return PAGE.encode() in file.read(_PAGE_BYTES)
    except OSError:
        return False


def within(folder: str, below: str = "", kind: Callable[[str], str] = kind_of) -> str:
    """The folder that makes this folder (or the name `below` in it) lodeset's own, or "". All parent folders are
    checked.

    Inside a demo's folder, the images of the sample world may still be named one by one.
    """
    folder = folder.rstrip("/")
    while folder:
        role = kind(folder)
        if role == "shared" and below in FOLDERS:
            return f"{folder}/{below}"
        if role in ("store", "run", "model") or (role == "demo" and not below):
            return folder
        folder, _, below = folder.rpartition("/")
    return ""


def skipped_in(folder: str, entries: Iterable[str], kind: Callable[[str], str] = kind_of) -> set[str]:
    """The names in a folder to be read that belong to lodeset: the folders of a shared store."""
    return {name for name in entries if name in FOLDERS} if kind(folder) == "shared" else set()


def folders_among(paths: Iterable[str], kind: Callable[[str], str]) -> set[str]:
    """The folders that belong to lodeset, from a complete listing of the files below them."""
    owned: set[str] = set()
    listed = set(paths)
    signs: dict[str, set[str]] = {}
    for path in listed:
        folder, _, name = path.rpartition("/")
        if name == MARK:
            owned |= _own_of(folder, kind(folder))
        for sign in _SIGNS:
            at = f"/{path}".find(f"/{sign}/")
            if at > 0:
                signs.setdefault(path[: at - 1], set()).add(sign)
    for index in listed:
        folder, _, name = index.rpartition("/")
        if name == _SHARDS[0] and all(f"{folder}/{other}" in listed for other in _SHARDS):
            owned.add(folder)
    for folder, seen in signs.items():
        if len(seen) == len(_SIGNS):
            owned |= _own_of(folder, "shared")
    return owned


def _own_of(folder: str, kind: str) -> set[str]:
    if kind == "shared":
        return {f"{folder}/{name}" for name in FOLDERS}
    return {folder} if kind else set()
