"""Vectors that were made elsewhere: Parquet keyed by `image_id`, or by `uri` (and `member`)."""

from __future__ import annotations

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embedders.config import PrecomputedEmbedder
from pipeline.errors import LodesetError


def files_of(config: PrecomputedEmbedder) -> list[str]:
    """The Parquet files meant by `path`, sorted."""
    fs, path = fsspec.core.url_to_fs(config.path)
    if fs.isdir(path):
        path = f"{path.rstrip('/')}/**/*.parquet"
    found = sorted(str(p) for p in fs.glob(path))
    if not found:
        raise LodesetError(f"no precomputed vectors at {config.path}: give a Parquet file, a folder of them, or a glob")
    return found


def look_up(config: PrecomputedEmbedder, wanted: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors of the rows of `wanted` (image_id, uri, member) that have one -> (float32 [M, D], their row numbers [M]).

    Raises:
        LodesetError: no key column, or vectors of several widths.
    """
    files = files_of(config)
    connection = duckdb.connect()
    connection.execute(
        "SET threads = 1; SET autoinstall_known_extensions = false; SET autoload_known_extensions = false"
    )
    relation = connection.read_parquet(files)
    if config.column not in relation.columns:
        raise LodesetError(f"{config.path} has no column `{config.column}`; there are: {', '.join(relation.columns)}")
    if "image_id" in relation.columns:
        on = "v.image_id = w.image_id"
    elif "uri" in relation.columns:
        on = "v.uri = w.uri" + (" AND v.member = w.member" if "member" in relation.columns else "")
    else:
        raise LodesetError(
            f"{config.path} has neither a column `image_id` nor `uri`; there are: {', '.join(relation.columns)}"
        )
    rows = wanted.append_column("row", pa.array(np.arange(wanted.num_rows)))
    connection.register("w", rows)
    relation.create_view("v")
    found = connection.sql(
        f'SELECT w.row AS row, any_value(v."{config.column}") AS vector FROM w JOIN v ON {on} GROUP BY w.row ORDER BY w.row'
    ).to_arrow_table()
    if not found.num_rows:
        return np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    lists = found["vector"].combine_chunks()
    lengths = (
        set(np.diff(lists.offsets.to_numpy()).tolist())
        if pa.types.is_list(lists.type)
        else {getattr(lists.type, "list_size", 0)}
    )
    if len(lengths) != 1:
        raise LodesetError(f"{config.path}: vectors of several widths: {sorted(lengths)[:5]}")
    flat = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    return flat.reshape(found.num_rows, -1), found["row"].to_numpy()
