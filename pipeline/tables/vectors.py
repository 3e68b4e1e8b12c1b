"""Vectors and the table that holds them: N images, D dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables import records


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float16]:
    """L2-normalised in fp16; a zero vector stays zero (it is similar to nothing)."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities become NaN, and are counted
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        odd = ~((length > 1e-12) & (length < np.inf))
        if not odd.any():
            return np.asarray(vectors / length, dtype=np.float16)
        # Squares that float32 cannot hold: a huge vector would become zeros, and a tiny one would stay tiny.
        wide = vectors.astype(np.float64)
        exact = np.linalg.norm(wide, axis=-1, keepdims=True)
        wide /= np.where(exact > 0, exact, 1.0)
        return np.asarray(np.where(odd, wide, vectors / np.where(odd, 1.0, length)), dtype=np.float16)


def vector_table(ids: Sequence[str], vectors: NDArray[np.float16]) -> pa.Table:
    """`vectors` rows: image_id, fixed-size list of D 16-bit numbers."""
    dimensions = vectors.shape[1]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), dimensions)
    return pa.Table.from_arrays([pa.array(ids, pa.string()), lists], schema=records.vectors(dimensions))


def read_vectors(store: Store, files: Sequence[File]) -> tuple[list[str], NDArray[np.float16]]:
    """image_ids and vectors [N, D] of `vectors` files, in their order.

    Raises:
        LodesetError: files of different widths (two embedders in one set).
    """
    ids: list[str] = []
    blocks: list[NDArray[np.float16]] = []
    for file in files:
        if not file.rows:
            continue
        table = store.table([file])
        lists = table["vector"].combine_chunks()
        blocks.append(lists.flatten().to_numpy().reshape(table.num_rows, -1))
        ids += table["image_id"].to_pylist()
    widths = sorted({b.shape[1] for b in blocks})
    if len(widths) > 1:
        raise LodesetError(f"vectors of widths {widths} in one set: one embedder gives one width")
    return ids, np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float16)
