"""What the sources hold by their headers, and which images of it a limit draws: those with the smallest hashes.

Headers are read in Beam's workers and kept in the store; what comes back to the driver is one hash.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.sources.containers import container_of
from lodeset.pipeline.sources.listing import SourceFile, check_state
from lodeset.pipeline.sources.members import Member, is_image
from lodeset.pipeline.sources.slices import chosen_members, loose_members, members_of
from lodeset.pipeline.specs import IngestRuntime, IngestSpec

# Raised when a file's members are listed in another way; ingest's own VERSION, which says what is made of them, with it.
VERSION = 4
LISTING, DRAW = "ingest_listing", "ingest_draw"
_HASH_BYTES = 16
_MEMBERS = pa.schema(
    [
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Draw:
    """Which images are read: those whose hash is at most `last`, with their sidecars (empty: every file).

    Under a draw, what is known to be no image before it is decoded (links, sidecars alone, damaged ranges) is left out.
    """

    last: bytes = b""

    def holds(self, file: SourceFile, member: Member) -> bool:
        return not self.last or (is_image(member) and _hash(file, member) <= self.last)


def listing_key(file: SourceFile) -> str:
    """The key of the part that says what a file holds."""
    return digest(LISTING, VERSION, file.uri, file.size_bytes, file.state, file.image)


def members(store: Store, file: SourceFile) -> list[Member]:
    """What a file that is no loose one holds, sidecars put to their images; from the part that the first reader committed."""
    container = container_of(file.kind)
    if container is not None and container.elsewhere:
        # What a list names changes without the list, so each run looks again.
        return chosen_members(file, members_of(file))
    key = listing_key(file)
    part = store.part(LISTING, key)
    if part is not None:
        found = []
        for batch in store.table([part.files["members"]]).to_batches():
            found += [Member(*row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)]
    else:
        started = time.perf_counter()
        found = members_of(file)
        columns = ([getattr(m, name) for m in found] for name in _MEMBERS.names)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, _MEMBERS.types, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=_MEMBERS)
        check_state(file.uri, file.state, file.size_bytes)
        store.commit_part(LISTING, key, {"members": table}, {"members": len(found)}, time.perf_counter() - started)
    return chosen_members(file, found)


def drawn(
    context: Context[IngestSpec, IngestRuntime],
    packed: Sequence[SourceFile],
    loose: Sequence[SourceFile],
    limit: int | None,
) -> Draw:
    """The `limit` images with the smallest hashes, by the sources' headers alone."""
    if limit is None:
        return Draw()
    import apache_beam as beam

    from lodeset.pipeline.engines.beam import attempted, pipeline, raise_failures

    store = context.store
    key = digest(DRAW, VERSION, context.fingerprint, context.stage.set)
    if store.part(DRAW, key) is None:
        alone = _smallest([_hash(f, m) for f, m in loose_members(loose) if is_image(m)], limit + 1)
        with pipeline(context.cpus, context.runtime.beam) as p:
            files = p | "files" >> beam.Create(packed)
            inside, unlisted = attempted(files, "list", _smallest_of, store, limit + 1)
            both = (inside, p | "loose" >> beam.Create([alone])) | "all" >> beam.Flatten()
            smallest = both | beam.CombineGlobally(_smallest, limit + 1)
            _, unwritten = attempted(smallest, "keep", _commit, store, key, limit)
            raise_failures(unlisted, unwritten)
    part = store.part(DRAW, key)
    assert part is not None, "the pipeline above ended without an error"
    return Draw(store.table([part.files["last"]])["last"][0].as_py())


def _hash(file: SourceFile, member: Member) -> bytes:
    """SHA-256 of what tells one image of the set from all others; of places only what is below the source's root."""
    told = f"{file.relative}\n{file.namesakes}\n{member.name}\n{member.offset}"
    return hashlib.sha256(told.encode()).digest()[:_HASH_BYTES]


def _smallest_of(file: SourceFile, store: Store, count: int) -> Iterator[bytes]:
    yield _smallest([_hash(file, m) for m in members(store, file) if is_image(m)], count)


def _smallest(blocks: Iterable[bytes], count: int) -> bytes:
    """The smallest hashes of these blocks of hashes, sorted, as one block."""
    hashes = np.frombuffer(b"".join(blocks), f"S{_HASH_BYTES}")
    return np.sort(hashes)[:count].tobytes()


def _commit(smallest: bytes, store: Store, key: str, limit: int) -> None:
    end = limit * _HASH_BYTES
    last = smallest[end - _HASH_BYTES : end] if len(smallest) > end else b""
    store.commit_part(DRAW, key, {"last": pa.table({"last": pa.array([last], pa.binary())})})
