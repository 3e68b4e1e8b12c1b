"""Every curation knob: typed, documented, with its unit.

One YAML file holds a whole run. Unknown keys are refused with the nearest known name; relative paths are relative to the
file. `infra.config` adds the `training` and `pruning` sections to the model below.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fsspec.registry import known_implementations
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from lodeset.pipeline.deduplication import Dedup as Dedup
from lodeset.pipeline.documents import parsed, read_text
from lodeset.pipeline.embedders.config import Embedder, HuggingFaceEmbedder, PatchDictionary
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.filters.config import Filter
from lodeset.pipeline.problems import explained
from lodeset.pipeline.selection import Expected, Selection
from lodeset.pipeline.shorthand import short_too, written_out
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.choice import Members, Patterns
from lodeset.pipeline.strict import Strict as Strict  # the sections of other packages take it from here

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Source(Strict):
    """Where images come from: a folder, tar (WebDataset) or zip archives, Parquet files with an image column, or lists of paths."""

    uri: str = Field(
        min_length=1,
        description="path or fsspec URL of a folder, a .tar, .tar.gz, .tar.zst or .zip archive, a .parquet file, or a .csv or .jsonl list of "
        "paths; globs allowed",
    )
    image: str = Field(
        "image",
        description="Parquet: the column of encoded bytes, or of structs with a field `bytes`; lists: the column of paths",
    )
    folder: str | None = Field(
        None,
        description="lists only: the folder that their paths start from and must stay in; absent: the one that the list lies in",
    )
    exclude: Patterns = Field(
        (), description="files and folders below the source that are not looked at, e.g. `thumbnails/` or `*.gif`"
    )
    members: Members = Field(Members(), description="which files of a folder or members of a tar are images to read")
    on_unreadable: Literal["stop", "count"] | None = Field(
        None, description="as `ingest.on_unreadable`, for this source alone; absent: as that says"
    )

    @field_validator("members", mode="before")
    @classmethod
    def _only_these(cls, value: Any) -> Any:
        return {"include": value} if isinstance(value, str | list | tuple) else value


class AsIs(Strict):
    """Take nothing from the pool for this set."""

    mode: Literal["as_is"] = "as_is"


class Sample(Strict):
    """The k nearest pool images of every image of the set (DINOv2, appendix A.4, sample-based retrieval)."""

    mode: Literal["sample"]
    k: int = Field(
        4, ge=1, description="pool images per query; the paper: 4 for ImageNet-22k and GLDv2, 32 for ImageNet-1k"
    )
    part_images: int = Field(1_024, ge=1, description="queries per part of the search; speed only")


class Cluster(Strict):
    """Pool clusters in which several images of the set fall (DINOv2, appendix A.4, cluster-based retrieval)."""

    mode: Literal["cluster"]
    per_cluster: int = Field(10_000, ge=1, description="images drawn from each kept cluster, or all of a smaller one")
    min_matches: int = Field(
        4, ge=1, description="a cluster is kept from this many query images on (the paper: more than 3)"
    )
    limit: int = Field(1_000_000, ge=1, description="images drawn for the whole set")


Retrieve = Annotated[AsIs | Sample | Cluster, Field(discriminator="mode")]


class CuratedSet(Source):
    """A named set that says what to look for."""

    name: Name
    include: bool = Field(False, description="whether the set's own images go into the shards too")
    retrieve: Retrieve = AsIs()
    expected: Expected | None = Field(None, description="figures that `plan` compares with; changes no result")

    @model_validator(mode="after")
    def _does_something(self) -> CuratedSet:
        if isinstance(self.retrieve, AsIs) and not self.include:
            raise ValueError("does nothing: give `include: true` or `retrieve: {mode: sample}` (or `cluster`)")
        return self


class ReferenceSet(Source):
    """An evaluation set whose images and near-duplicates must never reach training."""

    name: Name


class TargetSet(Source):
    """A labelled set to evaluate on."""

    name: Name
    label: str = Field(
        "label", description="metadata field that holds the class; where no image has it, folders are classes"
    )
    split: str = Field(
        "split",
        description="metadata field that says `gallery` (or train) or `test` (or validation, val); of folders, `<split>/<class>/`, or "
        "every fifth image is test",
    )
    linear_steps: int = Field(
        500, ge=0, description="training steps of the linear probe (published: 12,500, on ImageNet); 0: kNN alone"
    )


class Ingest(Strict):
    """Listing, decoding, hashing."""

    max_pixels: int = Field(100_000_000, ge=1, description="width x height above which an image is rejected undecoded")
    max_bytes: int = Field(256 * 2**20, ge=1, description="encoded bytes above which a file is rejected unread")
    max_side: int = Field(200_000, ge=1, description="width or height above which an image is rejected undecoded")
    max_decoded_mb: float = Field(
        1_024, gt=0, description="MiB of decoded samples above which an image is rejected undecoded"
    )
    max_frames: int = Field(
        10_000, ge=1, description="frames of an animation above which it is rejected; only the first frame is decoded"
    )
    max_seconds: float = Field(
        30, gt=0, description="seconds of processor time to decode an image in; an image that takes longer is rejected"
    )
    worker_memory_gb: float = Field(
        4, gt=0, description="GiB that a worker may hold; an image that takes it there is rejected"
    )
    truncated: Literal["keep", "reject"] = Field(
        "keep", description="what becomes of images whose files lack their end, with at least 95 % of the pixels there"
    )
    strip_location: bool = Field(
        False,
        description="whether GPS is taken out of the bytes of images that hold it: the pixels stay, the image gets a new id and "
        "`derived_from`; one whose place cannot be taken out is rejected",
    )
    slice_mb: float = Field(8.0, gt=0, description="MiB of source per part; speed only")
    on_unreadable: Literal["stop", "count"] = Field(
        "stop",
        description="what to do about a source without a readable image, a Parquet file whose images lie in another column, or "
        "unreadable archives that are more than half of a source: stop the run, or count them and go on",
    )
    limit: int | None = Field(
        None, ge=1, description="pool files that may be images, in a seeded sample, before decoding; all if absent"
    )


class Embed(Strict):
    """Which network turns images into vectors."""

    semantic: Embedder = Field(PatchDictionary(), description="vectors for clustering and retrieval")
    dedup: Literal["semantic"] | Embedder = Field(
        "semantic", description="vectors for dedup: `semantic`, or an embedder of its own"
    )


class Clustering(Strict):
    """k-means of the kept pool images."""

    k: Literal["auto"] | Annotated[int, Field(ge=1)] | Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        "auto",
        description="clusters; auto: max(N / 7440, min(N / 50, 256)) for N kept images (7440 = LVD-142M's mean); a list: "
        "levels, lowest first, each of which clusters the centroids of the one before (hierarchical k-means)",
    )
    iterations: int = Field(20, ge=1, description="Lloyd steps at most; a fit ends when they gain nothing")
    resampling: int = Field(
        10, ge=0, description="steps of each level above the lowest that spread its centroids (Vo et al. 2024)"
    )
    spherical: bool = Field(False, description="whether centroids are of length 1, as the vectors are")
    drift: float = Field(
        0.1,
        ge=0,
        description="centroids of an earlier run are kept as long as images lie no farther from them than when they were "
        "fitted, by this share of the mean squared distance; k: auto is chosen anew when they are not",
    )
    seed: int = Field(0, ge=0)

    @field_validator("k")
    @classmethod
    def _levels_fall(cls, value: Any) -> Any:
        if isinstance(value, tuple) and any(above >= below for below, above in pairwise(value)):
            raise ValueError("each level must have fewer clusters than the one before: lowest first, e.g. [1000, 300]")
        return value


class Balance(Strict):
    """A sample of the pool in which every cluster of every level has an equal share (Vo et al. 2024, section 3.3)."""

    images: int = Field(ge=1, description="pool images to draw; all that dedup kept if there are fewer")
    seed: int = Field(0, ge=0)


class Shards(Strict):
    """WebDataset tars."""

    size_mb: float = Field(256, gt=0, description="largest shard, MiB (a single larger image gets its own)")
    seed: int = Field(0, ge=0, description="order of images over and inside shards")


class Resources(Strict):
    """How fast, never what: nothing here enters a fingerprint."""

    cpus: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="cores for both engines together")
    ray_address: str = Field(
        "local", description="`local` starts Ray on this machine; `auto` or host:port joins a cluster"
    )
    beam: dict[str, str] = Field(
        {}, description="Beam pipeline options, e.g. {runner: FlinkRunner, flink_master: host:8081}"
    )


Neighbors = Literal["auto", "exact", "ivfpq", "hnsw"]


class CurationConfig(Strict):
    """The curation half of a configuration file."""

    name: Name = Field(
        "lodeset",
        description="of the data set: runs of one name in one store go on from one another (which copy is kept, which shards "
        "stand); configurations that share a store and are not versions of one another need a name each",
    )
    store: str = Field("./runs", min_length=1, description="where everything is kept: any fsspec URL")
    pool: tuple[Source, ...] = Field(min_length=1, description="the uncurated images", json_schema_extra=short_too)
    curated: tuple[CuratedSet, ...] = Field(
        (), description="what to look for; a bare path: `retrieve: {mode: sample}`", json_schema_extra=short_too
    )
    reference: tuple[ReferenceSet, ...] = Field(
        (), description="what must never reach training, nor any copy of it", json_schema_extra=short_too
    )
    targets: tuple[TargetSet, ...] = Field((), description="labelled sets to evaluate on", json_schema_extra=short_too)
    ingest: Ingest = Ingest()
    embed: Embed = Embed()
    filter: Filter = Filter()
    neighbors: Neighbors = Field(
        "auto",
        description="search; auto: exact up to queries x vectors x dimensions = 2e13, then ivfpq; hnsw: slow build",
    )
    dedup: Dedup = Dedup()
    cluster: Clustering = Clustering()
    selection: Selection = Selection()
    balance: Balance | None = Field(
        None,
        description="draw a balanced sample of the pool: in place of all of it, or beside what curated sets retrieve",
    )
    shards: Shards = Shards()
    resources: Resources = Resources()

    @property
    def named_sets(self) -> tuple[CuratedSet | ReferenceSet | TargetSet, ...]:
        """Every set but the pool."""
        return (*self.curated, *self.reference, *self.targets)

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, values: Any) -> Any:
        return written_out(values)

    @model_validator(mode="after")
    def _names_differ(self) -> CurationConfig:
        names = ["pool", "all", *(s.name for s in self.named_sets)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"set names must differ, and `pool` and `all` are taken; used twice: {', '.join(twice)}")
        return self


Config = TypeVar("Config", bound=BaseModel)


def load(model: type[Config], path: str | Path | None, overrides: tuple[str, ...] = ()) -> Config:
    """Reads a YAML file (none: nothing but defaults), applies `a.b=c` overrides and validates.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    tree = _tree(model, Path(path)) if path is not None else {}
    for override in overrides:
        _override(tree, override)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path or 'settings'}:\n" + "\n".join(explained(model, error.errors(), tree))) from None
    return _absolute(config, Path(path).resolve().parent if path is not None else Path.cwd())


def _tree(model: type[Config], file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            text = read_text(opened, str(file))
    except FileNotFoundError:
        whole = "pool" in model.model_fields
        raise ConfigError(
            f"no configuration at {file}" + (f": `lodeset init {file}` writes one" if whole else "")
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the configuration {file}: {why}") from error
    tree = parsed(text, str(file))
    if not isinstance(tree, dict):
        needed = "".join(f"; `{name}:` is a key it needs" for name, f in model.model_fields.items() if f.is_required())
        raise ConfigError(f"{file} must hold a mapping of keys to values, not {_kind(tree)}{needed}")
    return tree


def _kind(tree: Any) -> str:
    kinds = {list: "a list", str: "one text", type(None): "nothing"}
    return kinds.get(type(tree), "one value")


def _override(tree: dict[str, Any], override: str) -> None:
    told = shown(override if len(override) <= 80 else f"{override[:77]}...")
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {told}: expected key.path=value, e.g. --set dedup.threshold=0.55")
    value = parsed(text, f"--set {told}: the value")
    node: Any = tree
    *parents, last = dotted.split(".")
    for key in parents:
        if _is_index(key, node):
            node = node[int(key)]
        elif key.isdigit():
            raise ConfigError(f"--set {told}: there is no list with an entry {key[:20]} (they are counted from 0)")
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise ConfigError(f"--set {told}: `{key}` is not a section of the configuration")
    if _is_index(last, node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {told}: `{last}` has no section to be set in")


def _is_index(key: str, node: Any) -> bool:
    return isinstance(node, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)


def resolve(uri: str, base: Path) -> str:
    """A path as written in the file -> an absolute one; URLs with a protocol stay as they are."""
    if "://" in uri or uri.startswith("memory:"):
        return uri
    protocol, colon, rest = uri.partition(":/")
    if colon and protocol in known_implementations and not Path(uri).exists():
        raise ConfigError(
            f"{shown(uri)}: a URL has two slashes after the colon: {protocol}://{shown(rest.lstrip('/'))}"
        )
    if "\0" in uri:
        raise ConfigError(f"{shown(uri)}: a path cannot hold a NUL character")
    try:
        return str((base / Path(uri).expanduser()).absolute())
    except RuntimeError:
        raise ConfigError(f"{shown(uri)}: no such user's home folder: write the whole path") from None


# Keys whose text is a path. The last two hold a list instead, or the path of one.
_PATHS = ("uri", "path", "folder", "store", "blocked_domains", "blocked_urls")


def _model(written: str, base: Path) -> str:
    """A model's folder made absolute; what cannot be one, or is not there and may be a name on the hub, stays."""
    folder = resolve(written, base)
    local = written.startswith((".", "/", "~")) or written.count("/") > 1
    return folder if local or Path(folder).is_dir() else written


def _absolute(config: Config, base: Path) -> Config:
    def walk(node: Any) -> Any:
        if isinstance(node, BaseModel):
            changed = {}
            for key in type(node).model_fields:
                value = getattr(node, key)
                if key in _PATHS and isinstance(value, str):
                    changed[key] = resolve(value, base)
                elif key == "model" and isinstance(node, HuggingFaceEmbedder):
                    changed[key] = _model(value, base)
                else:
                    changed[key] = walk(value)
            return node.model_copy(update=changed)
        if isinstance(node, tuple):
            return tuple(walk(entry) for entry in node)
        return node

    return walk(config)  # type: ignore[no-any-return]  # walk keeps the type of its argument
