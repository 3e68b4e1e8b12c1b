"""The settings of curation: typed, documented, with their units.

One YAML file holds a whole run. Unknown keys are refused with the nearest known name; relative paths are relative to
the file. `infra.config` adds the `training` and `pruning` sections to the model below.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fsspec.registry import known_implementations
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from lodeset.pipeline.by_hand import ByHand, ListFile
from lodeset.pipeline.dag.cluster import IN_PLACE_S
from lodeset.pipeline.deduplication import Dedup as Dedup
from lodeset.pipeline.documents import parsed, read_text
from lodeset.pipeline.embedders.config import HuggingFaceEmbedder, PatchDictionary
from lodeset.pipeline.embedders.kinds import Embedder
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.filters.masks import Filter
from lodeset.pipeline.problems import explained
from lodeset.pipeline.remote.cache import DEFAULT_GB
from lodeset.pipeline.remote.retries import PATIENCE_S, SILENCE_S
from lodeset.pipeline.selection import Expected, Selection
from lodeset.pipeline.shorthand import short_too, written_out
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.choice import Members, Patterns
from lodeset.pipeline.strict import Strict as Strict  # the sections of other packages take it from here

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Source(Strict):
    """A source of images: a folder, tar (WebDataset) or zip archives, Parquet files with an image column, or lists of paths."""

    uri: str = Field(
        min_length=1,
        description="path or fsspec URL of a folder, a .tar, .tar.gz, .tar.zst or .zip archive, a .parquet file, or a .csv "
        "or .jsonl list of paths; globs allowed",
    )
    image: str = Field(
        "image",
        description="Parquet: column of encoded bytes, or of structs with a field `bytes`; lists: column of paths",
    )
    folder: str | None = Field(
        None,
        description="lists only: folder that the paths start from and must stay in [default: the folder of the list]",
    )
    exclude: Patterns = Field(
        (), description="files and folders below the source to leave out, e.g. `thumbnails/` or `*.gif`"
    )
    members: Members = Field(Members(), description="which files of a folder or members of a tar are read as images")
    on_unreadable: Literal["stop", "count"] | None = Field(
        None, description="`ingest.on_unreadable` for this source alone [default: the value there]"
    )

    @field_validator("members", mode="before")
    @classmethod
    def _only_these(cls, value: Any) -> Any:
        return {"include": value} if isinstance(value, str | list | tuple) else value


class AsIs(Strict):
    """Retrieve nothing from the pool for this set."""

    mode: Literal["as_is"] = "as_is"


class Sample(Strict):
    """Retrieve the k nearest pool images of every image of the set (DINOv2, appendix A.4, sample-based retrieval)."""

    mode: Literal["sample"]
    k: int = Field(
        4, ge=1, description="pool images per query (paper: 4 for ImageNet-22k and GLDv2, 32 for ImageNet-1k)"
    )
    part_images: int = Field(1_024, ge=1, description="queries per part of the search; speed only")


class Cluster(Strict):
    """Retrieve from pool clusters that contain several images of the set (DINOv2, appendix A.4, cluster-based
    retrieval).
    """

    mode: Literal["cluster"]
    per_cluster: int = Field(
        10_000, ge=1, description="images drawn from each selected cluster; smaller clusters are taken as a whole"
    )
    min_matches: int = Field(
        4, ge=1, description="minimum number of query images in a cluster for it to be selected (paper: more than 3)"
    )
    limit: int = Field(1_000_000, ge=1, description="maximum number of images drawn for the whole set")


Retrieve = Annotated[AsIs | Sample | Cluster, Field(discriminator="mode")]


class CuratedSet(Source):
    """A named set of examples of what to look for: images of its own, or images of the pool."""

    uri: str = Field(
        "",
        min_length=1,
        description=f"{Source.model_fields['uri'].description}; not with `pool_ids`",
    )
    pool_ids: ListFile | None = Field(
        None,
        description="list of image_ids of the pool in place of `uri`: a text file with one a line (# comments), or a .csv or "
        ".parquet file with a column `image_id`",
    )
    name: Name
    include: bool = Field(
        False,
        description="whether the set's own images go into the shards, too; of `pool_ids` those that dedup keeps",
    )
    retrieve: Retrieve = AsIs()
    expected: Expected | None = Field(
        None, description="expected figures, which `plan` compares with; they change no result"
    )

    @model_validator(mode="after")
    def _has_images(self) -> CuratedSet:
        if self.pool_ids is None:
            if not self.uri:
                raise ValueError("give `uri`, where the set's images are, or `pool_ids`, a list of images of the pool")
            return self
        unread = [name for name in Source.model_fields if name in self.model_fields_set]
        if unread:
            raise ValueError(
                f"with `pool_ids` the images are those of the pool, so nothing reads {', '.join(f'`{name}`' for name in unread)}: "
                "remove either"
            )
        return self

    @model_validator(mode="after")
    def _does_something(self) -> CuratedSet:
        if isinstance(self.retrieve, AsIs) and not self.include:
            raise ValueError(
                "this set has no effect: give `include: true` or `retrieve: {mode: sample}` (or `cluster`)"
            )
        return self


class ReferenceSet(Source):
    """An evaluation set whose images and near-duplicates must never reach training."""

    name: Name


class TargetSet(Source):
    """A labeled set to evaluate on."""

    name: Name
    label: str = Field(
        "label", description="metadata field that holds the class; if no image has it, folders are classes"
    )
    split: str = Field(
        "split",
        description="metadata field that holds `gallery` (or train) or `test` (or validation, val); without it, "
        "folders `<split>/<class>/`, or else every fifth image is a test image",
    )
    linear_steps: int = Field(
        500, ge=0, description="training steps of the linear probe (published: 12,500, on ImageNet); 0: only kNN"
    )


class Ingest(Strict):
    """Listing, decoding, hashing."""

    max_pixels: int = Field(
        100_000_000, ge=1, description="maximum width x height; larger images are rejected without decoding"
    )
    max_bytes: int = Field(
        256 * 2**20, ge=1, description="maximum encoded bytes; larger files are rejected without reading"
    )
    max_side: int = Field(
        200_000, ge=1, description="maximum width or height; larger images are rejected without decoding"
    )
    max_decoded_mb: float = Field(
        1_024, gt=0, description="maximum MiB of decoded samples; larger images are rejected without decoding"
    )
    max_frames: int = Field(
        10_000,
        ge=1,
        description="maximum number of frames of an animation; longer ones are rejected; only the "
        "first frame is decoded",
    )
    max_seconds: float = Field(
        30, gt=0, description="maximum seconds of processor time to decode an image; slower images are rejected"
    )
    worker_memory_gb: float = Field(
        4, gt=0, description="maximum GiB of a worker's memory; an image that exceeds it is rejected"
    )
    truncated: Literal["keep", "reject"] = Field(
        "keep",
        description="whether to keep or reject images whose files are cut off but contain at least 95 % of the pixels",
    )
    strip_location: bool = Field(
        False,
        description="whether GPS data are removed from the bytes of images: the pixels stay the same, the image gets "
        "a new id and `derived_from`; images whose location cannot be removed are rejected",
    )
    slice_mb: float = Field(8.0, gt=0, description="MiB of source per part; speed only")
    on_unreadable: Literal["stop", "count"] = Field(
        "stop",
        description="what to do about a source without a readable image, a Parquet file whose images are in another "
        "column, or unreadable archives that make up more than half of a source: stop the run, or count them and "
        "continue",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="size of a seeded sample of the pool files that may be images, drawn before decoding "
        "[default: all]",
    )


class Embed(Strict):
    """The networks that turn images into vectors."""

    semantic: Embedder = Field(PatchDictionary(), description="vectors for clustering and retrieval")
    dedup: Literal["semantic"] | Embedder = Field(
        "semantic", description="vectors for dedup: `semantic`, or another embedder"
    )


class Clustering(Strict):
    """k-means of the kept pool images."""

    k: Literal["auto"] | Annotated[int, Field(ge=1)] | Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        "auto",
        description="number of clusters; auto: max(N / 7440, min(N / 50, 256)) for N kept images (7440 = LVD-142M's "
        "mean); a list: numbers per level, lowest first, each level clustering the centroids of the previous one "
        "(hierarchical k-means)",
    )
    iterations: int = Field(
        20, ge=1, description="maximum number of Lloyd steps; a fit ends early when a step gains nothing"
    )
    resampling: int = Field(
        10, ge=0, description="steps of each level above the lowest that spread its centroids out (Vo et al. 2024)"
    )
    spherical: bool = Field(False, description="whether centroids have length 1, like the vectors")
    drift: float = Field(
        0.1,
        ge=0,
        description="centroids of an earlier run are kept until the mean squared distance of the images from them "
        "exceeds the value at the time of the fit by this share; then they are fitted again, and k: auto is chosen "
        "anew",
    )
    seed: int = Field(0, ge=0)

    @field_validator("k")
    @classmethod
    def _levels_fall(cls, value: Any) -> Any:
        if isinstance(value, tuple) and any(above >= below for below, above in pairwise(value)):
            raise ValueError(
                "each level must have fewer clusters than the previous one: lowest first, e.g. [1000, 300]"
            )
        return value


class Balance(Strict):
    """A sample of the pool in which every cluster of every level has an equal share (Vo et al. 2024, section 3.3)."""

    images: int = Field(ge=1, description="pool images to draw; if dedup kept fewer, all of them")
    seed: int = Field(0, ge=0)


class Shards(Strict):
    """WebDataset tars."""

    size_mb: float = Field(
        256, gt=0, description="maximum size of a shard in MiB (a larger image gets a shard of its own)"
    )
    seed: int = Field(0, ge=0, description="seed of the order of images across and inside shards")


class Placement(Strict):
    """Where on a Ray cluster the workers of a stage run."""

    resources: dict[str, float] = Field(
        {}, description="custom resources that each worker takes, e.g. {highmem: 1}, as nodes were started with them"
    )
    labels: dict[str, str] = Field(
        {}, description="labels that a node must have, in Ray's syntax, e.g. {ray.io/accelerator-type: H100}"
    )


class RayCluster(Strict):
    """The Ray cluster that stages run on."""

    address: str = Field(
        "local",
        description="`local` starts Ray on this machine for the time of a run; `auto` or host:port joins a cluster, "
        "whose nodes must all see the store and the sources under the same names",
    )
    cpus: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="cores of a joined cluster that stages use together; auto: all of them, as of the start of the run",
    )
    wait_for_nodes: float = Field(
        60,
        ge=10,
        description="seconds that a stage waits for a node that could do its work, before it ends with the numbers; longer "
        "where an autoscaler adds nodes",
    )
    namespace: str | None = Field(None, description="Ray namespace of a joined cluster [default: one of its own]")
    env: tuple[str, ...] = Field(
        (),
        description="names of environment variables of this process that workers get, too, e.g. AWS_ENDPOINT_URL; "
        "values are never written anywhere",
    )
    object_store_mb: float = Field(
        256, ge=80, description="MiB of shared memory that a local cluster reserves for objects"
    )
    in_place_s: float = Field(
        IN_PLACE_S,
        ge=0,
        description="work that takes a core no longer than these seconds is done in the stage's own process, without Ray, where "
        "Ray is local; 0: none",
    )
    placement: dict[str, Placement] = Field(
        {}, description="where the workers of a stage run, by its name, e.g. {embed: {labels: {...}}}"
    )


class Resources(Strict):
    """Resources, which change only the speed: nothing here enters a fingerprint."""

    cpus: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="cores of this machine, for both engines together; auto: all cores. Of a Ray cluster that is joined, "
        "`ray.cpus` says how many",
    )
    ray: RayCluster = RayCluster()
    ray_address: str | None = Field(None, description="short for `ray.address`, and wins over it")
    beam: dict[str, str] = Field(
        {}, description="Beam pipeline options, e.g. {runner: FlinkRunner, flink_master: host:8081}"
    )
    patience_s: float = Field(
        PATIENCE_S,
        ge=0,
        description="seconds for which a request is repeated that a remote store or source refuses for the moment (too "
        "many requests, a connection that breaks, an answer that is cut off); then the run stops, and the next one "
        "goes on from there",
    )
    silence_s: float = Field(
        SILENCE_S, gt=0, description="seconds without an answer after which a request to S3 is made again"
    )
    cache_gb: float = Field(
        DEFAULT_GB,
        ge=0,
        description="GiB of remote bytes that each machine keeps, shared by its processes: what several stages read "
        "is fetched once; 0: none",
    )
    cache_dir: str | None = Field(
        None, description="folder of that cache [default: lodeset-cache-<user id> in the folder of temporary files]"
    )

    @property
    def cluster(self) -> RayCluster:
        """The Ray cluster, with its address."""
        return self.ray if self.ray_address is None else self.ray.model_copy(update={"address": self.ray_address})


Neighbors = Literal["auto", "exact", "ivfpq", "hnsw"]


class CurationConfig(Strict):
    """The curation half of a configuration file."""

    name: Name = Field(
        "lodeset",
        description="name of the data set: runs of the same name in one store build on one another (which copy is "
        "kept, which shards stay); configurations that share a store but are not versions of one another need "
        "different names",
    )
    store: str = Field("./runs", min_length=1, description="where all results are kept: any fsspec URL")
    pool: tuple[Source, ...] = Field(min_length=1, description="the uncurated images", json_schema_extra=short_too)
    curated: tuple[CuratedSet, ...] = Field(
        (),
        description="sets to look for in the pool; a bare path means `retrieve: {mode: sample}`",
        json_schema_extra=short_too,
    )
    reference: tuple[ReferenceSet, ...] = Field(
        (), description="sets whose images and copies must never reach training", json_schema_extra=short_too
    )
    targets: tuple[TargetSet, ...] = Field((), description="labeled sets to evaluate on", json_schema_extra=short_too)
    ingest: Ingest = Ingest()
    embed: Embed = Embed()
    filter: Filter = Filter()
    by_hand: ByHand | None = Field(None, description="images that somebody decided on, by lists of image_ids")
    neighbors: Neighbors = Field(
        "auto",
        description="search method; auto: exact up to queries x vectors x dimensions = 2e13, then ivfpq; hnsw: slow "
        "to build",
    )
    dedup: Dedup = Dedup()
    cluster: Clustering = Clustering()
    selection: Selection = Selection()
    balance: Balance | None = Field(
        None,
        description="draw a balanced sample of the pool: instead of the whole pool, or in addition to what curated "
        "sets retrieve",
    )
    shards: Shards = Shards()
    resources: Resources = Resources()

    @property
    def named_sets(self) -> tuple[CuratedSet | ReferenceSet | TargetSet, ...]:
        """Every set except the pool."""
        return (*self.curated, *self.reference, *self.targets)

    @property
    def included(self) -> tuple[str, ...]:
        """The curated sets that bring images of their own into the shards."""
        return tuple(one.name for one in self.curated if one.include and one.uri)

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, values: Any) -> Any:
        return written_out(values)

    @model_validator(mode="after")
    def _names_differ(self) -> CurationConfig:
        names = ["pool", "all", *(s.name for s in self.named_sets)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(
                f"set names must differ, and `pool` and `all` are reserved; used twice: {', '.join(twice)}"
            )
        return self


Config = TypeVar("Config", bound=BaseModel)


def load(model: type[Config], path: str | Path | None, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file (None: only defaults), apply `a.b=c` overrides, and validate the result.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    tree = merged(model, path, overrides)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path or 'settings'}:\n" + "\n".join(explained(model, error.errors(), tree))) from None
    return _absolute(config, Path(path).resolve().parent if path is not None else Path.cwd())


def merged(model: type[BaseModel], path: str | Path | None, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a YAML file and the overrides say, before it is validated.

    Raises:
        ConfigError: the file cannot be read, or an override leads nowhere.
    """
    tree = _tree(model, Path(path)) if path is not None else {}
    for override in overrides:
        _override(tree, override)
    return tree


def _tree(model: type[BaseModel], file: Path) -> dict[str, Any]:
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
        needed = "".join(f"; it needs the key `{name}:`" for name, f in model.model_fields.items() if f.is_required())
        raise ConfigError(f"{file} must hold a mapping of keys to values, not {_kind(tree)}{needed}")
    return tree


def _kind(tree: Any) -> str:
    kinds = {list: "a list", str: "one text", type(None): "nothing"}
    return kinds.get(type(tree), "one value")


def _override(tree: dict[str, Any], override: str) -> None:
    named = shown(override if len(override) <= 80 else f"{override[:77]}...")
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {named}: expected key.path=value, e.g. --set dedup.threshold=0.55")
    value = parsed(text, f"--set {named}: the value")
    node: Any = tree
    *parents, last = dotted.split(".")
    for key in parents:
        if _is_index(key, node):
            node = node[int(key)]
        elif key.isdigit():
            raise ConfigError(f"--set {named}: there is no list with an entry {key[:20]} (entries are counted from 0)")
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise ConfigError(f"--set {named}: `{key}` is not a section of the configuration")
    if _is_index(last, node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {named}: `{last}` is not inside a section")


def _is_index(key: str, node: Any) -> bool:
    return isinstance(node, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)


def resolve(uri: str, base: Path) -> str:
    """Make a path from the file absolute; URLs with a protocol stay unchanged."""
    if "://" in uri or uri.startswith("memory:"):
        return uri
    protocol, colon, rest = uri.partition(":/")
    if colon and protocol in known_implementations and not Path(uri).exists():
        raise ConfigError(
            f"{shown(uri)}: a URL has two slashes after the colon: {protocol}://{shown(rest.lstrip('/'))}"
        )
    if "\0" in uri:
        raise ConfigError(f"{shown(uri)}: a path cannot contain a NUL character")
    try:
        return str((base / Path(uri).expanduser()).absolute())
    except RuntimeError:
        raise ConfigError(f"{shown(uri)}: this user has no home folder: write the whole path") from None


# Keys whose text is a path; `blocked_domains` and `blocked_urls` hold a list, or the path of one.
PATHS = ("uri", "pool_ids", "path", "folder", "store", "blocked_domains", "blocked_urls", "cache_dir")
# Keys that hold a list of paths.
PATH_LISTS = ("drop", "keep")


def _model(written: str, base: Path) -> str:
    """A model's folder made absolute; what does not exist and may be a name on the hub stays unchanged."""
    folder = resolve(written, base)
    local = written.startswith((".", "/", "~")) or written.count("/") > 1
    return folder if local or Path(folder).is_dir() else written


def _absolute(config: Config, base: Path) -> Config:
    def walk(node: Any) -> Any:
        if isinstance(node, BaseModel):
            changed: dict[str, Any] = {}
            for key in type(node).model_fields:
                value = getattr(node, key)
                if key in PATHS and isinstance(value, str) and value:
                    changed[key] = resolve(value, base)
                elif key in PATH_LISTS and isinstance(value, tuple):
                    changed[key] = tuple(resolve(place, base) for place in value)
                elif key == "model" and isinstance(node, HuggingFaceEmbedder):
                    changed[key] = _model(value, base)
                else:
                    changed[key] = walk(value)
            return node.model_copy(update=changed)
        if isinstance(node, tuple):
            return tuple(walk(entry) for entry in node)
        return node

    return walk(config)  # type: ignore[no-any-return]  # walk keeps the type of its argument
