"""The images that dedup compares: the filtered pool, every reference set, every included set. One node an image_id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.images.blank import LOW_INFORMATION
from lodeset.pipeline.algorithms.images.decoding import THUMBNAIL_SIDE
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.tables import records


@dataclass(frozen=True)
class Members:
    """One set's files, and which part it plays: `pool`, `reference` or `included`."""

    set: str
    role: str
    images: tuple[File, ...]
    vectors: tuple[File, ...]
    masked: tuple[File, ...] = ()


@dataclass(frozen=True)
class Universe:
    """N nodes in the order of their image_ids, so that nothing depends on the order of parts.

    An image in several sets is one node with several roles.
    """

    ids: tuple[str, ...]
    pool: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    included: NDArray[np.bool_]
    area: NDArray[np.int64]
    side: NDArray[np.int64]  # the shorter one, in pixels
    phash: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]  # [N, 1024]
    flat: NDArray[np.bool_]
    set_names: Mapping[str, tuple[str, ...]]  # image_id -> reference and included sets that hold it


def members_of(inputs: Mapping[str, Artifact], roles: Mapping[str, str]) -> list[Members]:
    """The inputs of dedup (`images:<set>`, `vectors:<set>`, `masked`) as sets; `roles` maps a set to its role."""
    return [
        Members(
            name,
            role,
            inputs[f"images:{name}"].tables["images"],
            inputs[f"vectors:{name}"].tables["vectors"],
            inputs["masked"].tables["filtered"] if role == "pool" else (),
        )
        for name, role in roles.items()
    ]


def gather(store: Store, sets: Sequence[Members]) -> Universe:
    """Everything but the vectors, in memory: 32-byte ids, 8-byte numbers and 1 KiB thumbnails."""
    rows: dict[str, tuple[int, int, int, bytes]] = {}
    holders: dict[str, list[str]] = {}
    in_role: dict[str, set[str]] = {"pool": set(), "reference": set(), "included": set()}
    for one in sets:
        masked = set(store.table(one.masked, ["image_id"], records.FILTERED)["image_id"].to_pylist())
        with_vector = set(store.table(one.vectors, ["image_id"], records.vectors(1))["image_id"].to_pylist())
        table = store.table(one.images, ["image_id", "width", "height", "phash", "thumbnail"], records.IMAGES)
        columns = (table[name].to_pylist() for name in table.column_names)
        for image_id, width, height, phash, thumbnail in zip(*columns, strict=True):
            if image_id in masked or image_id not in with_vector:
                continue
            rows[image_id] = (width, height, phash, thumbnail)
            in_role[one.role].add(image_id)
            if one.role != "pool":
                holders.setdefault(image_id, []).append(one.set)
    ids = tuple(sorted(rows))
    thumbnails = np.zeros((len(ids), 1024), np.uint8)
    for row, image_id in enumerate(ids):
        thumbnails[row] = np.frombuffer(rows[image_id][3], np.uint8)
    flag = {role: np.fromiter((i in found for i in ids), bool, len(ids)) for role, found in in_role.items()}
    return Universe(
        ids=ids,
        pool=flag["pool"],
        reference=flag["reference"],
        included=flag["included"],
        area=np.fromiter((rows[i][0] * rows[i][1] for i in ids), np.int64, len(ids)),
        side=np.fromiter((min(rows[i][:2]) for i in ids), np.int64, len(ids)),
        phash=np.fromiter((rows[i][2] for i in ids), np.uint64, len(ids)),
        thumbnails=thumbnails,
        flat=thumbnails.std(axis=1) < LOW_INFORMATION,
        set_names={i: tuple(sorted(names)) for i, names in holders.items()},
    )


def thumbnails_of(store: Store, files: Sequence[File], ids: Sequence[str | None]) -> NDArray[np.uint8]:
    """The thumbnails [N, 1024] of these images, in their order, from files of `images`; for a worker that needs no more."""
    row_of = {image_id: row for row, image_id in enumerate(ids)}
    out = np.zeros((len(ids), THUMBNAIL_SIDE**2), np.uint8)
    for file in files:
        table = store.table([file], ["image_id", "thumbnail"])
        for image_id, thumbnail in zip(table["image_id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True):
            if image_id in row_of:
                out[row_of[image_id]] = np.frombuffer(thumbnail, np.uint8)
    return out
