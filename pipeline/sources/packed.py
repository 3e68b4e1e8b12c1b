"""Files that hold others, where an image should be: named for what they are, by their first bytes."""

from __future__ import annotations

HEAD_BYTES = 512  # what it takes to tell

_STARTS = (
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip-compressed file"),
    (b"BZh", "a bzip2-compressed file"),
    (b"\xfd7zXZ\0", "an xz-compressed file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard-compressed file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array"),
)
_TAR = b"ustar"  # in the header of the first member
_TAR_AT = 257


def packed_as(data: bytes) -> str:
    """What a file holds others as, and what to do; "" for what may be an image."""
    what = next((what for start, what in _STARTS if data.startswith(start)), "")
    if what:
        return f"{what}: unpack it to a folder or a plain .tar"
    if data.startswith(b"PK\x03\x04"):
        return "a zip archive within another, or without .zip at the end of its name: unpack or rename it"
    if data[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        return "a tar archive within another, or without .tar at the end of its name: unpack or rename it"
    if data.startswith(b"PAR1"):
        return "a Parquet file within an archive, or without .parquet at the end of its name: unpack or rename it"
    return ""
