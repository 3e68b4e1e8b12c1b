"""Which files a source means, before any is opened."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec

from pipeline.config import Source
from pipeline.errors import LodesetError

Kind = Literal["tar", "parquet", "loose"]

_KINDS: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet"}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class SourceFile:
    """A file as a listing shows it.

    Attributes:
        root: the folder that `relative` starts from; moving the folder changes this and nothing else.
        state: entity tag, or modification time: changes when the content does.
        image: the Parquet column of images.
    """

    root: str
    relative: str
    kind: Kind
    size_bytes: int
    state: str
    image: str = ""

    @property
    def uri(self) -> str:
        return f"{self.root}/{self.relative}"


def _state(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return str(info[key])
    return ""


def _kind(path: str) -> Kind:
    return _KINDS.get(posixpath.splitext(path.lower())[1], "loose")


def _has_surrogates(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def expand(sources: Sequence[Source], what: str) -> list[SourceFile]:
    """Every file of these sources, in the order of the configuration, then by path.

    Raises:
        LodesetError: a source matches nothing, a folder is empty, or a tar is compressed; `what` names the set.
    """
    files: list[SourceFile] = []
    for source in sources:
        found = _expand_one(source, what)
        if not found:
            raise LodesetError(f"{what}: {source.uri} holds no files: give a folder of images, a .tar or a .parquet")
        files.extend(found)
    seen: set[str] = set()
    return [f for f in files if not (f.uri in seen or seen.add(f.uri))]  # type: ignore[func-returns-value]  # add() in passing


def _expand_one(source: Source, what: str) -> list[SourceFile]:
    try:
        fs, path = fsspec.core.url_to_fs(source.uri)
    except (ValueError, ImportError) as error:
        raise LodesetError(f"{what}: {source.uri} cannot be opened: {error}") from error
    path = path.rstrip("/") or "/"
    try:
        roots = sorted(fs.glob(path)) if fsspec.core.has_magic(path) and not fs.exists(path) else [path]
        infos = []
        for root in roots:
            info = fs.info(root)
            if info["type"] == "directory":
                inside = fs.find(root, detail=True)
                infos += [(root, posixpath.relpath(name, root), inside[name]) for name in sorted(inside)]
            else:
                infos.append((posixpath.dirname(root), posixpath.basename(root), info))
    except FileNotFoundError:
        roots = []
    except (PermissionError, NotADirectoryError) as error:
        raise LodesetError(f"{what}: {source.uri} cannot be listed: {error}") from error
    if not roots:
        raise LodesetError(
            f"{what}: nothing is at {source.uri}: check the path (relative paths start from the configuration file)"
        )
    files = []
    for root, relative, info in infos:
        if any(piece.startswith(".") for piece in relative.split("/")) or info["type"] != "file":
            continue
        if relative.lower().endswith(_PACKED):
            raise LodesetError(
                f"{what}: {root}/{relative} is compressed, so its members cannot be read by range: unpack it to a plain .tar first"
            )
        if not relative.isprintable() and _has_surrogates(relative):
            shown = relative.encode("utf-8", "surrogateescape")
            raise LodesetError(f"{what}: the name {shown!r} in {root} is not UTF-8: rename the file, or leave it out")
        kind = _kind(relative)
        image = source.image if kind == "parquet" else ""
        plain_root = str(fs.unstrip_protocol(root)) if "://" in source.uri else root
        files.append(
            SourceFile(plain_root.rstrip("/"), relative, kind, int(info.get("size") or 0), _state(info), image)
        )
    return files
