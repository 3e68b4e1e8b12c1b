"""Tars whose bytes depend on nothing but their members."""

from __future__ import annotations

import io
import tarfile
from typing import IO, cast

from lodeset.pipeline.dag.files import HashingFile

TAR_RECORD = 512


def open_tar(sink: HashingFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=cast(IO[bytes], sink), mode="w|", format=tarfile.USTAR_FORMAT, bufsize=2**20)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member whose header holds nothing but name, size and fixed values."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
    tar.addfile(entry, io.BytesIO(data))
