"""How many images each curated set will bring, set by set, as LVD-142M's table lists them (DINOv2, appendix A.4).

Reckoned from what earlier runs counted, or else from the figures under `expected`, so that a data set can be composed
before a single image is there. Like the paper's table, a sum over rows: an image that several sets want counts in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lodeset.infra.config import Config
from lodeset.pipeline.config import AsIs, Cluster, CuratedSet, Sample
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.specs import Listed, RetrieveDetails, SelectDetails


@dataclass(frozen=True)
class Row:
    """What one set brings in one way. None where nothing is known yet.

    Attributes:
        images: of the set itself (N).
        retrieved: before collisions and limits are taken off: k x N, or what matching clusters give.
        final: images that come in.
        basis: where the figures come from, in words.
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
        """Whether there is any figure to show."""
        return any(row.final is not None or row.expected is not None for row in self.rows)

    @property
    def final(self) -> int:
        """The sum of what is known."""
        return sum(row.final for row in self.rows if row.final is not None)

    @property
    def expected(self) -> int | None:
        """The sum of what is expected; None unless all rows say it."""
        figures = [row.expected for row in self.rows if row.expected is not None]
        return sum(figures) if figures and len(figures) == len(self.rows) else None

    @property
    def unknown(self) -> tuple[str, ...]:
        """Sets with a row of which nothing is known before they were read or retrieved once."""
        return tuple(dict.fromkeys(row.set for row in self.rows if row.final is None))


def compose(config: Config, store: Store, artifacts: Mapping[str, Artifact]) -> Composition:
    """The rows in the order of the configuration; `artifacts` are the finished stages by id (none is needed)."""
    limit = config.ingest.limit
    pool = min((n for n in (_counted(store, artifacts, "pool"), limit) if n is not None), default=None)
    rows: list[Row] = []
    for one in config.curated:
        images, basis = _images(store, artifacts, one)
        if one.include:
            published = one.expected.images if one.expected else None
            together = artifacts.get("retrieve/all")
            if together is None:
                rows.append(Row(one.name, "as_is", images, None, images, basis, published))
            else:
                left = read_as(SelectDetails, together.details).as_is_by_set[one.name]
                rows.append(Row(one.name, "as_is", images, None, left, "measured", published))
        if not isinstance(one.retrieve, AsIs):
            retrieved, final, how = _retrieved(store, artifacts, one, images, basis, pool)
            published = one.expected.final if one.expected else None
            rows.append(Row(one.name, one.retrieve.mode, images, retrieved, final, how, published))
    return Composition(tuple(rows))


def _counted(store: Store, artifacts: Mapping[str, Artifact], name: str) -> int | None:
    """Distinct, readable images of a set: as ingested now, or else by the last run that ingested it whole."""
    artifact = artifacts.get(f"ingest/{name}")
    if artifact is None:
        artifact = next((a for a in store.history("ingest", name) if read_as(Listed, a.config).limit is None), None)
    return None if artifact is None else artifact.rows.kept


def _images(store: Store, artifacts: Mapping[str, Artifact], one: CuratedSet) -> tuple[int | None, str]:
    counted = _counted(store, artifacts, one.name)
    if counted is not None:
        return counted, "ingested"
    if one.expected is not None:
        return one.expected.images, "expected"
    return None, "not ingested yet"


def _retrieved(
    store: Store,
    artifacts: Mapping[str, Artifact],
    one: CuratedSet,
    images: int | None,
    basis: str,
    pool: int | None,
) -> tuple[int | None, int | None, str]:
    """Retrieved, final, and where they come from; `basis` is where the number of its images comes from."""
    done = artifacts.get(f"retrieve/{one.name}")
    if done is not None:
        details = read_as(RetrieveDetails, done.details)
        return details.retrieved, details.distinct, "measured"
    mode = one.retrieve
    if isinstance(mode, Sample):
        asked = None if images is None else mode.k * images
        if asked is not None and pool is not None and asked > pool:
            return asked, pool, f"{mode.k} x N, no more than the pool's {pool:,}"
        return asked, asked, f"{mode.k} x N, N {basis}"
    if isinstance(mode, Cluster):
        before = _clusters_gave(store, one.name, mode)
        if before is not None:
            return before, min(before, mode.limit), "clusters of an earlier run"
        if one.expected is not None and one.expected.retrieved is not None:
            return one.expected.retrieved, min(one.expected.retrieved, mode.limit), "expected"
    return None, None, "known once it was retrieved"


def _clusters_gave(store: Store, name: str, mode: Cluster) -> int | None:
    """What matching clusters gave this set before its limit, in the last run that asked the same of them."""
    for earlier in store.history("retrieve", name):
        same = all(earlier.config.get(key) == getattr(mode, key) for key in ("mode", "per_cluster", "min_matches"))
        if same and "retrieved" in earlier.details:
            return read_as(RetrieveDetails, earlier.details).retrieved
    return None
