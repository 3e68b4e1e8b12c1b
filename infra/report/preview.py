"""Show pairs of images close to the threshold between copies and different images, to check it before anyone relies on
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lodeset.infra.report.pictures import load
from lodeset.infra.report.render import environment, save
from lodeset.pipeline.algorithms.sampling import seeded_order
from lodeset.pipeline.dag.decisions import Decision
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup import run as dedup
from lodeset.pipeline.tables import records

TEMPLATE = "preview.html.jinja"
# Intervals of the log-odds that get a section of the page each.
SCORES = (-np.inf, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
DETAILS = (-4.0, -2.0, 0.0)
# The same for the cosine, around the threshold.
COSINES = (-0.05, -0.02, 0.0, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Band:
    """Pairs that one rule judges alike; `pairs` are a seeded sample of them."""

    title: str
    copies: bool
    count: int
    pairs: tuple[Mapping[str, Any], ...]


def edges_of(store: Store, decision: Decision) -> tuple[File, ...]:
    """The edges of dedup for this configuration, even if its guard stopped it.

    Raises:
        LodesetError: dedup has not searched yet.
    """
    if decision.artifact is not None:
        return decision.artifact.tables["edges"]
    part = store.part(dedup.EDGES, dedup.edges_key(decision.fingerprint or ""))
    if part is None:
        raise LodesetError(f"{decision.stage.id} has not searched yet: {decision.reason}")
    return (part.files["edges"],)


def bands(store: Store, files: Sequence[File], spec: DedupSpec, threshold: float, each: int) -> list[Band]:
    """The pairs by the rule that decides on them, the least certain first; at most `each` of a band are kept."""
    rows: list[dict[str, Any]] = store.table(files, None, records.EDGES).drop_columns(["map"]).to_pylist()
    result: list[Band] = []

    def add(title: str, copies: bool, chosen: list[dict[str, Any]]) -> None:
        if chosen:
            order = seeded_order([row["image_id_a"] + row["image_id_b"] for row in chosen], seed=0)[:each]
            result.append(Band(title, copies, len(chosen), tuple(chosen[i] for i in order)))

    if spec.verify == "pixels":
        line = spec.min_score
        mates = [row for row in rows if parted(row, spec.min_detail_score)]
        for low, high in pairwise([-np.inf, *DETAILS, np.inf]):
            inside = [row for row in mates if low <= row["detail_score"] < high]
            upper = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} and more"
            span = upper if np.isfinite(low) else f"below {high:g}"
            add(f"alike, but other details, log-odds {span}: not taken", False, inside)
        rows = [row for row in rows if not parted(row, spec.min_detail_score)]
        edges = sorted({*SCORES, line})
        for low, high in zip(edges, [*edges[1:], np.inf], strict=True):
            inside = [row for row in rows if row["score"] is not None and low <= row["score"] < high]
            above = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} and more"
            above = above if np.isfinite(low) else f"below {high:g}"
            add(f"aligned, log-odds {above}: copies", True, [row for row in inside if row["linked"]])
            why = "too low" if low < line else "of a kind of picture, not above its surroundings"
            add(f"aligned, log-odds {above}: not taken, {why}", False, [row for row in inside if not row["linked"]])
        others = [row for row in rows if row["score"] is None]
        add("agree as they are, or mirrored: copies", True, [row for row in others if row["linked"]])
        add(
            "alike by vector or hash, but not in their pixels: not taken",
            False,
            [row for row in others if not row["linked"]],
        )
    else:
        lines = [-np.inf, *(threshold + step for step in COSINES)]
        for low, high in zip(lines, [*lines[1:], np.inf], strict=True):
            inside = [row for row in rows if row["similarity"] is not None and low < row["similarity"] <= high]
            span = f"up to {high:.3f}" if np.isinf(low) else f"{low:.3f} to {min(high, 1):.3f}"
            add(f"cosine {span}: copies", True, [row for row in inside if row["linked"]])
            add(f"cosine {span}: not taken", False, [row for row in inside if not row["linked"]])
        add("by perceptual hash alone: copies", True, [r for r in rows if r["similarity"] is None and r["linked"]])
    return result


def parted(edge: Mapping[str, Any], line: float | None) -> bool:
    """Whether the details of full images tell two images apart; edges of earlier versions do not know."""
    score = edge.get("detail_score")
    return line is not None and score is not None and score < line and not edge["linked"]


def write_preview(
    store: Store,
    artifacts: Mapping[str, Artifact],
    found: Sequence[Band],
    line: str,
    max_pixels: int,
    path: Path,
    title: str,
) -> Path:
    """Write one self-contained HTML page.

    Raises:
        LodesetError: `path` cannot be written.
    """
    ids = sorted({row[side] for band in found for row in band.pairs for side in ("image_id_a", "image_id_b")})
    pictures = load(store, artifacts, ids, max_pixels)
    template = environment("lodeset.infra.report").get_template(TEMPLATE)
    return save(template.render(bands=found, pictures=pictures, line=line, title=title), path)
