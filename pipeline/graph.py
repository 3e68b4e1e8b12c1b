"""READ FIRST: a configuration -> the stages of curation.

```
sources -> ingest -> embed -> filter -> dedup -> cluster -> (balance) -> retrieve -> write_shards
           (each set)         (pool; after score, where a filter looks at pixels)
```

With `filter.faces`, blur_faces stands between ingest and all that reads the pool.

Each stage is one function in `pipeline/stages/<name>.py`, of the same name; what it stores is a table of
`pipeline/tables/records.py`. Making this graph lists the sources and runs nothing. Training and pruning hang below it:
`training/graph.py`, `pruning/graph.py`; `infra/dag.py` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lodeset.pipeline.by_hand import IdList, identity_of, lists_of, read_list
from lodeset.pipeline.config import Balance, CurationConfig, Ingest, Source
from lodeset.pipeline.dag.fingerprint import canonical
from lodeset.pipeline.dag.stage import Follows, Input, Stage, deferred
from lodeset.pipeline.deduplication import Semantic, computed
from lodeset.pipeline.embedders import Knobs
from lodeset.pipeline.embedders.config import PatchDictionary, PrecomputedEmbedder
from lodeset.pipeline.embedders.models import identity, pinned
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.filters import graph as filters
from lodeset.pipeline.sources.listing import expand, image_bytes
from lodeset.pipeline.specs import (
    CENTROIDS,
    IMAGES,
    KEPT,
    METADATA,
    BalanceSpec,
    CalibrateSpec,
    ClusterSpec,
    DedupRuntime,
    DedupSpec,
    EmbedderRuntime,
    EmbedSpec,
    FitClustersSpec,
    FitEmbedderRuntime,
    FitEmbedderSpec,
    IngestRuntime,
    IngestSpec,
    RetrieveRuntime,
    RetrieveSpec,
    SelectSpec,
    SemdedupSpec,
    WriteShardsRuntime,
    WriteShardsSpec,
    listing_of,
)

BALANCED_BYTES = 40  # stored, of an image that balance draws


@dataclass(frozen=True)
class Embedding:
    """An embedder as stages need it: its knobs, what it is (its model's bytes are hashed once), and what fitted it."""

    config: Knobs
    identity: Mapping[str, Any]
    fitted: Stage | None
    suffix: str  # of the names of its stages


def build(config: CurationConfig) -> dict[str, Stage]:
    """The stages by id, in topological order.

    Raises:
        LodesetError: a source or a model is not there.
    """
    stages: list[Stage] = []

    def add(stage: Stage) -> Stage:
        stages.append(stage)
        return stage

    sets = sets_of(config)
    for name, sources in sets.items():
        if config.store in [one.uri for one in sources]:
            raise ConfigError(f"store and {name} are one folder, {config.store}: give `store:` a folder of its own")
    ingested = {
        name: add(ingest_stage(config.ingest, config.resources.beam, name, sources)) for name, sources in sets.items()
    }
    if config.filter.faces is not None:
        ingested["pool"] = add(filters.blur_faces_stage(config, config.filter.faces, ingested["pool"]))
    pool = ingested["pool"]

    def embedding(chosen: Knobs, suffix: str) -> Embedding:
        chosen = pinned(chosen)
        what = identity(chosen)
        fitted = None
        if isinstance(chosen, PatchDictionary):
            fitted = add(_fit_embedder(config, chosen, what, pool, suffix))
        return Embedding(chosen, what, fitted, suffix)

    semantic = embedding(config.embed.semantic, "")
    compared = roles_of(config)
    together = compared if _both_read_images(config) else {}
    vectors = {
        name: add(_embed(config, semantic, stage, (f"embed_dedup/{name}",) if name in together else ()))
        for name, stage in ingested.items()
    }

    for_dedup, dedup_vectors = semantic, vectors
    if config.embed.dedup != "semantic":
        for_dedup = embedding(config.embed.dedup, "_dedup")
        dedup_vectors = {name: add(_embed(config, for_dedup, ingested[name])) for name in compared}

    scored = filters.score_stage(config, pool)
    if scored:
        add(scored)
    lists = lists_of(config.by_hand)
    masked = add(filters.filter_stage(config, pool, scored, lists))
    calibration = None
    if "auto" in (config.dedup.threshold, config.dedup.reference_threshold):
        calibration = add(_calibrate(config, for_dedup, pool, dedup_vectors["pool"]))
    unique = add(_dedup(config, compared, ingested, dedup_vectors, masked, calibration, lists.keep))

    needs_clusters = (
        not config.curated
        or config.balance
        or config.dedup.semantic
        or any(c.retrieve.mode == "cluster" for c in config.curated)
    )
    centroids = clusters = None
    if needs_clusters:
        centroids = add(_fit_clusters(config, semantic, vectors["pool"], unique))
        clusters = add(_cluster(config, vectors["pool"], unique, centroids))
        if config.dedup.semantic is not None:
            # What comes after sees what this leaves, of the pool and of its clusters.
            unique = clusters = add(_semdedup(config.dedup.semantic, vectors["pool"], unique, centroids, clusters))
    retrieved = {
        one.name: add(_retrieve(config, index, vectors, unique, centroids, clusters))
        for index, one in enumerate(config.curated)
    }
    if config.balance and clusters:
        retrieved["pool"] = add(_balance(config, config.balance, clusters))
    selected = add(_retrieve_all(config, ingested, unique, retrieved))
    add(_write_shards(config, ingested, masked, unique, selected))
    return {stage.id: stage for stage in stages}


def sets_of(config: CurationConfig) -> dict[str, Sequence[Source]]:
    """Every set that is ingested, by name."""
    return {"pool": config.pool, **{one.name: (one,) for one in config.named_sets if one.uri}}


def roles_of(config: CurationConfig) -> dict[str, str]:
    """The sets that dedup compares, and the part that each plays."""
    return {
        "pool": "pool",
        **{one.name: "reference" for one in config.reference},
        **dict.fromkeys(config.included, "included"),
    }


def _history(config: CurationConfig) -> dict[str, Any]:
    """What runs must have in common to go on from one another."""
    return {"limit": config.ingest.limit, "name": config.name}


def ingest_stage(settings: Ingest, beam: Mapping[str, str], name: str, sources: Sequence[Source]) -> Stage:
    """Reads the images of one set; it is below no other stage.

    Raises:
        LodesetError: a source is not there.
    """
    own: list[str] = []
    files = tuple(expand(sources, name, own))
    size = sum(f.size_bytes for f in files)
    # The sample is one of the pool: other sets are small, and say what to look for.
    limits = settings if name == "pool" else settings.model_copy(update={"limit": None})
    slices = max(1, round(image_bytes(files) / (limits.slice_mb * 2**20)))
    return Stage(
        "ingest",
        name,
        IngestSpec.VERSION,
        "beam",
        deferred("lodeset.pipeline.stages.ingest.run:run"),
        spec=IngestSpec(limits=limits, files=len(files), size_bytes=size, listing=listing_of(files)),
        runtime=IngestRuntime(files=files, beam=beam, left_out=tuple(own)),
        max_cpus=slices,
        seconds_per_image=0.0004,
    )


def _embedder_inputs(images: Stage, embedding: Embedding) -> dict[str, Input]:
    return {"images": Input(images, IMAGES), **_fitted(embedding)}


def _fitted(embedding: Embedding) -> dict[str, Input]:
    return {"fitted": Input(embedding.fitted)} if embedding.fitted else {}


def _fit_embedder(
    config: CurationConfig, embedder: PatchDictionary, identity: Mapping[str, Any], pool: Stage, suffix: str
) -> Stage:
    return Stage(
        f"fit_embedder{suffix}",
        "pool",
        FitEmbedderSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.fit_embedder:run"),
        spec=FitEmbedderSpec(embedder=identity, limit=config.ingest.limit),
        inputs={"images": Input(pool, IMAGES)},
        runtime=FitEmbedderRuntime(embedder=embedder, max_pixels=config.ingest.max_pixels),
        frozen=True,
        seconds_per_image=0.0005,
    )


def _both_read_images(config: CurationConfig) -> bool:
    """Whether dedup has an embedder of its own, so that one pass over the bytes can feed both."""
    chosen = (config.embed.semantic, config.embed.dedup)
    return chosen[1] != "semantic" and not any(isinstance(one, PrecomputedEmbedder) for one in chosen)


def _embed(config: CurationConfig, embedding: Embedding, images: Stage, also: tuple[str, ...] = ()) -> Stage:
    return Stage(
        f"embed{embedding.suffix}",
        images.set,
        EmbedSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.embed:run"),
        spec=EmbedSpec(embedder=embedding.identity),
        inputs=_embedder_inputs(images, embedding),
        runtime=EmbedderRuntime(
            embedder=embedding.config,
            max_pixels=config.ingest.max_pixels,
            may_find_nothing=any(one.name == images.set for one in config.targets),
        ),
        max_cpus=images.max_cpus,
        seconds_per_image=0.006,
        also=also,
    )


def _calibrate(config: CurationConfig, embedding: Embedding, pool: Stage, vectors: Stage) -> Stage:
    if isinstance(embedding.config, PrecomputedEmbedder):
        raise ConfigError(
            "dedup.threshold: auto cannot be calibrated with precomputed vectors, because copies would have to be embedded: "
            "give dedup.threshold and dedup.reference_threshold as numbers, or name an embedder in embed.dedup"
        )
    return Stage(
        "calibrate",
        "pool",
        CalibrateSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.calibrate:run"),
        spec=CalibrateSpec(
            calibration_images=config.dedup.calibration_images,
            embedder=embedding.identity,
            limit=config.ingest.limit,
        ),
        inputs={**_embedder_inputs(pool, embedding), "vectors": Input(vectors)},
        runtime=EmbedderRuntime(embedder=embedding.config, max_pixels=config.ingest.max_pixels),
        frozen=True,
        seconds_per_image=0.0005,
    )


def _dedup(
    config: CurationConfig,
    roles: dict[str, str],
    ingested: dict[str, Stage],
    vectors: dict[str, Stage],
    masked: Stage,
    calibration: Stage | None,
    keep: tuple[IdList, ...],
) -> Stage:
    by_metadata = "metadata" in config.dedup.keeper
    return Stage(
        "dedup",
        "pool",
        DedupSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.dedup.run:run"),
        spec=DedupSpec(
            **computed(config.dedup),
            roles=roles,
            neighbors=config.neighbors,
            kept_by_hand=identity_of(keep) if keep else None,
            **_history(config),
        ),
        inputs={
            # Keepers may go by what is said about images.
            **{f"images:{name}": Input(ingested[name], METADATA if by_metadata else IMAGES) for name in roles},
            **{f"vectors:{name}": Input(vectors[name]) for name in roles},
            "masked": Input(masked),
            **({"calibration": Input(calibration)} if calibration else {}),
        },
        runtime=DedupRuntime(part_images=config.dedup.part_images, max_pixels=config.ingest.max_pixels, keep=keep),
        # Not from a trial: what a sample kept is no reason to keep it.
        follows=Follows(("limit", "name"), published=("write_shards/all", "dedup")),
        seconds_per_image=0.002,
        reads=tuple(one.place for one in keep),
    )


def _fit_clusters(config: CurationConfig, embedding: Embedding, vectors: Stage, unique: Stage) -> Stage:
    levels = isinstance(config.cluster.k, tuple) and len(config.cluster.k) > 1
    knobs = config.cluster.model_dump(exclude=set() if levels else {"resampling"})
    spec = FitClustersSpec(**knobs, embedder=embedding.identity, **_history(config))
    return Stage(
        "fit_clusters",
        "pool",
        FitClustersSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.fit_clusters:run"),
        spec=spec,
        inputs={"vectors": Input(vectors), "dedup": Input(unique, KEPT), **_fitted(embedding)},
        follows=Follows(tuple(knob for knob in canonical(spec) if knob != "drift")),
        seconds_per_image=0.0002,
    )


def _cluster(config: CurationConfig, vectors: Stage, unique: Stage, centroids: Stage) -> Stage:
    return Stage(
        "cluster",
        "pool",
        ClusterSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.cluster:run"),
        spec=ClusterSpec(),
        inputs={"vectors": Input(vectors), "dedup": Input(unique, KEPT), "centroids": Input(centroids, CENTROIDS)},
        max_cpus=vectors.max_cpus,
        seconds_per_image=0.00005,
    )


def _semdedup(wanted: Semantic, vectors: Stage, unique: Stage, centroids: Stage, clusters: Stage) -> Stage:
    return Stage(
        "semdedup",
        "pool",
        SemdedupSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.semdedup:run"),
        spec=SemdedupSpec(eps=wanted.eps, keep=wanted.keep, seed=wanted.seed),
        inputs={
            "vectors": Input(vectors),
            "dedup": Input(unique, KEPT),
            "centroids": Input(centroids, CENTROIDS),
            "clusters": Input(clusters),
        },
        max_cpus=vectors.max_cpus,
        seconds_per_image=0.0002,
    )


def _balance(config: CurationConfig, wanted: Balance, clusters: Stage) -> Stage:
    return Stage(
        "balance",
        "pool",
        BalanceSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.balance:run"),
        spec=BalanceSpec(images=wanted.images, seed=wanted.seed),
        inputs={"clusters": Input(clusters)},
        max_cpus=1,
        seconds_per_image=0.00001,
        size_bytes=BALANCED_BYTES * wanted.images,
        most=wanted.images,
    )


def _retrieve(
    config: CurationConfig,
    index: int,
    vectors: dict[str, Stage],
    unique: Stage,
    centroids: Stage | None,
    clusters: Stage | None,
) -> Stage:
    one = config.curated[index]
    listed = None if one.pool_ids is None else read_list(one.pool_ids, f"curated.{index}.pool_ids")
    inputs: dict[str, Input] = {
        **({"queries": Input(vectors[one.name])} if listed is None else {}),
        "vectors": Input(vectors["pool"]),
        "dedup": Input(unique, KEPT),
    }
    if one.retrieve.mode == "cluster" and centroids and clusters:
        inputs |= {"centroids": Input(centroids, CENTROIDS), "clusters": Input(clusters)}
    return Stage(
        "retrieve",
        one.name,
        RetrieveSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.retrieve:run"),
        spec=RetrieveSpec(
            mode=one.retrieve,
            neighbors=config.neighbors,
            pool_ids=None if listed is None else identity_of([listed]),
            include=listed is not None and one.include,
        ),
        inputs=inputs,
        runtime=RetrieveRuntime(pool_ids=listed),
        max_cpus=vectors[one.name if listed is None else "pool"].max_cpus,
        seconds_per_image=0.0001,
        reads=() if listed is None else (listed.place,),
    )


def _retrieve_all(
    config: CurationConfig, ingested: dict[str, Stage], unique: Stage, retrieved: dict[str, Stage]
) -> Stage:
    included = config.included
    return Stage(
        "retrieve",
        "all",
        SelectSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.retrieve:run_all"),
        spec=SelectSpec(
            everything=not config.curated and not config.balance,
            sets=sorted(retrieved),
            shared=config.selection.shared,
        ),
        inputs={
            **{f"retrieve:{name}": Input(stage) for name, stage in retrieved.items()},
            **{f"images:{name}": Input(ingested[name], IMAGES) for name in included},
            "dedup": Input(unique, KEPT),
        },
        max_cpus=1,
        seconds_per_image=0.00001,
        most=config.balance.images if config.balance and not config.curated else None,
    )


def _write_shards(
    config: CurationConfig, ingested: dict[str, Stage], masked: Stage, unique: Stage, selected: Stage
) -> Stage:
    included = config.included
    return Stage(
        "write_shards",
        "all",
        WriteShardsSpec.VERSION,
        "beam",
        deferred("lodeset.pipeline.stages.write_shards:run"),
        spec=WriteShardsSpec(**config.shards.model_dump(), **_history(config)),
        inputs={
            "selected": Input(selected),
            "dedup": Input(unique, KEPT),
            "masked": Input(masked),
            **{f"images:{name}": Input(ingested[name], METADATA) for name in ("pool", *included)},
        },
        runtime=WriteShardsRuntime(beam=config.resources.beam),
        follows=Follows(("size_mb", "seed", "limit", "name")),
        seconds_per_image=0.0002,
    )
