"""The stages that make a run ready to be looked at. They hang below what the run made, and change none of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lodeset.pipeline.dag.stage import Input, Stage, deferred, finished, read_as
from lodeset.pipeline.dag.store import Artifact
from lodeset.pipeline.specs import IMAGES, DedupSpec, Listed

# The stages whose artifacts no run has on record: they are about a run, and go when it does.
INSPECT = "inspect"
ABOUT_RUNS = ("thumbnails", "fit_map", INSPECT)
MAP_SAMPLE = 100_000  # images that the map is fitted on
SIDE, QUALITY = 128, 75  # of thumbnails: pixels, and WebP's


@dataclass(frozen=True, kw_only=True)
class ThumbnailsSpec:
    VERSION: ClassVar[int] = 1
    side: int = SIDE
    quality: int = QUALITY


@dataclass(frozen=True, kw_only=True)
class ThumbnailsRuntime:
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class FitMapSpec:
    """`space` is the digest of what makes vectors comparable: the embedder, and what was fitted for it."""

    VERSION: ClassVar[int] = 2
    method: Literal["pca", "umap"] = "pca"
    sample: int = MAP_SAMPLE
    space: Any


@dataclass(frozen=True, kw_only=True)
class InspectSpec:
    """`sets` maps each ingested set to the part that it plays: pool, reference, included, curated or target."""

    VERSION: ClassVar[int] = 3
    sets: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class InspectDetails:
    """Of each setting of dedup that can be tried: its name, present value, and the values between which the stored pairs can tell.

    Attributes:
        pool: pool images that dedup compared; None before dedup.
    """

    images: int = 0
    pool: int | None = None
    settings: tuple[Mapping[str, Any], ...] = ()


def stages(
    made: Mapping[str, Artifact], thumbnails: bool = True, method: Literal["pca", "umap"] = "pca"
) -> dict[str, Stage]:
    """The stages that inspect a run's artifacts, by id; none before the pool is ingested. `method` is that of the map."""
    sets = sets_of(made)
    if "pool" not in sets:
        return {}
    given = {id_: finished(artifact) for id_, artifact in made.items()}
    found: list[Stage] = []
    images = {name: given[images_id(made, name)] for name in sets}
    inputs = {f"images:{name}": Input(stage) for name, stage in images.items()}
    if thumbnails:
        small = Stage(
            "thumbnails",
            "all",
            ThumbnailsSpec.VERSION,
            "ray",
            deferred("lodeset.pipeline.stages.inspect.thumbnails:run"),
            spec=ThumbnailsSpec(),
            inputs={f"images:{name}": Input(stage, IMAGES) for name, stage in images.items()},
            runtime=ThumbnailsRuntime(
                max_pixels=max(read_as(Listed, made[f"ingest/{name}"].config).max_pixels for name in sets)
            ),
            seconds_per_image=0.002,
        )
        found.append(small)
        inputs["thumbnails"] = Input(small)
    if "embed/pool" in made:
        vectors = made["embed/pool"]
        fitted = Stage(
            "fit_map",
            "pool",
            FitMapSpec.VERSION,
            "beam",
            deferred("lodeset.pipeline.stages.inspect.fit_map:run"),
            spec=FitMapSpec(method=method, space=[vectors.config, vectors.inputs.get("fitted", {}).get("identity")]),
            inputs={"vectors": Input(given["embed/pool"])},
            max_cpus=2 if method == "umap" else 1,
            frozen=True,
            seconds_per_image=0.003 if method == "umap" else 0.00001,
        )
        found.append(fitted)
        inputs["map"] = Input(fitted)
    inputs |= {f"vectors:{stage.set}": Input(stage) for stage in given.values() if stage.name == "embed"}
    inputs |= {role: Input(given[id_]) for id_, role in _ROLES.items() if id_ in given}
    inspected = Stage(
        INSPECT,
        "all",
        InspectSpec.VERSION,
        "beam",
        deferred("lodeset.pipeline.stages.inspect.run:run"),
        spec=InspectSpec(sets=sets),
        inputs=inputs,
        seconds_per_image=0.00006,
    )
    return {stage.id: stage for stage in (*found, inspected)}


_ROLES = {
    "filter/pool": "masked",
    "dedup/pool": "dedup",
    "semdedup/pool": "semantic",
    "calibrate/pool": "calibration",
    "fit_clusters/pool": "centroids",
    "cluster/pool": "clusters",
    "retrieve/all": "selected",
    "write_shards/all": "written",
}


def sets_of(made: Mapping[str, Artifact]) -> dict[str, str]:
    """The ingested sets and their parts, the pool first."""
    dedup = made.get("dedup/pool")
    roles = dict(read_as(DedupSpec, dedup.config).roles) if dedup is not None else {}
    names = [artifact.set for artifact in made.values() if artifact.stage == "ingest"]
    curated = {artifact.set for artifact in made.values() if artifact.stage == "retrieve"}
    parts = {name: roles.get(name) or ("curated" if name in curated else "target") for name in names}
    return dict(
        sorted({**parts, **({"pool": "pool"} if "pool" in parts else {})}.items(), key=lambda x: x[0] != "pool")
    )


def images_id(made: Mapping[str, Artifact], name: str) -> str:
    """The stage whose images a set consists of."""
    return f"blur_faces/{name}" if f"blur_faces/{name}" in made else f"ingest/{name}"
