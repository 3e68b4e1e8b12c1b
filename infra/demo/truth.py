"""The truth about a sample world, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lodeset.pipeline.errors import LodesetError

UNFINISHED = ".unfinished"  # in a folder whose world is being made


@dataclass(frozen=True)
class NearGroup:
    """Pool images made from one another: the source comes first, `kinds` says how each of the others was made."""

    ids: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """The truth about a sample world; images are identified by image_id (32 hex digits).

    Attributes:
        images: number of readable image files in the pool, including exact duplicates but not tiny ones.
        files: number of pool files with the name of an image: readable, tiny and broken.
        seed: the seed of the world.
        concepts: the content of each distinct pool image, including tiny ones.
        near: groups of near-duplicates; no other two pool images are copies of each other.
        exact_duplicates: files whose bytes occur in the pool a second time.
        rejects: files that cannot be decoded safely, by kind.
        tiny: images of 8 x 8 pixels, valid but useless.
        repeated_names: members of a tar with the name of an earlier member; both are different images.
        leaked: pool images that are copies of reference images, and how each was made.
        curated: the concepts of each curated set.
    """

    images: int
    files: int
    seed: int
    concepts: Mapping[str, str]
    near: tuple[NearGroup, ...]
    exact_duplicates: int
    rejects: Mapping[str, int]
    tiny: tuple[str, ...]
    repeated_names: int
    leaked: Mapping[str, str]
    curated: Mapping[str, tuple[str, ...]]


def is_made(folder: Path) -> bool:
    """Whether the folder contains a finished sample world."""
    return os.access(folder / "truth.json", os.R_OK) and not os.access(folder / UNFINISHED, os.F_OK)


def load_truth(folder: Path) -> Truth:
    """Read the truth about the sample world in `folder`.

    Raises:
        LodesetError: there is no finished sample world.
    """
    if not is_made(folder):
        raise LodesetError(f"no finished sample world in {folder}: `lodeset demo` with a new folder makes one")
    raw = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    near = tuple(NearGroup(tuple(group["ids"]), tuple(group["kinds"])) for group in raw.pop("near"))
    curated = {name: tuple(shown) for name, shown in raw.pop("curated").items()}
    return Truth(near=near, curated=curated, tiny=tuple(raw.pop("tiny")), **raw)
