"""Every curation knob: typed, documented, with its unit.

One YAML file holds a whole run. Unknown keys are refused with the nearest known name; relative paths are relative to the
file. `infra.config` adds the `training` and `pruning` sections to the model below.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError


class Strict(BaseModel):
    """A section of the configuration: immutable, and no key goes unread."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Source(Strict):
    """Where images come from: a folder, tar or WebDataset files, or Parquet files with an image column."""

    uri: str = Field(min_length=1, description="path or fsspec URL of a folder, a .tar or a .parquet; globs allowed")
    image: str = Field(
        "image", description="Parquet only: the column of encoded bytes, or of structs with a field `bytes`"
    )


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
    label: str = Field("label", description="metadata field that holds the class")
    split: str = Field("split", description="metadata field that says `gallery` or `test`")


class Ingest(Strict):
    """Listing, decoding, hashing."""

    max_pixels: int = Field(100_000_000, ge=1, description="width x height above which an image is rejected undecoded")
    max_bytes: int = Field(256 * 2**20, ge=1, description="encoded bytes above which a file is rejected unread")
    slice_mb: float = Field(8.0, gt=0, description="MiB of source per part; speed only")
    limit: int | None = Field(None, ge=1, description="pool images in a seeded sample; all if absent")


class OnnxEmbedder(Strict):
    """A network run by onnxruntime: float32 [B, 3, size, size] in, [B, D] out."""

    kind: Literal["onnx"]
    path: str = Field(description="the .onnx file")
    size: int = Field(224, ge=8, description="side of the square input, pixels")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean on the 0..1 scale")
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="RGB standard deviation on the 0..1 scale"
    )
    batch: int = Field(32, ge=1, description="images per call; speed only")


class TorchScriptEmbedder(Strict):
    """A TorchScript network: float32 [B, 3, size, size] in, [B, D] out."""

    kind: Literal["torchscript"]
    path: str = Field(description="the TorchScript file")
    size: int = Field(224, ge=8, description="side of the square input, pixels")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean on the 0..1 scale")
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="RGB standard deviation on the 0..1 scale"
    )
    batch: int = Field(32, ge=1, description="images per call; speed only")


class PrecomputedEmbedder(Strict):
    """Vectors made elsewhere: Parquet with the columns `image_id` or `uri` (and `member`), and `vector`."""

    kind: Literal["precomputed"]
    path: str = Field(description="a Parquet file, a folder of them, or a glob")
    column: str = Field("vector", description="the column that holds the vectors (lists of D numbers)")


class PatchDictionary(Strict):
    """Whitened patches, k-means, pooled activations (Coates, Ng and Lee, AISTATS 2011); fitted on the pool, no download."""

    kind: Literal["patch_dictionary"] = "patch_dictionary"
    size: int = Field(64, ge=16, description="side that images are resized to, pixels")
    patch: int = Field(8, ge=2, description="side of a patch, pixels")
    stride: int = Field(4, ge=1, description="distance between patches, pixels")
    words: int = Field(256, ge=2, description="centroids of the dictionary")
    dimensions: int = Field(
        256, ge=2, description="length of the vector, after a whitening projection of the pooled activations"
    )
    fit_images: int = Field(
        2_000, ge=10, description="pool images in the seeded sample that the dictionary is fitted on"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _patches_fit(self) -> PatchDictionary:
        if self.patch > self.size:
            raise ValueError(f"patch {self.patch} is larger than size {self.size}: make it at most {self.size}")
        return self


Embedder = Annotated[
    PatchDictionary | OnnxEmbedder | TorchScriptEmbedder | PrecomputedEmbedder, Field(discriminator="kind")
]


class Embed(Strict):
    """Which network turns images into vectors."""

    semantic: Embedder = Field(PatchDictionary(), description="vectors for clustering and retrieval")
    dedup: Literal["semantic"] | Embedder = Field(
        "semantic", description="vectors for dedup: `semantic`, or an embedder of its own"
    )


class Filter(Strict):
    """Masks between embed and dedup; changing one re-embeds nothing."""

    min_side: int = Field(16, ge=1, description="drop images whose shorter side is below this, pixels")


class Dedup(Strict):
    """Near-duplicates within the pool and against reference and included sets (DINOv2, section 3)."""

    within: bool = Field(
        True,
        description="drop near-duplicates within the pool; false compares it with reference and included sets only",
    )
    k: int = Field(64, ge=1, description="nearest neighbours searched for each image")
    threshold: Literal["auto"] | Annotated[float, Field(gt=-1, le=1)] = Field(
        "auto", description="cosine above which two images are copies; `auto` calibrates; 0.6 is right for SSCD only"
    )
    reference_threshold: Literal["auto"] | Annotated[float, Field(gt=-1, le=1)] = Field(
        "auto", description="the same against reference sets, where a miss costs more; 0.45 is right for SSCD only"
    )
    phash_distance: int = Field(4, ge=0, le=16, description="perceptual hashes at most this many bits apart are copies")
    max_group: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto",
        description="pool images in a group of copies above which the run stops; auto: max(100, 0.1 % of the pool)",
    )
    verify: Literal["none", "pixels"] = Field("pixels", description="check candidate pairs on their thumbnails")
    calibration_images: int = Field(200, ge=20, description="pool images that `auto` makes copies of")
    part_images: int = Field(4_096, ge=1, description="queries per part of the neighbour search; speed only")


class Clustering(Strict):
    """k-means of the kept pool images."""

    k: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="clusters; auto: max(N / 7440, min(N / 50, 256)) for N kept images (7440 = LVD-142M's mean)"
    )
    iterations: int = Field(20, ge=1, description="Lloyd steps")
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


class CurationConfig(Strict):
    """The curation half of a configuration file."""

    store: str = Field("./runs", min_length=1, description="where everything is kept: any fsspec URL")
    pool: tuple[Source, ...] = Field(min_length=1, description="the uncurated images")
    curated: tuple[CuratedSet, ...] = ()
    reference: tuple[ReferenceSet, ...] = ()
    targets: tuple[TargetSet, ...] = ()
    ingest: Ingest = Ingest()
    embed: Embed = Embed()
    filter: Filter = Filter()
    neighbors: Literal["auto", "exact", "ivfpq", "hnsw"] = Field(
        "auto",
        description="search; auto: exact up to queries x vectors x dimensions = 2e13, then ivfpq; hnsw: slow build",
    )
    dedup: Dedup = Dedup()
    cluster: Clustering = Clustering()
    shards: Shards = Shards()
    resources: Resources = Resources()

    @property
    def named_sets(self) -> tuple[CuratedSet | ReferenceSet | TargetSet, ...]:
        """Every set but the pool."""
        return (*self.curated, *self.reference, *self.targets)

    @field_validator("pool", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"uri": value}]
        if isinstance(value, list | tuple):
            return [{"uri": entry} if isinstance(entry, str) else entry for entry in value]
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> CurationConfig:
        names = ["pool", "all", *(s.name for s in self.named_sets)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"set names must differ, and `pool` and `all` are taken; used twice: {', '.join(twice)}")
        return self


Config = TypeVar("Config", bound=CurationConfig)


def load(model: type[Config], path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and validates.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {file}: `lodeset init {file}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} must hold a mapping of keys to values, not {type(tree).__name__}; `pool:` is the one key it needs"
        )
    for override in overrides:
        _override(tree, override)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{file}:\n" + "\n".join(_explain(model, error.errors()))) from None
    return _absolute(config, file.resolve().parent)


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: expected key.path=value, e.g. --set dedup.threshold=0.55")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    node: Any = tree
    *parents, last = dotted.split(".")
    for key in parents:
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise ConfigError(f"--set {override}: `{key}` is not a section of the configuration")
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override}: `{last}` has no section to be set in")


def _explain(model: type[BaseModel], problems: list[Any]) -> list[str]:
    """One line a key; what the members of a union each have to say is joined."""
    schema = model.model_json_schema()
    told: dict[str, list[str]] = {}
    for problem in problems:
        path = _path(schema, problem["loc"])
        where = ".".join(path) or "(top level)"
        if problem["type"] == "extra_forbidden":
            known = _keys_near(schema, problem["loc"][:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"
            line, message = where, f"unknown key; {hint}"
        elif problem["type"] == "missing":
            line, message = where, "required, and missing"
        else:
            value = repr(problem.get("input"))
            line = f"{where} = {value if len(value) <= 80 else value[:77] + '...'}"
            message = re.sub(r"^Value error, ", "", problem["msg"])
        if message not in told.setdefault(line, []):
            told[line].append(message)
    return [f"  {line}: {', or '.join(messages)}" for line, messages in told.items()]


def _path(schema: dict[str, Any], location: tuple[Any, ...]) -> list[str]:
    """The keys and list positions of a location, without the names of union members that pydantic puts between them."""
    path: list[str] = []
    for at, step in enumerate(location):
        last = at == len(location) - 1
        if (
            isinstance(step, int)
            or step in _keys_near(schema, location[:at])
            or (last and "[" not in step and "-" not in step)
        ):
            path.append(str(step))
    return path


def _keys_near(schema: dict[str, Any], location: tuple[Any, ...]) -> list[str]:
    """Property names at `location`; a union contributes the names of all its members."""
    nodes = [schema]
    for step in (*location, None):
        expanded: list[dict[str, Any]] = []
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if "$ref" in node:
                stack.append(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
            stack.extend(node.get("anyOf", []) + node.get("oneOf", []))
            expanded.append(node)
        if step is None:
            return sorted({key for node in expanded for key in node.get("properties", {})})
        if isinstance(step, int):
            nodes = [node["items"] for node in expanded if "items" in node] or expanded
        else:
            # A union's discriminator value appears in the location but not in the schema: stay where we are.
            nodes = [node["properties"][step] for node in expanded if step in node.get("properties", {})] or expanded
    return []


def resolve(uri: str, base: Path) -> str:
    """A path as written in the file -> an absolute one; URLs with a protocol stay as they are."""
    if "://" in uri or uri.startswith("memory:"):
        return uri
    return str((base / Path(uri).expanduser()).absolute())


def _absolute(config: Config, base: Path) -> Config:
    def walk(node: Any) -> Any:
        if isinstance(node, BaseModel):
            changed = {}
            for key in type(node).model_fields:
                value = getattr(node, key)
                if key in ("uri", "path", "store") and isinstance(value, str):
                    changed[key] = resolve(value, base)
                else:
                    changed[key] = walk(value)
            return node.model_copy(update=changed)
        if isinstance(node, tuple):
            return tuple(walk(entry) for entry in node)
        return node

    return walk(config)  # type: ignore[no-any-return]  # walk keeps the type of its argument
