"""The pages of the dashboard, in the order of the navigation."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter

from lodeset.infra.dashboard.pages import (
    audit,
    clusters,
    commit,
    diff,
    duplicates,
    export,
    image,
    images,
    lists,
    map,
    pictures,
    retrieval,
    runs,
    search,
    shards,
    training,
)


@dataclass(frozen=True)
class Page:
    """One entry of the navigation.

    Attributes:
        id: a short name, e.g. `map`.
        title: what the navigation calls it.
        path: its address below the base path, e.g. `/map`.
        router: its routes, all of them below `path`.
    """

    id: str
    title: str
    path: str
    router: APIRouter


PAGES: tuple[Page, ...] = (
    Page("runs", "Runs", "/", runs.router),
    Page("duplicates", "Duplicates", "/duplicates", duplicates.router),
    Page("audit", "Audit", "/audit", audit.router),
    Page("map", "Map", "/map", map.router),
    Page("images", "Images", "/images", images.router),
    Page("clusters", "Clusters", "/clusters", clusters.router),
    Page("retrieval", "Retrieval", "/retrieval", retrieval.router),
    Page("shards", "Shards", "/shards", shards.router),
    Page("training", "Training", "/training", training.router),
    Page("commit", "Commit", "/commit", commit.router),
)
# Routes of pages that others link to.
BELOW: tuple[APIRouter, ...] = (
    diff.router,
    pictures.router,
    export.router,
    lists.router,
    image.router,
    search.router,
)
# Addresses below no page of the navigation -> the page that they belong to.
HOMES = {"/diff": "runs"}
