"""The definition of each stage of curation, and how it runs: the two dataclasses that its `Context` carries.

A `...Spec` enters the stage's fingerprint, so its field names are part of every store; its `VERSION` is raised whenever
the results of the stage's function change. A `...Runtime` never enters it. A `...Details` is what a stage records in
its manifest for other stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lodeset.pipeline.algorithms.copies.keepers import KeeperRule
from lodeset.pipeline.by_hand import IdList, Lists
from lodeset.pipeline.config import AsIs, Cluster, Ingest, Neighbors, Sample
from lodeset.pipeline.dag.fingerprint import digest, optional
from lodeset.pipeline.dag.store import Artifact
from lodeset.pipeline.deduplication import MaxGroup, Threshold
from lodeset.pipeline.embedders import Knobs
from lodeset.pipeline.embedders.config import PatchDictionary
from lodeset.pipeline.filters.config import Faces
from lodeset.pipeline.sources.containers import container_of
from lodeset.pipeline.sources.listing import SourceFile

Identity = Mapping[str, Any]  # identity of a model: its settings, and the digest of its bytes

# The digests of content that ingest (and blur_faces after it), dedup, fit_clusters and write_shards record: a stage
# that depends only on one of them runs again only when that one changes.
IMAGES, METADATA, KEPT, CENTROIDS, SHARDS = "images", "metadata", "kept", "centroids", "images"


# -- ingest


@dataclass(frozen=True, kw_only=True)
class IngestSpec:
    """The limits of ingest, and the content of its sources.

    Attributes:
        listing: digest of everything that determines which bytes are read.
    """

    VERSION: ClassVar[int] = 8
    limits: Ingest
    files: int
    size_bytes: int
    listing: str

    def identity(self) -> Identity:
        knobs = self.limits.model_dump(exclude={"slice_mb", "limit", "on_unreadable"})
        limit = {} if self.limits.limit is None else {"limit": self.limits.limit}
        return {**knobs, "files": self.files, "size_bytes": self.size_bytes, "listing": self.listing, **limit}


@dataclass(frozen=True, kw_only=True)
class IngestRuntime:
    """The files to read, the options of Beam, and the folders that were left out because lodeset made them."""

    files: tuple[SourceFile, ...]
    beam: Mapping[str, str]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What the manifest of an ingested set records about its sources."""

    size_bytes: int = 0
    limit: int | None = None
    max_pixels: int = 0


# -- embedders


@dataclass(frozen=True, kw_only=True)
class FitEmbedderSpec:
    VERSION: ClassVar[int] = 2
    embedder: Identity
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class FitEmbedderRuntime:
    embedder: PatchDictionary
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class EmbedSpec:
    VERSION: ClassVar[int] = 1
    embedder: Identity


@dataclass(frozen=True, kw_only=True)
class EmbedderRuntime:
    """How a stage embeds images (embed, calibrate).

    Attributes:
        may_find_nothing: whether precomputed vectors may be missing for all images. For a set that is only used for
        evaluation,
            vectors show how good the embedder is, and nothing else needs them.
    """

    embedder: Knobs
    max_pixels: int
    may_find_nothing: bool = False


@dataclass(frozen=True, kw_only=True)
class CalibrateSpec:
    VERSION: ClassVar[int] = 1
    calibration_images: int
    embedder: Identity
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class CalibrateDetails:
    """Thresholds (`pool`, `reference`) with and without a comparison of pixels; None if they could not be learned."""

    parts: int = 0
    parts_made: int = 0
    candidates: Mapping[str, float]
    median_similarity: Mapping[str, float] = field(default_factory=dict)
    unverified: Mapping[str, float] | None = None


# -- filters


@dataclass(frozen=True, kw_only=True)
class BlurFacesSpec:
    """Like ingest, this stage records locations of bytes, some of them in the store: `store` is the digest of its
    URL.
    """

    VERSION: ClassVar[int] = 1
    detector: Identity
    store: str


@dataclass(frozen=True, kw_only=True)
class BlurFacesRuntime:
    faces: Faces
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    VERSION: ClassVar[int] = 1
    scorers: Mapping[str, Identity]


@dataclass(frozen=True, kw_only=True)
class ScoreRuntime:
    """What images are compared with, by the settings of the active filters (`filters/masks.py`)."""

    masks: Mapping[str, Any]
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """The thresholds of the active filters, by setting; blocklists, and lists by hand (`by_hand.drop`, `by_hand.keep`), by their
    digest, because they can be long.
    """

    VERSION: ClassVar[int] = 3
    thresholds: Mapping[str, Any]
    by_hand: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> Identity:
        return {**self.thresholds, **self.by_hand}


@dataclass(frozen=True, kw_only=True)
class FilterRuntime:
    """As for `score`, and the lists of images to drop and to keep."""

    masks: Mapping[str, Any]
    lists: Lists = field(default_factory=Lists)


@dataclass(frozen=True, kw_only=True)
class FilterDetails:
    """`with_url`: number of images whose metadata contain a URL, if there are blocklists."""

    parts: int
    parts_made: int
    with_url: int | None = None
    warnings: Sequence[str] | None = None


# -- dedup

Roles = Mapping[str, str]  # the sets that dedup compares, and the role of each: pool, reference, included


@dataclass(frozen=True, kw_only=True)
class DedupSpec:
    """The settings of `dedup`, with the digests of the models that weigh pairs if pixels are compared."""

    VERSION: ClassVar[int] = 8
    within: bool
    k: int
    threshold: Threshold
    reference_threshold: Threshold
    phash_distance: int
    max_group: MaxGroup
    verify: Literal["none", "pixels"]
    keeper: tuple[KeeperRule, ...]
    roles: Roles
    neighbors: Neighbors
    limit: int | None
    name: str
    min_score: float = 0.0
    closeups: str | bool | None = optional()
    details: str | None = optional()
    min_detail_score: float | None = optional()
    copies: str | None = optional()
    kept_by_hand: Identity | None = None  # the ids of `by_hand.keep`

    def identity(self) -> Identity:
        tree = {name: value for name, value in vars(self).items() if value is not None or name == "limit"}
        if self.kept_by_hand is not None:
            tree["by_hand.keep"] = tree.pop("kept_by_hand")
        if self.verify == "none":
            del tree["min_score"]
        return tree


@dataclass(frozen=True, kw_only=True)
class DedupRuntime:
    """`keep`: the lists of images that are kept beside their copies."""

    part_images: int
    max_pixels: int
    keep: tuple[IdList, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DedupDetails:
    """The thresholds that were used, the groups of copies, and by set: its role, images dropped because of it, its
    images involved.
    """

    threshold: float
    reference_threshold: float
    groups: int = 0
    largest_group: int = 0
    leaks: Mapping[str, Mapping[str, Any]]
    leaked_by_set: Mapping[str, int] = field(default_factory=dict)
    kept_by_hand: int | None = None  # images of `by_hand.keep` that are kept, where there is such a list


# -- clusters


@dataclass(frozen=True, kw_only=True)
class FitClustersSpec:
    VERSION: ClassVar[int] = 3
    k: Literal["auto"] | int | tuple[int, ...]
    iterations: int
    spherical: bool
    drift: float
    seed: int
    embedder: Identity
    limit: int | None
    name: str
    resampling: int | None = optional()  # of the levels above the lowest, if there are any


@dataclass(frozen=True, kw_only=True)
class FitClustersDetails:
    """`k` clusters on the lowest of the `levels`; `drift` is that of the images since the fit, if the clusters were
    kept.
    """

    k: int
    levels: Sequence[int]
    mean_squared_distance: float
    steps: int = 0
    parts: int = 0
    parts_made: int = 0
    drift: float | None = None
    refitted_at_drift: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """The centroids determine everything."""

    VERSION: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class SemdedupSpec:
    """What is dropped within clusters as a semantic duplicate, and which of several stays."""

    VERSION: ClassVar[int] = 1
    eps: float
    keep: Literal["far", "centroid", "random"]
    seed: int


@dataclass(frozen=True, kw_only=True)
class ClusterDetails:
    k: int
    largest: int
    empty: int
    parts: int = 0
    parts_made: int = 0


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    VERSION: ClassVar[int] = 1
    images: int
    seed: int


# -- retrieval


@dataclass(frozen=True, kw_only=True)
class RetrieveSpec:
    """What a curated set requests. `neighbors` matters only if each image requests its nearest neighbors.

    Attributes:
        pool_ids: the ids of the set's images, where these are images of the pool.
        include: whether these are selected themselves.
    """

    VERSION: ClassVar[int] = 2
    mode: AsIs | Sample | Cluster
    neighbors: Neighbors
    pool_ids: Identity | None = None
    include: bool = False

    def identity(self) -> Identity:
        knobs = self.mode.model_dump(exclude={"part_images"})
        if self.pool_ids is not None:
            knobs |= {"pool_ids": self.pool_ids, "include": self.include}
        return {**knobs, "neighbors": self.neighbors} if isinstance(self.mode, Sample) else knobs


@dataclass(frozen=True, kw_only=True)
class RetrieveRuntime:
    """The list of the set's images, where these are images of the pool."""

    pool_ids: IdList | None = None


@dataclass(frozen=True, kw_only=True)
class RetrieveDetails:
    """What a set requested and got: asked = retrieved + short, and retrieved = distinct + collisions + capped.

    Attributes:
        asked: k x N, or per_cluster for each matching cluster; `short` is what the pool or a cluster lacks.
        retrieved: hits, as counted in LVD-142M's table.
        distinct: images that the set gets; `collisions` are hits on images that it already has.
        capped: what its limit removes.
        queries: images of the pool that the set consists of, where a list names them.
    """

    asked: int
    retrieved: int
    distinct: int
    collisions: int = 0
    short: int = 0
    capped: int = 0
    warnings: Sequence[str] | None = None
    queries: int | None = None


@dataclass(frozen=True, kw_only=True)
class SelectSpec:
    """`retrieve/all`: the sets, and how images that several of them select are treated."""

    VERSION: ClassVar[int] = 2
    everything: bool
    sets: Sequence[str]
    shared: Literal["each", "best"]


@dataclass(frozen=True, kw_only=True)
class SelectDetails:
    """Sums over the sets, and the number of images that several sets select (`shared`)."""

    distinct: int = 0
    asked: int = 0
    retrieved: int = 0
    collisions: int = 0
    short: int = 0
    capped: int = 0
    shared: int = 0
    shared_by_set: Mapping[str, int] = field(default_factory=dict)
    as_is_by_set: Mapping[str, int] = field(default_factory=dict)


# -- shards


@dataclass(frozen=True, kw_only=True)
class WriteShardsSpec:
    VERSION: ClassVar[int] = 4
    size_mb: float
    seed: int
    limit: int | None
    name: str


@dataclass(frozen=True, kw_only=True)
class WriteShardsRuntime:
    """The options of Beam, and the artifact whose shards the images are read from if these are rewritten."""

    beam: Mapping[str, str]
    rewritten: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class WriteShardsDetails:
    """`shards_numbered` counts all shards that were ever written; `since` lists the changes since the previous run."""

    folder: str
    shards: int = 0
    shards_numbered: int
    parts: int = 0
    parts_made: int = 0
    size_bytes: int = 0
    written_bytes: int = 0
    dead_bytes: int = 0
    warnings: Sequence[str] = ()
    since: Mapping[str, Any] | None = None


def _read_as(file: SourceFile) -> tuple[object, ...]:
    """How a file is read, if that differs from lodeset 0.1.0."""
    container = container_of(file.kind)
    return (container.kind, container.version, file.folder) if container is not None and container.version else ()


def listing_of(files: Sequence[SourceFile]) -> str:
    """Digest of everything that determines what is read: the draw of a limit depends on relative paths and on files of
    the same name.
    """
    return digest(
        [
            (
                *(f.uri, f.relative, f.namesakes, f.size_bytes, f.state, f.image, f.refused),
                *(f.members.include, f.members.exclude),
                *_read_as(f),
            )
            for f in files
        ]
    )
