"""image_ids -> small pictures as data URIs, read from their sources."""

from __future__ import annotations

import base64
import io
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import without_secrets
from lodeset.pipeline.sources.reading import Location, read_images

SIDE = 112  # pixels of the longer side
QUALITY = 80
PLACES = 3  # maximum number of locations of an image that are tried and named


@dataclass(frozen=True)
class Place:
    """One location of an image: its set, the place of its bytes, and two names short enough to print."""

    set: str
    location: Location

    @property
    def name(self) -> str:
        return short_name(self.location.uri, self.location.member)

    @property
    def file(self) -> str:
        return posixpath.basename(self.location.member or public(self.location.uri))


@dataclass(frozen=True)
class Picture:
    """An image as the page shows it: a data URI, or the reason why there is none (`missing`)."""

    image_id: str
    uri: str = ""
    missing: str = ""
    width: int = 0
    height: int = 0
    sets: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()


def public(uri: str) -> str:
    """A URI without secrets: user and password, and the query with its signatures."""
    return re.sub(r"(://)[^/@]*@", r"\1", without_secrets(uri)).split("?", 1)[0] if "://" in uri else uri


def short_name(uri: str, member: str) -> str:
    """The last part of a path, or the member inside a file."""
    file = posixpath.basename(public(uri).rstrip("/"))
    return f"{member} in {file}" if member else file


# Stage -> its tables of images and of their locations.
_LOCATED = {"ingest": ("images", "locations"), "blur_faces": ("blurred_images", "blurred_locations")}


def load(store: Store, artifacts: Mapping[str, Artifact], ids: Sequence[str], max_pixels: int) -> dict[str, Picture]:
    """A picture for each image_id. An image that can no longer be read has no URI but a reason; no error is raised."""
    places, sizes = _found(store, artifacts, ids)
    uris, missing = _read(places, max_pixels)
    return {
        image_id: Picture(
            image_id,
            uris.get(image_id, ""),
            missing.get(image_id, "" if image_id in uris else "no ingested set contains it"),
            *sizes.get(image_id, (0, 0)),
            sets=tuple(sorted({place.set for place in places.get(image_id, ())})),
            places=tuple(places.get(image_id, ())),
        )
        for image_id in ids
    }


def _found(
    store: Store, artifacts: Mapping[str, Artifact], ids: Sequence[str]
) -> tuple[dict[str, list[Place]], dict[str, tuple[int, int]]]:
    """The locations of the images (at most PLACES in each set) and their width and height, in one pass over the
    tables.
    """
    wanted = pa.array(sorted(set(ids)), pa.string())
    places: dict[str, list[Place]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for artifact in artifacts.values():
        if artifact.stage not in _LOCATED:
            continue
        images, locations = _LOCATED[artifact.stage]
        counts: dict[str, int] = {}
        for file in artifact.tables[locations]:
            table = store.table([file], ["image_id", "uri", "member", "offset", "size_bytes"])
            for row in table.filter(pc.is_in(table["image_id"], wanted)).to_pylist():
                image_id = row["image_id"]
                counts[image_id] = counts.get(image_id, 0) + 1
                if counts[image_id] <= PLACES:
                    places.setdefault(image_id, []).append(Place(artifact.set, Location(**row)))
        for file in artifact.tables[images]:
            table = store.table([file], ["image_id", "width", "height"])
            for row in table.filter(pc.is_in(table["image_id"], wanted)).to_pylist():
                sizes[row["image_id"]] = (row["width"], row["height"])
    return places, sizes


def _read(places: Mapping[str, Sequence[Place]], max_pixels: int) -> tuple[dict[str, str], dict[str, str]]:
    """Data URIs and reasons by image_id; if one location fails, the image's next location is tried."""
    uris: dict[str, str] = {}
    missing: dict[str, str] = {}
    for attempt in range(PLACES):
        tried = [
            held[attempt].location for image_id, held in places.items() if attempt < len(held) and image_id not in uris
        ]
        queue = sorted(tried, key=lambda place: (place.uri, place.offset, place.member))
        while queue:
            done = 0
            try:
                for place, data in read_images(queue):
                    done += 1
                    try:
                        uris[place.image_id] = data_uri(decode(data, max_pixels))
                    except Unreadable as error:
                        missing[place.image_id] = f"{error.reason}: {error.detail}"
            except LodesetError as error:
                # A generator that has raised is exhausted: continue after the location where it stopped.
                failed = queue[done]
                missing[failed.image_id] = str(error).replace(failed.uri, short_name(failed.uri, ""))
                done += 1
            queue = queue[done:]
    return uris, {image_id: reason for image_id, reason in missing.items() if image_id not in uris}


def data_uri(image: Image.Image) -> str:
    """An RGB image as a JPEG of at most SIDE pixels per side; smaller images keep their pixels."""
    # reduce() first: a box filter to about twice the final size loses nothing that a 112-pixel picture could show.
    shrink = max(image.size) // (2 * SIDE)
    small = image.reduce(shrink) if shrink > 1 else image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def png_uri(data: bytes) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
