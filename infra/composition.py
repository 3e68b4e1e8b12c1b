"""How many images each curated set will contribute, set by set, as in LVD-142M's table (DINOv2, appendix A.4).

Computed from the counts of earlier runs, or otherwise from the figures under `expected`, so that a data set can be
composed before any image exists. As in the paper's table, the total is a sum over rows: an image that several sets
select counts in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lodeset.infra.config import Config
from lodeset.pipeline.by_hand import BY_HAND, read_list
from lodeset.pipeline.config import AsIs, Cluster, CuratedSet, Sample
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import Listed, RetrieveDetails, SelectDetails


@dataclass(frozen=True)
class Row:
    """The contribution of one set in one mode. None stands for an unknown figure.

    Attributes:
        images: number of images of the set itself (N).
        retrieved: number before collisions and limits: k x N, or the size of the matching clusters.
        final: number of images that the set contributes.
        basis: origin of the figures, in words.
        expected: what the configuration expects (or a paper published) for `final`.
    """

    set: str
    mode: str
    images: int | None
    retrieved: int | None
    final: int | None
    basis: str
    expected: int | None

    @property
    def difference(self) -> int | None:
        """`final` - `expected`."""
        return None if self.final is None or self.expected is None else self.final - self.expected


@dataclass(frozen=True)
class Composition:
    rows: tuple[Row, ...]

    @property
    def known(self) -> bool:
        """Whether any figure is known."""
        return any(row.final is not None or row.expected is not None for row in self.rows)

    @property
    def final(self) -> int:
        """The sum of the known figures."""
        return sum(row.final for row in self.rows if row.final is not None)

    @property
    def expected(self) -> int | None:
        """The sum of the expected figures; None unless all rows have one."""
        figures = [row.expected for row in self.rows if row.expected is not None]
        return sum(figures) if figures and len(figures) == len(self.rows) else None

    @property
    def unknown(self) -> tuple[str, ...]:
        """Sets with a row whose figures are unknown until the set has been read or retrieved once."""
        return tuple(dict.fromkeys(row.set for row in self.rows if row.final is None))


def compose(config: Config, store: Store, artifacts: Mapping[str, Artifact]) -> Composition:
    """The rows in the order of the configuration; `artifacts` are the finished stages by id (none is required)."""
    limit = config.ingest.limit
    pool = min((n for n in (_counted(store, artifacts, "pool"), limit) if n is not None), default=None)
    rows: list[Row] = []
    for curated in config.curated:
        images, basis = _images(store, artifacts, curated)
        if curated.include:
            published = curated.expected.images if curated.expected else None
            together = artifacts.get("retrieve/all")
            own = "as_is" if curated.pool_ids is None else BY_HAND
            if together is None:
                rows.append(Row(curated.name, own, images, None, images, basis, published))
            else:
                remaining = read_as(SelectDetails, together.details).as_is_by_set[curated.name]
                rows.append(Row(curated.name, own, images, None, remaining, "measured", published))
        if not isinstance(curated.retrieve, AsIs):
            retrieved, final, how = _retrieved(store, artifacts, curated, images, basis, pool)
            published = curated.expected.final if curated.expected else None
            rows.append(Row(curated.name, curated.retrieve.mode, images, retrieved, final, how, published))
    return Composition(tuple(rows))


def _counted(store: Store, artifacts: Mapping[str, Artifact], name: str) -> int | None:
    """Distinct, readable images of a set: as ingested now, or by the last run that ingested the whole set."""
    artifact = artifacts.get(f"ingest/{name}")
    if artifact is None:
        artifact = next((a for a in store.history("ingest", name) if read_as(Listed, a.config).limit is None), None)
    return None if artifact is None else artifact.rows.kept


def _images(store: Store, artifacts: Mapping[str, Artifact], curated: CuratedSet) -> tuple[int | None, str]:
    if curated.pool_ids is not None:
        return _listed(artifacts, curated)
    counted = _counted(store, artifacts, curated.name)
    if counted is not None:
        return counted, "ingested"
    if curated.expected is not None:
        return curated.expected.images, "expected"
    return None, "not ingested yet"


def _listed(artifacts: Mapping[str, Artifact], curated: CuratedSet) -> tuple[int | None, str]:
    """The images of a set that a list of the pool's images names: those that retrieve found there, or else the list's ids."""
    done = artifacts.get(f"retrieve/{curated.name}")
    if done is not None:
        return read_as(RetrieveDetails, done.details).queries, "in the pool"
    try:
        return len(read_list(str(curated.pool_ids), f"curated {curated.name}: pool_ids").ids), "listed"
    except LodesetError:
        if curated.expected is not None:
            return curated.expected.images, "expected"
        return None, "the list cannot be read"


def _retrieved(
    store: Store,
    artifacts: Mapping[str, Artifact],
    curated: CuratedSet,
    images: int | None,
    basis: str,
    pool: int | None,
) -> tuple[int | None, int | None, str]:
    """Retrieved and final figures, and their origin; `basis` is the origin of the set's number of images."""
    done = artifacts.get(f"retrieve/{curated.name}")
    if done is not None:
        details = read_as(RetrieveDetails, done.details)
        return details.retrieved, details.distinct, "measured"
    mode = curated.retrieve
    if isinstance(mode, Sample):
        requested = None if images is None else mode.k * images
        if requested is not None and pool is not None and requested > pool:
            return requested, pool, f"{mode.k} x N, no more than the pool's {pool:,}"
        return requested, requested, f"{mode.k} x N, N {basis}"
    if isinstance(mode, Cluster):
        before = _clusters_gave(store, curated.name, mode)
        if before is not None:
            return before, min(before, mode.limit), "clusters of an earlier run"
        if curated.expected is not None and curated.expected.retrieved is not None:
            return curated.expected.retrieved, min(curated.expected.retrieved, mode.limit), "expected"
    return None, None, "known after the first retrieval"


def _clusters_gave(store: Store, name: str, mode: Cluster) -> int | None:
    """The size of the matching clusters for this set before its limit, in the last run with the same settings."""
    for earlier in store.history("retrieve", name):
        same = all(earlier.config.get(key) == getattr(mode, key) for key in ("mode", "per_cluster", "min_matches"))
        if same and "retrieved" in earlier.details:
            return read_as(RetrieveDetails, earlier.details).retrieved
    return None
