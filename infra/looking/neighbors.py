"""The pool images that are most similar to an image, by the vectors of the last finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from lodeset.infra.looking.looking import held
from lodeset.infra.looking.lookup import meant, one_of
from lodeset.infra.session import Opened
from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.embedders import Embed
from lodeset.pipeline.embedders.config import PrecomputedEmbedder
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.vectors import normalised, read_vectors

SCHEMA = pa.schema([("image_id", pa.string()), ("similarity", pa.float32())])


def neighbors(opened: Opened, image: Any, k: int) -> pa.Table:
    """image_id and cosine similarity of the k pool images nearest to an image, most similar first, then by id.

    The vectors are read a file at a time, so the memory that this takes does not grow with the pool.

    Raises:
        LodesetError: no run has embedded the pool, the image cannot be read, or k is below 1.
    """
    if k < 1:
        raise LodesetError(f"k = {k}: ask for at least one neighbor")
    artifacts = held(opened).artifacts
    embedded = artifacts.get("embed/pool")
    if embedded is None:
        raise LodesetError(f"no finished run of {opened.path} has embedded the pool: `lodeset run` first")
    image_id, query = _query(opened, artifacts, image)
    ids: list[str] = []
    similarity = np.zeros(0, np.float32)
    for file in embedded.tables["vectors"]:
        found, matrix = read_vectors(opened.store, [file])
        ids += found
        similarity = np.concatenate([similarity, matrix.astype(np.float32) @ query])
        best = sorted(range(len(ids)), key=lambda row: (-similarity[row], ids[row]))[: k + 1]
        ids, similarity = [ids[row] for row in best], similarity[best]
    rows = [row for row in range(len(ids)) if ids[row] != image_id][:k]
    return pa.table([[ids[row] for row in rows], similarity[rows]], schema=SCHEMA)


def _query(opened: Opened, artifacts: Mapping[str, Artifact], image: Any) -> tuple[str | None, NDArray[np.float32]]:
    """The image_id, where the run knows it, and its vector [D]."""
    if isinstance(image, Image.Image):
        return None, _embedded(opened, artifacts, image.convert("RGB"))
    asked = str(image)
    known = meant(opened.store, artifacts, asked, [Path.cwd(), opened.path.resolve().parent])
    if known.ids:
        image_id = one_of(known.ids, asked)
        vector = _stored(opened.store, artifacts, image_id)
        if vector is None:
            raise LodesetError(f"{image_id} has no vector in the last run: `lodeset trace` says what became of it")
        return image_id, vector
    try:
        data = Path(asked).read_bytes()
        picture = decode(data, opened.config.ingest.max_pixels)
    except OSError:
        raise LodesetError(f"{shown(asked)} is neither an image of the last run nor a file that can be read") from None
    except Unreadable as error:
        raise LodesetError(f"{shown(asked)} cannot be read as an image ({error.reason})") from None
    return None, _embedded(opened, artifacts, picture)


def _stored(store: Store, artifacts: Mapping[str, Artifact], image_id: str) -> NDArray[np.float32] | None:
    for artifact in artifacts.values():
        if artifact.stage != "embed":
            continue
        for file in artifact.tables["vectors"]:
            if image_id in store.table([file], ["image_id"])["image_id"].to_pylist():
                ids, matrix = read_vectors(store, [file])
                return np.asarray(matrix[ids.index(image_id)], np.float32)
    return None


def _embedded(opened: Opened, artifacts: Mapping[str, Artifact], image: Image.Image) -> NDArray[np.float32]:
    from lodeset.pipeline.embedders.make import load

    config, dictionary = embedder_of(opened, artifacts)
    return vector_of(load(config, dictionary, opened.store, threads=1), image)


def embedder_of(opened: Opened, artifacts: Mapping[str, Artifact]) -> tuple[Any, File | None]:
    """The configuration of the pool's embedder and the dictionary that was fitted for it, to load it with.

    Raises:
        LodesetError: no embedder can be loaded.
    """
    if not opened.stages:
        why = opened.missing[0] if opened.missing else "its sources are not there"
        raise LodesetError(f"a new image cannot be embedded: {why}; an image that the run has needs no embedder")
    config = opened.stages["embed/pool"].runtime.embedder
    if isinstance(config, PrecomputedEmbedder):
        raise LodesetError(
            "the vectors of this data set are precomputed, so a new image cannot be embedded: name an image that the run has"
        )
    fitted = artifacts.get("fit_embedder/pool")
    return config, fitted.tables["dictionary"][0] if fitted is not None else None


def vector_of(embed: Embed, image: Image.Image) -> NDArray[np.float32]:
    """The vector of an image as the pool's are stored, [D]."""
    return np.asarray(normalised(embed([image]))[0], np.float32)
