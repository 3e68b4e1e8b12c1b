"""The members of a zip archive by its central directory, and their bytes by the offsets of their local headers.

Python's `zipfile` holds the whole directory in memory, gives up all of it for one bad entry, and reads a member only by its entry.
Here the directory is walked entry by entry, one bad entry costs itself, and a local header is enough to read a member again.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lodeset.pipeline.sources.containers import Alive, Container, UnreadableMember
from lodeset.pipeline.sources.files import Bytes, escaped
from lodeset.pipeline.sources.listing import SourceFile
from lodeset.pipeline.sources.members import Member, bounded

_END, _END_64, _LOCATOR_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s4B4HL2L5H2L"), struct.Struct("<4s2H3HL2L2H")
_COMMENT_BYTES = 2**16  # the longest comment after the end record
_CHUNK = 2**16
_NAME = 4_096
_STORED, _DEFLATED = 0, 8
_METHODS = {1: "Shrink", 6: "Implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd"}
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_UNIX = 3
_FULL = 0xFFFFFFFF  # the 64-bit value lies in the extra field


@dataclass(frozen=True)
class _Directory:
    """Where the entries lie, how many there should be, and what lies before the archive (a self-extracting program)."""

    start: int
    end: int
    entries: int
    prefix: int


def zip_members(raw: Bytes, file: SourceFile) -> Iterator[Member]:
    """The members in the order of their bytes. What cannot be read comes with a reason, and where its entry lies as its offset.

    Raises:
        ValueError: there is no directory.
    """
    directory = _directory(raw)
    found: list[tuple[int, int, Member]] = []  # first byte, first byte behind it, member
    for place in bounded(_entries(raw, directory), lambda entry: entry[2], _refused_from):
        found.append(place)
    found.sort(key=lambda place: place[:2])
    behind = 0
    for start, end, member in found:
        if member.reason:
            yield member
        elif start < behind:
            # What makes archives of some kilobytes that unpack to terabytes: many entries with the same bytes.
            yield _refused(member, "its bytes belong to another entry, too")
        elif end > directory.start:
            yield _refused(member, f"{end - start} bytes from {start} on reach into the directory")
        else:
            behind = end
            yield Member(member.name, start, member.size_bytes)


def _refused(member: Member, detail: str) -> Member:
    return Member(member.name, member.offset, member.size_bytes, "unreadable_archive", detail)


def _refused_from(place: tuple[int, int, Member], detail: str) -> tuple[int, int, Member]:
    return (place[0], place[0], Member("", place[2].offset, 0, "unreadable_archive", detail))


def _directory(raw: Bytes) -> _Directory:
    if not raw.size_bytes:
        raise ValueError("0 bytes")
    tail = max(0, raw.size_bytes - _COMMENT_BYTES - _END.size)
    raw.seek(tail)
    data = raw.read()
    at = data.rfind(b"PK\x05\x06", 0, len(data) - _END.size + 4)
    if at < 0:
        raise ValueError("no central directory at its end: the file is cut off, or it is no zip archive")
    _, disk, first_disk, _, entries, size, offset, _ = _END.unpack_from(data, at)
    end = tail + at
    if 0xFFFF in (disk, entries) or _FULL in (size, offset):
        at_64 = end - _LOCATOR_64.size - _END_64.size
        if at_64 >= 0:
            raw.seek(at_64)
            head, locator = raw.read(_END_64.size), raw.read(_LOCATOR_64.size)
            if head[:4] == b"PK\x06\x06" and locator[:4] == b"PK\x06\x07":
                _, _, _, _, disk, first_disk, _, entries, size, offset = _END_64.unpack(head)
                end = at_64
    if disk or first_disk:
        raise ValueError("one piece of a split archive: join the pieces first")
    prefix = end - size - offset
    if prefix < 0:
        raise ValueError(f"a central directory of {size} bytes at byte {offset} does not fit before byte {end}")
    return _Directory(end - size, end, entries, prefix)


def _entries(raw: Bytes, directory: _Directory) -> Iterator[tuple[int, int, Member]]:
    """The first byte of each file in the directory, the first behind it, and the file; folders are left out."""
    at, seen = directory.start, 0
    raw.seek(at)
    while at < directory.end:
        header = raw.read(_ENTRY.size)
        if len(header) < _ENTRY.size or header[:4] != b"PK\x01\x02":
            yield at, at, Member("", at, 0, "unreadable_archive", f"no entry at byte {at} of the directory")
            return
        values = _ENTRY.unpack(header)
        system, flags, method, packed, size = values[2], values[5], values[6], values[10], values[11]
        name_bytes, extra_bytes, comment_bytes, attributes, offset = *values[12:15], values[17], values[18]
        name = _name(raw.read(name_bytes), flags)
        size, packed, offset = _wide(raw.read(extra_bytes), size, packed, offset)
        raw.read(comment_bytes)
        start = directory.prefix + offset
        refused = _why_not(name, name_bytes, system, flags, method, attributes, packed, size)
        if refused:
            yield start, start, Member(name[:_NAME], at, packed, *refused)
        elif not (name.endswith("/") and size == 0):
            # The offset is that of the entry, until the member's own is known to be no other's.
            yield start, start + _LOCAL.size + name_bytes + packed, Member(name, at, size)
        seen += 1
        at += _ENTRY.size + name_bytes + extra_bytes + comment_bytes
    if (seen - directory.entries) % 2**16:  # of more than 65,535 members, old tools wrote the remainder
        detail = f"the archive promises {directory.entries} members, and its directory holds {seen}"
        yield at, at, Member("", at, 0, "unreadable_archive", detail)


def _name(raw: bytes, flags: int) -> str:
    """UTF-8, if it is that or says so; otherwise the DOS code page of old. Backslashes part folders, as only Windows writes them."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = raw.decode("utf-8", "surrogateescape") if flags & _UTF8 else raw.decode("cp437")
    return escaped(name.partition("\0")[0].replace("\\", "/"))


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The sizes and the offset, with those that need 64 bits from the extra field; ones that it lacks stay as they are."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            held = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack(f"<{len(held) // 8}Q", held[: len(held) // 8 * 8]))
            size, packed, offset = (next(values, one) if one == _FULL else one for one in (size, packed, offset))
            break
        at += 4 + length
    return size, packed, offset


def _why_not(
    name: str, name_bytes: int, system: int, flags: int, method: int, attributes: int, packed: int, size: int
) -> tuple[str, str] | None:
    """(reason, detail) of an entry that is not read."""
    mode = attributes >> 16 if system == _UNIX else 0
    if not name or name_bytes > _NAME:
        return "unreadable_archive", f"a name of {name_bytes} bytes"
    if flags & _ENCRYPTED:
        return "unreadable_archive", "encrypted: unpack it with its password"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "not_a_file", f"zip entry of mode {stat.filemode(mode)}"
    if name.endswith("/") and size:
        return "not_a_file", f"a folder of {size} bytes"
    if method not in (_STORED, _DEFLATED):
        how = _METHODS.get(method, f"method {method}")
        return "unreadable_archive", f"compressed with {how}: pack it again with Deflate, or without compression"
    if method == _STORED and packed != size:
        return "unreadable_archive", f"stored as {packed} bytes, which are said to be {size}"
    return None


class Zip:
    """An opened zip archive."""

    def __init__(self, uri: str, alive: Alive = lambda: None) -> None:
        self._raw = Bytes(uri)

    def read(self, member: str, offset: int, size_bytes: int, first: int) -> bytes:
        start, flags, method, sum_ = self._local(offset)
        if method == _STORED:
            if start + size_bytes > self._raw.size_bytes:
                raise UnreadableMember("truncated", f"{size_bytes} bytes were promised")
            data, behind = self._raw.read_at(start, first), b""
        elif method == _DEFLATED:
            data, behind = self._inflated(start, size_bytes, first)
        else:
            raise UnreadableMember("unreadable_archive", f"method {method} in its local header")
        if first == size_bytes:
            self._compare(data, sum_ if not flags & _DESCRIPTOR else None, behind)
        return data

    def _local(self, offset: int) -> tuple[int, int, int, int]:
        """Of a local header: where the payload starts, flags, method, checksum."""
        if offset + _LOCAL.size > self._raw.size_bytes:
            raise UnreadableMember("truncated", f"its header at byte {offset} is cut off")
        header = self._raw.read_at(offset, _LOCAL.size)
        magic, _, flags, method, _, _, sum_, _, _, name_bytes, extra_bytes = _LOCAL.unpack(header)
        if magic != b"PK\x03\x04" or flags & _ENCRYPTED:
            why = "is encrypted" if magic == b"PK\x03\x04" else "does not begin as one"
            raise UnreadableMember("unreadable_archive", f"the local header at byte {offset} {why}")
        start = offset + _LOCAL.size + name_bytes + extra_bytes
        if start > self._raw.size_bytes:
            raise UnreadableMember("truncated", f"its header at byte {offset} is cut off")
        return start, flags, method, sum_

    def _inflated(self, start: int, size_bytes: int, first: int) -> tuple[bytes, bytes]:
        """The first bytes of a deflated payload, and (if these are all) what lies behind it. One byte more than was promised is never
        made."""
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        data = bytearray()
        most = first + (first == size_bytes)
        self._raw.seek(start)
        try:
            while len(data) < most and not inflate.eof:
                packed = inflate.unconsumed_tail or self._raw.read(_CHUNK)
                if not packed:
                    break
                data += inflate.decompress(packed, most - len(data))
        except zlib.error as error:
            raise UnreadableMember("corrupt", f"{error} after {len(data)} of {size_bytes} bytes") from None
        if len(data) < first:
            raise UnreadableMember("truncated", f"{size_bytes} bytes were promised, {len(data)} are there")
        if len(data) > size_bytes:
            raise UnreadableMember("corrupt", f"more than the {size_bytes} bytes that the directory promises")
        return bytes(data), inflate.unused_data

    def _compare(self, data: bytes, promised: int | None, behind: bytes) -> None:
        """Looks whether these are the bytes that were packed. Without a sum in the header, it lies in a descriptor behind the payload."""
        found = zlib.crc32(data)
        if promised is None:
            after = (behind + self._raw.read(8 - min(8, len(behind))))[:8]
            sums = (after[4:8] if after.startswith(b"PK\x07\x08") else after[:4], after[:4])
            if len(after) < 8 or found in (int.from_bytes(one, "little") for one in sums):
                return
        elif found == promised:
            return
        raise UnreadableMember("corrupt", "its checksum (CRC-32) differs from that of what was packed")

    def close(self) -> None:
        self._raw.close()


ZIP = Container(kind="zip", suffixes=(".zip",), members=zip_members, opened=Zip)
