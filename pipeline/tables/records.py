"""The Arrow schema of every table, and `TABLES`: who makes each, which columns name images, what it counts as kept.

Take-down, `trace`, `table` and the estimates of `plan` go by `TABLES`, so a new table needs one entry there. A test holds a whole
store against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

# Images of the pool that a list by hand names: `action` is drop or keep, `list` the name of the file.
BY_HAND = pa.schema([("image_id", pa.string()), ("action", pa.string()), ("list", pa.string())])

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
        # The highest `dedup.min_score` at which the pair counts as copies; infinite where thumbnails agree as they are. Null: none
        # makes it one, or pixels were not compared.
        ("min_score_limit", pa.float32()),
        # The log-odds that full images show the same down to their details (text, digits, emblems); null where these were not compared.
        ("detail_score", pa.float32()),
    ]
)

DUPLICATES = pa.schema(
    [
        ("image_id", pa.string()),
        ("group_id", pa.string()),
        ("kept", pa.bool_()),
        # unique, near, reference, included, by_hand (kept because of `by_hand.keep`); of semdedup also semantic
        ("reason", pa.string()),
        ("matched_id", pa.string()),
        ("similarity", pa.float32()),
    ]
)

# What `dedup.semantic` drops: of the images before it in the order of its cluster, the one that is most similar to it.
SEMANTIC = pa.schema(
    [("image_id", pa.string()), ("cluster", pa.int32()), ("matched_id", pa.string()), ("similarity", pa.float32())]
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
        ("details", pa.list_(pa.float32())),  # null where they were not, or cannot be, compared
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

# The images behind a breached gate of the configuration (`infra/gates`).
BREACHES = pa.schema([("gate", pa.string()), ("image_id", pa.string())])

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

# A WebP of at most 128 pixels a side.
THUMBNAILS = pa.schema([("image_id", pa.string()), ("picture", pa.binary())])

# What a run says of an image of a set. `outcome` is what happened to it last: a reason of a filter or of dedup, `not_selected`, `in_shard`,
# ..., or for other sets `reference_set`, `curated_set`, `target_set`; `dropped_by` the stage that dropped it. `picture_file` and
# `picture_row` say where in the set's `thumbnails` its picture lies, `x` and `y` where it lies on the map.
INSPECTED = pa.schema(
    [
        ("image_id", pa.string()),
        ("set", pa.string()),
        ("outcome", pa.string()),
        ("dropped_by", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("size_bytes", pa.int64()),
        ("sharpness", pa.float32()),
        ("quality", pa.float32()),
        ("derived_from", pa.string()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("filter_score", pa.float64()),
        ("filter_threshold", pa.float64()),
        ("group_id", pa.string()),
        ("group_size", pa.int64()),
        ("matched_id", pa.string()),
        ("matched_similarity", pa.float32()),
        ("cluster", pa.int32()),
        ("centroid_similarity", pa.float32()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("selected_for", pa.list_(pa.string())),
        ("mode", pa.string()),
        ("query_id", pa.string()),
        ("query_similarity", pa.float32()),
        ("shard", pa.string()),
        ("shard_offset", pa.int64()),
        ("shard_bytes", pa.int64()),
        ("picture_file", pa.int32()),
        ("picture_row", pa.int32()),
        ("row", pa.int32()),
    ]
)
_OF_CLUSTER = ("cluster", "centroid_similarity", "image_id", "set", "outcome", "picture_file", "picture_row", "row")
BY_CLUSTER = pa.schema([INSPECTED.field(name) for name in _OF_CLUSTER])

# The images that pairs of dedup name, by image_id, with what its rules for keepers go by; and the pairs, whose `a` and `b` are rows of
# that table.
COMPARED = pa.schema(
    [
        ("image_id", pa.string()),
        ("pool", pa.bool_()),
        ("reference", pa.bool_()),
        ("included", pa.bool_()),
        ("by_hand", pa.bool_()),  # of the pool, and on a list of `by_hand.keep`
        ("standing", pa.bool_()),
        ("area", pa.int64()),
        ("detail", pa.float64()),
        ("sharpness", pa.float64()),
        ("quality", pa.float64()),
        ("contrast", pa.float64()),
        ("said", pa.int64()),
    ]
)
PAIRS = pa.schema(
    [("a", pa.int32()), ("b", pa.int32()), *(field for field in EDGES if not field.name.startswith("image_id"))]
)
# What values of one setting drop: the joins of a maximum spanning forest of the pairs, the strongest first, and the counts once each is
# made; the first row is before all joins.
JOINS = pa.schema(
    [
        ("setting", pa.string()),
        ("limit", pa.float32()),
        ("a", pa.int32()),
        ("b", pa.int32()),
        ("dropped", pa.int64()),
        ("leaked", pa.int64()),
        ("groups", pa.int64()),
        ("largest", pa.int64()),
    ]
)


# -- the registry


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table, as parts and artifacts call it.

    Attributes:
        made_by: the stages whose artifacts list it, or whose parts alone hold it.
        key: what a row is unique by.
        schema: None where it depends on the data (vectors, features).
        about: the columns that name the images a row is about. The row goes with any of them.
        mentions: columns that name another image beside these. The name alone goes with it.
        groups: columns that name a group by the smallest image_id in it.
        kept: how the table says which images its stage kept: by its rows (`rows`), or by its column `kept` (`flag`).
        image_bytes: bytes stored for an image, measured on 15,866 web images with 1,280-dimensional vectors (`filtered`,
            `clusters` and `features` on the sample world; `scores` for each filter). What lies beside it in the same parts is
            counted with it.
        inner: whether a stage keeps it for itself, or for the run after it: no reader looks there.
    """

    name: str
    made_by: tuple[str, ...]
    key: tuple[str, ...]
    schema: pa.Schema | None = None
    about: tuple[str, ...] = ("image_id",)
    mentions: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    kept: Literal["rows", "flag"] | None = None
    image_bytes: int = 0
    inner: bool = False

    @property
    def naming(self) -> tuple[str, ...]:
        """Every column that can hold an image_id."""
        return (*self.about, *self.mentions, *self.groups)


_PAIR = ("image_id_a", "image_id_b")
_EMBED = ("embed", "embed_dedup")
_INGEST = ("ingest", "blur_faces")

TABLES: tuple[Table, ...] = (
    Table(
        name="images",
        made_by=_INGEST,
        key=("image_id",),
        schema=IMAGES,
        about=("image_id", "derived_from"),
        kept="rows",
        image_bytes=1_034,
    ),
    Table(name="locations", made_by=_INGEST, key=("set", "uri", "member", "offset"), schema=LOCATIONS),
    Table(name="metadata", made_by=_INGEST, key=("image_id", "source"), schema=METADATA),
    Table(name="rejects", made_by=("ingest",), key=("set", "uri", "member", "offset"), schema=REJECTS, about=()),
    # Images that several parts of one set hold.
    Table(name="repeated", made_by=("ingest",), key=("image_id", "part"), inner=True),
    Table(
        name="faces",
        made_by=("blur_faces",),
        key=("derived_from",),
        schema=FACES,
        about=("image_id", "derived_from"),
    ),
    Table(
        name="blurred_images",
        made_by=("blur_faces",),
        key=("image_id",),
        schema=IMAGES,
        about=("image_id", "derived_from"),
    ),
    Table(name="blurred_locations", made_by=("blur_faces",), key=("set", "uri", "member", "offset"), schema=LOCATIONS),
    Table(name="vectors", made_by=_EMBED, key=("image_id",), kept="rows", image_bytes=2_064),
    Table(name="scores", made_by=("score",), key=("image_id", "filter"), schema=SCORES, image_bytes=25),
    Table(name="filtered", made_by=("filter",), key=("image_id",), schema=FILTERED, image_bytes=1),
    Table(name="failing", made_by=("filter",), key=("image_id", "reason"), schema=FILTERED, inner=True),
    Table(name="by_hand", made_by=("filter",), key=("image_id", "list"), schema=BY_HAND),
    Table(name="samples", made_by=("calibrate",), key=("image_id", "kind"), inner=True),
    Table(name="edges", made_by=("dedup",), key=_PAIR, schema=EDGES, about=_PAIR),
    Table(
        name="duplicates",
        made_by=("dedup", "semdedup"),
        key=("image_id",),
        schema=DUPLICATES,
        mentions=("matched_id",),
        groups=("group_id",),
        kept="flag",
        image_bytes=799,
    ),
    Table(
        name="semantic",
        made_by=("semdedup",),
        key=("image_id",),
        schema=SEMANTIC,
        mentions=("matched_id",),
        image_bytes=1,
    ),
    Table(
        name="leaks",
        made_by=("dedup",),
        key=("set", "image_id", "pool_image_id"),
        schema=LEAKS,
        about=("image_id", "pool_image_id"),
    ),
    # Rows are numbered: a name that goes leaves its row.
    Table(
        name="generations",
        made_by=("dedup",),
        key=("image_id",),
        schema=GENERATIONS,
        about=(),
        mentions=("image_id",),
        inner=True,
    ),
    Table(name="measured", made_by=("dedup",), key=(*_PAIR, "view"), schema=MEASURED, about=_PAIR, inner=True),
    Table(name="closeups", made_by=("dedup",), key=(*_PAIR, "view"), schema=CLOSEUPS, about=_PAIR, inner=True),
    Table(
        name="clusters",
        made_by=("cluster", "semdedup"),
        key=("image_id",),
        schema=CLUSTERS,
        kept="rows",
        image_bytes=45,
    ),
    Table(
        name="matches",
        made_by=("retrieve", "balance"),
        key=("image_id", "set", "query_id"),
        schema=MATCHES,
        mentions=("query_id",),
    ),
    # Images of the pool that a list by hand names and that are selected themselves.
    Table(name="listed", made_by=("retrieve",), key=("image_id",), schema=SELECTED, mentions=("query_id",)),
    Table(
        name="selected",
        made_by=("retrieve",),
        key=("image_id", "set"),
        schema=SELECTED,
        mentions=("query_id",),
        kept="rows",
        image_bytes=40,
    ),
    Table(name="index", made_by=("write_shards",), key=("image_id",), schema=SHARDS, kept="rows"),
    Table(name="entries", made_by=("write_shards",), key=("image_id",), schema=SHARDS, inner=True),
    Table(name="tombstones", made_by=("write_shards",), key=("image_id",), schema=TOMBSTONES),
    Table(name="changes", made_by=("write_shards",), key=("image_id",), schema=CHANGES),
    Table(
        name="copies",
        made_by=("write_shards",),
        key=("image_id", "copy_id"),
        schema=COPIES,
        about=("image_id", "copy_id"),
    ),
    Table(name="breaches", made_by=("gates",), key=("gate", "image_id"), schema=BREACHES),
    Table(name="features", made_by=("evaluate",), key=("image_id",), image_bytes=734, inner=True),
    Table(
        name="thumbnails", made_by=("thumbnails",), key=("image_id",), schema=THUMBNAILS, image_bytes=2_600, inner=True
    ),
    Table(
        name="inspected",
        made_by=("inspect",),
        key=("image_id", "set"),
        schema=INSPECTED,
        about=("image_id", "derived_from"),
        mentions=("matched_id", "query_id"),
        groups=("group_id",),
        image_bytes=180,
    ),
    Table(name="by_cluster", made_by=("inspect",), key=("image_id", "set"), schema=BY_CLUSTER, inner=True),
    Table(name="compared", made_by=("inspect",), key=("image_id",), schema=COMPARED, inner=True),
    Table(name="pairs", made_by=("inspect",), key=("a", "b"), schema=PAIRS, about=(), inner=True),
    Table(name="joins", made_by=("inspect",), key=("setting", "a", "b"), schema=JOINS, about=(), inner=True),
    Table(name="pictures", made_by=("evaluate",), key=("set", "image_id"), schema=PICTURES, inner=True),
)

BY_NAME = {table.name: table for table in TABLES}
# A table that nobody listed: a take-down then goes by every column that names an image in any table.
UNLISTED = Table(
    name="",
    made_by=(),
    key=(),
    about=tuple(dict.fromkeys(column for table in TABLES for column in table.about)),
    mentions=tuple(dict.fromkeys(c for table in TABLES for c in table.mentions if c != "image_id")),
)
# Columns that nobody reads as text.
LARGE = ("thumbnail", "vector", "map")


def made_by(stage: str) -> tuple[Table, ...]:
    """The tables of a stage."""
    return tuple(table for table in TABLES if stage in table.made_by)


def kept_by(stage: str) -> Table | None:
    """The table that says which images a stage kept."""
    return next((table for table in made_by(stage) if table.kept is not None), None)


def bytes_per_image(stage: str) -> int:
    """Bytes that a stage stores for an image, as measured; 0 where nobody measured them."""
    return sum(table.image_bytes for table in made_by(stage))
