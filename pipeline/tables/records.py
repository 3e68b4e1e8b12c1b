"""The Arrow schema and primary key of every table.

| table | primary key | made by |
| --- | --- | --- |
| images | image_id within a set | ingest |
| locations | set, uri, member, offset | ingest |
| metadata | image_id, source | ingest |
| rejects | set, uri, member, offset | ingest |
| faces | derived_from | blur_faces, beside `images`, `locations` and `metadata` of the pool that it leaves |
| vectors | image_id | embed |
| scores | image_id, filter | score |
| filtered | image_id | filter |
| edges | image_id_a < image_id_b | dedup |
| duplicates | image_id | dedup |
| leaks | set, image_id, pool_image_id | dedup |
| generations | image_id | dedup; one file a generation, for the run after it |
| measured | image_id_a, image_id_b, view | dedup; likewise |
| clusters | image_id | cluster |
| matches | image_id, set, query_id | retrieve, one artifact a curated set; balance |
| selected | image_id, set | retrieve, `all` |
| shards | image_id | write_shards (`index.parquet`) |
| tombstones | image_id | write_shards (`tombstones.parquet`) |
| changes | image_id | write_shards (`changes.parquet`) |
| copies | image_id, copy_id | write_shards (`copies.parquet`) |
| pictures | set, image_id | evaluate |
"""

from __future__ import annotations

import pyarrow as pa

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("set", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("size_bytes", pa.int64()),
        ("phash", pa.uint64()),
        ("thumbnail", pa.binary()),  # 32 x 32 luminance, row by row
        ("derived_from", pa.string()),
        # Of samples of more than 8 bits: which became black and white, and how that was found. Null: 8 bits.
        ("sample_range", pa.string()),
        (
            "truncated",
            pa.float32(),
        ),  # of a file that lacks its end: the share of its pixels that is missing. Null: whole
        ("located", pa.bool_()),  # whether its bytes, which nothing changes, say where it was taken (GPS)
        # For choosing among copies (`algorithms.images.quality`).
        ("detail", pa.float32()),
        ("sharpness", pa.float32()),
        ("quality", pa.float32()),
    ]
)

# `offset` is where the payload starts in `uri`; in Parquet, `offset` is the row group and `member` is "<column>/<row>".
LOCATIONS = pa.schema(
    [
        ("set", pa.string()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("image_id", pa.string()),
        ("size_bytes", pa.int64()),
    ]
)

# `source` is where in the set the metadata was said; `extra` holds as JSON whatever has no column of its own.
METADATA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("extra", pa.string()),
    ]
)

REJECTS = pa.schema(
    [
        ("set", pa.string()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


# An image with blurred faces and the image that it was; `faces` is how many.
FACES = pa.schema([("image_id", pa.string()), ("derived_from", pa.string()), ("faces", pa.int32())])


def vectors(dimensions: int) -> pa.Schema:
    """L2-normalised vectors of D numbers in 16 bits."""
    return pa.schema([("image_id", pa.string()), ("vector", pa.list_(pa.float16(), dimensions))])


# `filter` is the reason that the filter would drop an image for.
SCORES = pa.schema([("image_id", pa.string()), ("filter", pa.string()), ("score", pa.float32())])

# What was measured against what; null where an address is blocked.
FILTERED = pa.schema(
    [("image_id", pa.string()), ("reason", pa.string()), ("score", pa.float64()), ("threshold", pa.float64())]
)

# `verified` is null where pixels were not compared; `transform` turns a into b ("identity", "mirror", "turn_90", ...: mirrored
# first, then turned counterclockwise).
EDGES = pa.schema(
    [
        ("image_id_a", pa.string()),
        ("image_id_b", pa.string()),
        ("similarity", pa.float32()),
        ("phash_distance", pa.int16()),
        ("verified", pa.bool_()),
        ("transform", pa.string()),
        # Of pairs that had to be aligned: the log-odds that they are copies, and the affine map (xx, xy, x, yx, yy, y) from
        # b's coordinates to a's, both from -1 to 1. `points` is how many key points of the full images agree on one map: null
        # where these were not looked at. Score and map are those of the step that decided.
        ("score", pa.float32()),
        ("map", pa.list_(pa.float32())),
        ("points", pa.int16()),
        ("linked", pa.bool_()),  # taken as copies
    ]
)

DUPLICATES = pa.schema(
    [
        ("image_id", pa.string()),
        ("group_id", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # unique, near, reference, included
        ("matched_id", pa.string()),
        ("similarity", pa.float32()),
    ]
)

# Who leaked into what: `image_id` is an image of the reference or included set `set`, `pool_image_id` the copy that is
# dropped because of it (of the pool, or of an included set that a reference set meets). Neither similarity nor
# verified: other copies link the two, or their hashes alone do.
LEAKS = pa.schema(
    [
        ("set", pa.string()),
        ("image_id", pa.string()),
        ("pool_image_id", pa.string()),
        ("similarity", pa.float32()),
        ("verified", pa.bool_()),
    ]
)

# Which images were first compared with all others in one run, null where one has left since.
GENERATIONS = pa.schema([("image_id", pa.string()), ("generation", pa.string())])

# What was measured of a pair of thumbnails that was aligned: `view` (of `algorithms.copies.views`) is how b looks like a, `features`
# those of `algorithms.copies.evidence` that lie in the two images alone, `map` as in `edges`.
MEASURED = pa.schema(
    [
        ("image_id_a", pa.string()),
        ("image_id_b", pa.string()),
        ("view", pa.int16()),
        ("features", pa.list_(pa.float32())),
        ("map", pa.list_(pa.float32())),
    ]
)

# What was measured of a pair of full images: `features` are those of `algorithms.copies.closeup`, zeros where `points` is 0; `view` is 0.
CLOSEUPS = pa.schema(
    [
        ("image_id_a", pa.string()),
        ("image_id_b", pa.string()),
        ("view", pa.int16()),
        ("points", pa.int16()),
        ("features", pa.list_(pa.float32())),
        ("map", pa.list_(pa.float32())),
    ]
)

CLUSTERS = pa.schema([("image_id", pa.string()), ("cluster", pa.int32()), ("path", pa.list_(pa.int32()))])

# The same columns twice: every hit of every query, and (collisions resolved) every image that a set gets.
MATCHES = SELECTED = pa.schema(
    [
        ("image_id", pa.string()),
        ("set", pa.string()),
        ("mode", pa.string()),
        ("query_id", pa.string()),
        ("similarity", pa.float32()),
        ("cluster", pa.int32()),
    ]
)

SHARDS = pa.schema(
    [("image_id", pa.string()), ("shard", pa.string()), ("offset", pa.int64()), ("size_bytes", pa.int64())]
)

# Images that lie in a shard and count no more. `reason` is that of a filter or of dedup, `not_selected`, or `gone` (from the
# pool, with its source).
TOMBSTONES = SHARDS.append(pa.field("reason", pa.string()))

# What the index lists since the run before, or lists no more: `change` is added or removed.
CHANGES = pa.schema([("image_id", pa.string()), ("change", pa.string()), ("reason", pa.string())])

# What the sources said about copies that a listed image stands for: near-duplicates that were dropped because of it, and other
# places of the same bytes (then `copy_id` is `image_id`).
COPIES = pa.schema(
    [
        ("image_id", pa.string()),
        ("copy_id", pa.string()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("extra", pa.string()),
    ]
)

# What a trained network's patches have in common, as colours; both PNG.
PICTURES = pa.schema(
    [
        ("set", pa.string()),
        ("image_id", pa.string()),
        ("network", pa.string()),
        ("image", pa.binary()),
        ("picture", pa.binary()),
    ]
)
