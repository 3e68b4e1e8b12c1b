"""The contents of the report as plain values. Images are identified by image_id; shares and accuracies lie between 0
and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lodeset.infra.report.pruned import SweepReport, TrainedReport
from lodeset.pipeline.dag.store import File
from lodeset.pipeline.specs import DedupDetails


@dataclass(frozen=True)
class Step:
    """One stage of one set, and its rows: taken = kept + dropped."""

    stage: str
    set: str
    finished: bool
    taken: int
    kept: int
    dropped: Mapping[str, int]
    seconds: float
    details: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Reject:
    """A file that ingest rejected."""

    name: str
    uri: str
    detail: str
    size_bytes: int


@dataclass(frozen=True)
class Rejected:
    """Files of one set that were rejected for one reason: their number, and some of them."""

    set: str
    reason: str
    count: int
    examples: tuple[Reject, ...]


@dataclass(frozen=True)
class Dropped:
    """Images of one set that one stage dropped: their number, and some of them."""

    stage: str
    set: str
    reason: str
    count: int
    image_ids: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)  # of some of the images, by image_id


@dataclass(frozen=True)
class Scored:
    """The scores that one filter gave the pool's images: `counts` between `edges` (one more), and what it drops
    alone.
    """

    filter: str
    keep: str  # above or below
    threshold: float
    images: int
    dropped: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """An image and the one that it is a copy of. If not `direct`, other copies link the two."""

    image_id: str
    matched_id: str
    direct: bool
    similarity: float | None
    phash_distance: int | None
    transform: str | None


@dataclass(frozen=True)
class Group:
    """A near-duplicate group of `size` pool images: the kept image, and its copies, the least similar first."""

    size: int
    keeper: str
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Leaked:
    """The effect of one reference or included set: images dropped because of it, and the number of its images that
    caused this.
    """

    set: str
    role: str
    dropped: int
    images: int


@dataclass(frozen=True)
class Dedup:
    """Near-duplicates, and what reference and included sets removed from the pool."""

    dropped: Mapping[str, int]
    details: DedupDetails
    config: Mapping[str, Any]
    largest: tuple[Group, ...]
    drawn: tuple[Group, ...]
    leaked: tuple[Leaked, ...]
    leaks: tuple[Copy, ...]
    included: tuple[Copy, ...]


@dataclass(frozen=True)
class Similarity:
    """Cosines of one kind of copy (or of different images) with their originals: 10 %, 50 % and 90 % quantiles."""

    kind: str
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Calibration:
    sampled: int
    kinds: tuple[Similarity, ...]


@dataclass(frozen=True)
class Cluster:
    number: int
    size: int
    image_ids: tuple[str, ...]


@dataclass(frozen=True)
class Clusters:
    k: int
    empty: int
    sizes: tuple[int, ...]  # of the clusters that are not empty, largest first
    largest: tuple[Cluster, ...]


@dataclass(frozen=True)
class Query:
    """A query image, its number of hits, and the most similar hits."""

    query_id: str
    found: int
    hits: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Retrieved:
    """What one curated set requested and got: asked = distinct + collisions + short + capped.

    `shared`: how many of its images other sets also select (None: not known yet).
    """

    set: str
    config: Mapping[str, Any]
    images: int | None  # of the set, embedded
    asked: int
    retrieved: int
    distinct: int
    collisions: int
    short: int
    capped: int
    shared: int | None
    median_similarity: float | None
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Shards:
    folder: str
    images: int
    size_bytes: int
    files: tuple[File, ...]
    changes: tuple[tuple[str, str, int], ...]  # since the previous run: added or removed, reason, number
    dead_bytes: int


@dataclass(frozen=True)
class Training:
    stage: str  # train, finish or distill
    summary: Mapping[str, Any]
    lines: tuple[Mapping[str, float], ...]  # of metrics.jsonl, thinned to POINTS


@dataclass(frozen=True)
class Scores:
    """Accuracies (0 to 1) on one target set: kNN by network and k, and those of the linear probe by network."""

    target: str
    gallery: int
    test: int
    classes: int
    knn: Mapping[str, Mapping[str, float]]
    pictures: tuple[tuple[str, str, str], ...]  # image_id, and as data URIs the image and its patches as colors
    pictured: str  # the network of these pictures
    linear: Mapping[str, Mapping[str, Any]]  # accuracy, features, lr; empty if it was not requested


@dataclass(frozen=True)
class Report:
    """The contents of the header and the sections. Values that are None or empty are not finished; `absent` says so, by
    stage.
    """

    store: str
    newest: float  # creation time of the newest artifact, seconds since 1970; 0 if there is none
    steps: tuple[Step, ...]
    rejected: tuple[Rejected, ...]
    dropped: tuple[Dropped, ...]
    scored: tuple[Scored, ...]
    dedup: Dedup | None
    calibration: Calibration | None
    clusters: Clusters | None
    retrieved: tuple[Retrieved, ...]
    shared: int | None  # images that several curated sets select
    shards: Shards | None
    training: tuple[Training, ...]  # in the order of their runs
    scores: tuple[Scores, ...]
    pruned: tuple[SweepReport | TrainedReport, ...]
    absent: Mapping[str, str]
