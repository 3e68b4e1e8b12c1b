"""Cluster sizes, and some images of the largest clusters."""

from __future__ import annotations

from itertools import pairwise

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Clusters
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    clusters = finished.report.clusters
    pictures = [image_id for cluster in clusters.largest for image_id in cluster.image_ids] if clusters else []
    return Contents(values={"cluster_chart": _cluster_chart(clusters)}, pictures=pictures)


def _cluster_chart(clusters: Clusters | None) -> Markup:
    """Number of clusters by size, in bins that double."""
    if clusters is None or not clusters.sizes:
        return Markup("")
    edges = [1]
    while edges[-1] <= clusters.sizes[0]:
        edges.append(edges[-1] * 2)
    bins = [(low, high - 1, sum(low <= size < high for size in clusters.sizes)) for low, high in pairwise(edges)]
    first = next(n for n, (_, _, count) in enumerate(bins) if count)
    bars = [(f"{low}" if low == high else f"{low}–{high}", float(count)) for low, high, count in bins[first:]]
    return charts.bar_chart(bars, "images in the cluster", "clusters", width=max(320, 70 * len(bars)))


SECTION = Section(
    id="clusters",
    title="Clusters",
    needs=("cluster/*",),
    collect=_collect,
    template=stored("clusters.html.jinja"),
)
