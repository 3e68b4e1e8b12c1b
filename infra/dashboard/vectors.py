"""The vectors of a run, to find the images that are most similar to one: mapped from a file, so they take no memory of their own.

An image that the run does not have is embedded in a process of its own, which is started when it is first needed.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.decoding import Worker, opened
from lodeset.infra.looking.neighbors import embedder_of, vector_of
from lodeset.infra.session import Opened
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.engines.processes import step
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.vectors import read_vectors

PIECE = 65_536  # vectors that are compared at once
LOAD_CPU_S, LOAD_S = 120.0, 25.0  # to load an embedder and embed one image
WAIT_S = 8.0
MEMORY_BYTES = 6 * 2**30  # of the process that embeds
MOST_PIXELS = 50_000_000  # of an uploaded image

Floats = NDArray[np.float32]


class Vectors:
    """The vectors of all sets that the pool's embedder embedded. Threads may share it."""

    def __init__(self, data: Data) -> None:
        store = data.store
        sets = {id_: one for id_, one in data.inspected.held.artifacts.items() if one.stage == "embed"}
        if "embed/pool" not in sets:
            raise LodesetError("this run has embedded no image, so none can be compared")
        rows: list[NDArray[np.int32]] = []
        self.width = 0
        # Gone from the folder at once; the map holds it as long as it is used.
        with tempfile.TemporaryFile(prefix="lodeset-vectors-") as mapped:
            for id_, artifact in sorted(sets.items(), key=lambda one: one[0] != "embed/pool"):
                for file in artifact.tables["vectors"]:
                    ids, matrix = read_vectors(store, [file])
                    if not ids or (self.width and matrix.shape[1] != self.width):
                        continue  # of another embedder
                    self.width = matrix.shape[1]
                    mapped.write(np.ascontiguousarray(matrix).tobytes())
                    rows.append(data.rows_in(ids, id_.partition("/")[2]))
            mapped.flush()
            self.rows = np.concatenate(rows) if rows else np.zeros(0, np.int32)
            shape = (len(self.rows), max(1, self.width))
            self._matrix = np.memmap(mapped, np.float16, "r", shape=shape) if rows else np.zeros(shape, np.float16)

    def of_row(self, row: int) -> Floats | None:
        """The vector of a row of `inspected`; None where it has none."""
        at = np.flatnonzero(self.rows == row)
        return np.asarray(self._matrix[at[0]], np.float32) if len(at) else None

    def nearest(self, query: Floats, count: int, without: range = range(0)) -> list[tuple[int, float]]:
        """The rows of `inspected` that are most similar to a vector, with their cosines, the most similar first.

        Args:
            without: rows to leave out.
        """
        if len(query) != self.width:
            raise LodesetError(
                f"the image has a vector of {len(query)} numbers, and those of this run have {self.width}: the embedder has changed"
            )
        best_rows, best = np.zeros(0, np.int32), np.zeros(0, np.float32)
        for start in range(0, len(self.rows), PIECE):
            similarity = np.asarray(self._matrix[start : start + PIECE], np.float32) @ query
            here = self.rows[start : start + PIECE]
            similarity[(here < 0) | ((here >= without.start) & (here < without.stop))] = -np.inf
            most = np.argpartition(-similarity, min(count, len(similarity) - 1))[:count]
            best_rows, best = np.r_[best_rows, here[most]], np.r_[best, similarity[most]]
        order = np.lexsort((best_rows, -best))[:count]
        return [(int(best_rows[n]), float(best[n])) for n in order if np.isfinite(best[n])]


class NotYetError(LodesetError):
    """The vectors are still being read."""


def vectors_of(data: Data, wait_s: float = WAIT_S) -> Vectors:
    """The vectors of a run. The first question for them copies them into a file, which takes a minute for millions.

    Raises:
        NotYetError: that is not done yet.
        LodesetError: this run has none.
    """
    building = _building(data)
    try:
        return building.result(wait_s)
    except TimeoutError as error:
        if building.done() and building.exception() is error:  # of the reading itself
            raise
        raise NotYetError("the vectors of this run are being read, which is done once: ask again in a moment") from None
    finally:
        if building.done() and building.exception() is not None:  # told now, and tried again when asked again
            with _STARTING:
                if data.kept.get(_KEPT) is building:
                    del data.kept[_KEPT]


def _building(data: Data) -> Future[Vectors]:
    with _STARTING:
        if _KEPT not in data.kept:
            data.kept[_KEPT] = _READER.submit(Vectors, data)
        found: Future[Vectors] = data.kept[_KEPT]
        return found


_KEPT = "vectors"
_STARTING = threading.Lock()
_READER = ThreadPoolExecutor(1, "lodeset-vectors")


# -- new images


@functools.cache
def _embedding() -> Worker:
    return Worker(MEMORY_BYTES)


def embedded(site_opened: Opened, data: Data, picture: bytes) -> Floats:
    """The vector of an image that the run does not have.

    Raises:
        LodesetError: it is no image, or there is no embedder for it.
    """
    config, dictionary = embedder_of(site_opened, data.inspected.held.artifacts)
    limit = min(MOST_PIXELS, site_opened.config.ingest.max_pixels)
    found = _embedding().run(_embed, config, dictionary, data.store, picture, limit)[0]
    return np.frombuffer(found, np.float32)


def _embed(config: Any, dictionary: File | None, store: Store, picture: bytes, max_pixels: int) -> Iterator[bytes]:
    image = opened(picture, max_pixels)
    step(1, LOAD_CPU_S, LOAD_S)
    key = f"{config!r} {dictionary!r}"
    if key not in _LOADED:
        from lodeset.pipeline.embedders.make import load

        _LOADED.clear()
        _LOADED[key] = load(config, dictionary, store, threads=1)
    yield vector_of(_LOADED[key], image).tobytes()


_LOADED: dict[str, Any] = {}  # in the worker: the embedder of the image before
