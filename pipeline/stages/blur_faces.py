"""blur_faces (Ray Data): the pool's `images`, `locations`, `metadata` -> the same with faces blurred.

An image with a face becomes a new one, with an id of its own and `derived_from`; its bytes lie in a tar of the store. From
here on the pool holds the new image in the place of the old, so no later stage knows the difference, and the bytes of the
old one are not read again. Images without a face stay what they are, where they are.

Like ingest, this stage names the digests of the images and of their metadata: what lies downstream depends on these. It runs
again when data moved, because it lists where everything lies, and then reads no image.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import EXTENSIONS, Limits, decode, examine
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.filters.config import Faces
from lodeset.pipeline.filters.faces import Boxes, blurred, detector
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.specs import BlurFacesRuntime, BlurFacesSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.images import image_ids, places_of
from lodeset.pipeline.tables.tar_writing import TAR_RECORD, add_member, open_tar

VERSION = BlurFacesSpec.VERSION
STAGE, LISTED = "blur_faces", "blur_faces_listed"


@dataclass(frozen=True)
class Work:
    store: Store
    config: Faces
    max_pixels: int


@dataclass(frozen=True)
class Piece:
    """One ingest part to look at."""

    key: str
    images: File
    locations: File


def run(context: Context[BlurFacesSpec, BlurFacesRuntime]) -> Outcome:
    store, ingested = context.store, context.inputs["images"]
    pairs = list(zip(ingested.tables["images"], ingested.tables["locations"], strict=True))
    keys = [digest(STAGE, VERSION, image_ids(store, images), context.spec.detector) for images, _ in pairs]
    work = [(key, Piece(key, *pair), pair[0].rows) for key, pair in zip(keys, pairs, strict=True)]
    worker = functools.partial(_worker, Work(store, context.runtime.faces, context.runtime.max_pixels))
    run_parts = functools.partial(map_with_state, worker, cpus=context.cpus, address=context.ray_address)
    parts, new = made(context, STAGE, work, run_parts)

    found = store.table([p.files["faces"] for p in parts], None, records.FACES)
    renamed = dict(zip(found["derived_from"].to_pylist(), found["image_id"].to_pylist(), strict=True))
    tables = _listed(store, ingested, parts, renamed)
    taken, kept = ingested.rows.kept, sum(f.rows for f in tables["images"])
    return Outcome(
        tables={
            **{name: tuple(files) for name, files in tables.items()},
            "faces": tuple(p.files["faces"] for p in parts if p.files["faces"].rows),
            "blurred_images": tuple(p.files["images"] for p in parts if p.files["images"].rows),
        },
        # Two files of the same pixels and different bytes become one image.
        rows=Rows(taken, kept, {"exact_duplicate": taken - kept} if taken > kept else {}),
        content={name: digest(told, sorted(renamed.items())) for name, told in ingested.content.items()},
        details={
            "parts": len(parts),
            "parts_made": len(new),
            "images_read": sum(p.counts["images"] for p in parts if p.key in new),
            "images_blurred": len(renamed),
            "faces": sum(p.counts["faces"] for p in parts),
        },
    )


def _worker(work: Work) -> Callable[[Piece], Part]:
    """Called once in each worker; loads the detector."""
    return functools.partial(_blur_part, work, detector(work.config, threads=1))


def _blur_part(work: Work, detect: Callable[[Image.Image], Boxes], piece: Piece) -> Part:
    started, store = time.perf_counter(), work.store
    about = {row["image_id"]: row for row in store.table([piece.images]).to_pylist()}
    places = places_of(store, piece.images, piece.locations)
    columns = ("image_id", "uri", "member", "offset", "size_bytes")
    wanted = [Location(**{name: row[name] for name in columns}) for row in places.to_pylist()]
    payloads: dict[str, tuple[str, bytes]] = {}
    images, locations, faces, boxed = [], [], [], 0
    for place, data in read_images(wanted):
        image = decode(data, work.max_pixels)
        boxes = detect(image)
        changed = blurred(image, boxes, work.config.expand) if len(boxes) else None
        if changed is None:
            continue
        row = about[place.image_id]
        payload = _encoded(changed, row["format"])
        seen = examine(payload, Limits(max_pixels=work.max_pixels))
        boxed += len(boxes)
        faces.append({"image_id": seen.image_id, "derived_from": place.image_id, "faces": len(boxes)})
        if seen.image_id not in payloads:  # the same pixels in two files
            payloads[seen.image_id] = (f"{seen.image_id}.{EXTENSIONS[seen.format]}", payload)
            told = {"set": row["set"], "size_bytes": len(payload), "derived_from": place.image_id}
            images.append({**asdict(seen), **told})
    files = {}
    if payloads:
        # Not of one attempt alone: where bytes lie decides the order of shards, which must not depend on attempts.
        relative = f"parts/{STAGE}/{piece.key}/blurred.tar"
        with store.writing(relative) as sink, open_tar(sink) as tar:
            for row in images:
                member, payload = payloads[row["image_id"]]
                where = {"uri": "", "member": member, "offset": tar.offset + TAR_RECORD}  # the store may move
                locations.append({**{name: row[name] for name in ("set", "image_id", "size_bytes")}, **where})
                add_member(tar, member, payload)
        files["blurred"] = File(relative, len(images), sink.size_bytes, sink.sha256())
    tables = {
        "images": pa.Table.from_pylist(images, schema=records.IMAGES),
        "locations": pa.Table.from_pylist(locations, schema=records.LOCATIONS),
        "faces": pa.Table.from_pylist(faces, schema=records.FACES),
    }
    counts = {"images": len(wanted), "faces": boxed}
    return store.commit_part(STAGE, piece.key, tables, counts, time.perf_counter() - started, files=files)


def _encoded(image: Image.Image, source_format: str) -> bytes:
    """JPEG for what was JPEG (with little further loss), PNG for all else."""
    buffer = io.BytesIO()
    if source_format in ("JPEG", "MPO"):
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


# -- the pool as later stages see it


def _listed(
    store: Store, ingested: Artifact, parts: Sequence[Part], renamed: Mapping[str, str]
) -> dict[str, list[File]]:
    """Ingest's tables, part by part, with each blurred image in the place of its original."""
    listed: dict[str, list[File]] = {"images": [], "locations": [], "blurred_locations": []}
    owned: set[str] = set()
    for n, part in enumerate(parts):
        new = {"images": store.table([part.files["images"]]), "locations": _located(store, part)}
        if new["locations"].num_rows:
            listed["blurred_locations"].append(_commit(store, "blurred_locations", [part.key], new["locations"]))
        again = pc.is_in(new["images"]["image_id"], pa.array(sorted(owned), pa.string()))
        new["images"] = new["images"].filter(pc.invert(again))
        owned |= set(new["images"]["image_id"].to_pylist())
        for name, table in new.items():
            listed[name].append(_replaced(store, name, ingested.tables[name][n], renamed, table))
    listed["metadata"] = [
        _replaced(store, "metadata", file, renamed, None) for file in ingested.tables.get("metadata", ())
    ]
    return listed


def _replaced(store: Store, name: str, file: File, renamed: Mapping[str, str], new: pa.Table | None) -> File:
    """One file of a table less the rows of blurred images, and with the `new` ones; metadata (no `new`) under the new ids.
    The same file where nothing changes."""
    table = store.table([file])
    gone = pc.is_in(table["image_id"], pa.array(list(renamed), pa.string()))
    own = sorted(set(table["image_id"].filter(gone).to_pylist()))
    added = [] if new is None else new["image_id"].to_pylist()
    if not own and not added:
        return file
    if new is None:
        ids = pa.array([renamed.get(i, i) for i in table["image_id"].to_pylist()], pa.string())
        changed = table.set_column(table.schema.get_field_index("image_id"), "image_id", ids)
    else:
        changed = pa.concat_tables([table.filter(pc.invert(gone)), new])
    return _commit(store, name, [file.sha256, *([i, renamed[i]] for i in own), added], changed)


def _located(store: Store, part: Part) -> pa.Table:
    """Where the blurred images of a part lie in this store."""
    table = store.table([part.files["locations"]])
    uri = store.full_url(part.files["blurred"].path) if table.num_rows else ""
    column = pa.array([uri] * table.num_rows, pa.string())
    return table.set_column(table.schema.get_field_index("uri"), "uri", column)


def _commit(store: Store, name: str, of: Sequence[object], table: pa.Table) -> File:
    """A part that holds one table; it is of this place of the store alone."""
    key = digest(LISTED, VERSION, name, store.url, list(of))
    done = store.part(LISTED, key) or store.commit_part(LISTED, key, {name: table})
    return done.files[name]
