"""The measures that lodeset has. Each reads what a finished run recorded; none computes anything again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lodeset.infra.gates.measure import Finished, Images, Measure, Measured, NotComparable, NotMade, id_of

if TYPE_CHECKING:
    from lodeset.infra.gates.config import Gate
    from lodeset.pipeline.config import CurationConfig
    from lodeset.pipeline.dag.manifests import Artifact

DEDUP, SHARDS, SELECTED, CLUSTERS, EVALUATED = (
    "dedup/pool",
    "write_shards/all",
    "retrieve/all",
    "fit_clusters/pool",
    "evaluate/all",
)
Read = TypeVar("Read")
NEAR, REFERENCE = "near", "reference"
# Which network is meant where a gate does not say it, the best first.
NETWORKS = ("finished", "trained", "embedder")


def kept(run: Finished, gate: Gate) -> Measured:
    """images that a stage kept (without `stage`: that the shards list), from its counts"""
    return Measured(float(run.artifact(id_of(gate, run.run.stages, "write_shards")).rows.kept))


def kept_share(run: Finished, gate: Gate) -> Measured:
    """share of the images that a stage took which it kept, from its counts"""
    rows = run.artifact(id_of(gate, run.run.stages)).rows
    return Measured(_share(rows.kept, rows.taken))


def dropped(run: Finished, gate: Gate) -> Measured:
    """images or files that a stage dropped or rejected, for `reason` or for any, from its counts"""
    artifact = run.artifact(id_of(gate, run.run.stages))
    return _dropped(run, gate, artifact, float(_lost(artifact, gate.reason)))


def dropped_share(run: Finished, gate: Gate) -> Measured:
    """share of what a stage took which it dropped or rejected, for `reason` or for any, from its counts"""
    artifact = run.artifact(id_of(gate, run.run.stages))
    return _dropped(run, gate, artifact, _share(_lost(artifact, gate.reason), artifact.rows.taken))


def duplicates(run: Finished, gate: Gate) -> Measured:
    """share of the images that dedup compared which it dropped as near-duplicates of others, from its counts"""
    artifact = run.artifact(DEDUP)
    share = _share(_lost(artifact, NEAR), artifact.rows.taken)
    return Measured(share, images=_rows(run, artifact, "duplicates", {"reason": [NEAR], "kept": [False]}))


def leaks(run: Finished, gate: Gate) -> Measured:
    """images that were dropped as copies of images of a reference or included set (without `set`: of any reference set), as dedup
    recorded them"""
    from lodeset.pipeline.specs import DedupDetails

    artifact = run.artifact(DEDUP)
    sets = _details(DedupDetails, artifact).leaks
    if gate.set is None:
        names = sorted(name for name, one in sets.items() if one["role"] == REFERENCE)
        images = _rows(run, artifact, "leaks", {"set": names}, "pool_image_id")
        return Measured(float(_lost(artifact, REFERENCE)), images=images)
    if gate.set not in sets:
        raise NotMade(f"dedup of run {run.run.number} compared with no set {gate.set}")
    images = _rows(run, artifact, "leaks", {"set": [gate.set]}, "pool_image_id")
    return Measured(float(sets[gate.set]["dropped"]), images=images)


def leaks_in_shards(run: Finished, gate: Gate) -> Measured:
    """images that lie in the shards' files, count no more, and are copies of reference images, from `tombstones`"""
    artifact = run.artifact(SHARDS)
    images = _rows(run, artifact, "tombstones", {"reason": [REFERENCE]})
    return Measured(float(sum(len(block) for block in images())), images=images)


def drift(run: Finished, gate: Gate) -> Measured:
    """share by which the mean squared distance of images to their centroids has grown since the clusters were fitted, as
    fit_clusters recorded it"""
    from lodeset.pipeline.specs import FitClustersDetails

    details = _details(FitClustersDetails, run.artifact(CLUSTERS))
    found = details.refitted_at_drift if details.drift is None else details.drift
    if found is None:
        raise NotComparable("the clusters were fitted for the first time: there is no drift yet")
    return Measured(float(found))


def shortfall(run: Finished, gate: Gate) -> Measured:
    """share of the images that are `expected` of a curated set which it did not bring (without `set`: the largest), from what
    retrieve recorded"""
    from lodeset.pipeline.specs import RetrieveDetails, SelectDetails

    found: list[tuple[float, str]] = []
    together = _details(SelectDetails, run.artifact(SELECTED)).as_is_by_set
    for one in run.curated:
        if one.expected is None or gate.set not in (None, one.name):
            continue
        if one.include:
            if one.name not in together:
                raise NotMade(f"run {run.run.number} selected no images of a set {one.name}")
            found.append((_lacking(together[one.name], one.expected.images), one.name))
        if one.expected.final is not None:
            got = _details(RetrieveDetails, run.artifact(f"retrieve/{one.name}")).distinct
            found.append((_lacking(got, one.expected.final), one.name))
    return _worst(found, f"no curated set{f' {gate.set}' if gate.set else ''} says what is `expected` of it")


def unfilled(run: Finished, gate: Gate) -> Measured:
    """share of the images that a curated set asked the pool for, within its limits, and did not find (without `set`: the
    largest), from what retrieve recorded"""
    from lodeset.pipeline.specs import RetrieveDetails

    found = []
    for id_ in run.run.stages:
        stage, _, set_ = id_.partition("/")
        if stage == "retrieve" and set_ != "all" and gate.set in (None, set_):
            details = _details(RetrieveDetails, run.artifact(id_))
            if details.asked:
                found.append((_share(details.short, details.asked), set_))
    return _worst(found, f"run {run.run.number} retrieved nothing{f' for a set {gate.set}' if gate.set else ''}")


def knn(run: Finished, gate: Gate) -> Measured:
    """best kNN accuracy (over the published k) of a network on a target set, from what evaluate recorded. Without `set`: the
    lowest; without `network`: of the finished network, or else the trained one, or else the embedder"""
    from lodeset.training.specs import EvaluateDetails

    targets = _details(EvaluateDetails, run.artifact(EVALUATED)).targets
    if gate.set is not None and gate.set not in targets:
        raise NotMade(f"run {run.run.number} evaluated on no target set {gate.set}: it has {', '.join(targets)}")
    found = []
    for name in [gate.set] if gate.set is not None else targets:
        scores: Mapping[str, Mapping[str, float]] = targets[name]["knn"]
        network = gate.network or next((one for one in NETWORKS if one in scores), "")
        if network not in scores:
            raise NotMade(f"run {run.run.number} evaluated no network {network} on {name}: it has {', '.join(scores)}")
        found.append((max(scores[network].values()), f"{network} on {name}"))
    return Measured(*min(found))


def seconds(run: Finished, gate: Gate) -> Measured:
    """time that a stage took when it was made; without `stage`: that the run took, from its record"""
    if gate.stage is None:
        return Measured(run.run.ended - run.run.began)
    return Measured(run.artifact(id_of(gate, run.run.stages)).seconds)


def size(run: Finished, gate: Gate) -> Measured:
    """size of the files that a stage's manifest lists; without `stage`: of all files that the run's manifests list"""
    chosen = run.artifacts.values() if gate.stage is None else [run.artifact(id_of(gate, run.run.stages))]
    sizes = {file.path: file.size_bytes for one in chosen for file in one.files()}
    return Measured(float(sum(sizes.values())))


def _stage(default: str = "") -> Any:
    """The stages that a measure of one stage reads; none if it is about the whole run."""

    def reads(gate: Gate, ids: Sequence[str]) -> Sequence[str]:
        return [id_of(gate, ids, default)] if gate.stage or default else []

    return reads


def _always(*needed: str) -> Any:
    def reads(gate: Gate, ids: Sequence[str]) -> Sequence[str]:
        return needed

    return reads


def _of_retrieval(gate: Gate, ids: Sequence[str]) -> Sequence[str]:
    return [SELECTED, *([f"retrieve/{gate.set}"] if gate.set else [])]


def _compared(config: CurationConfig) -> Sequence[str]:
    return [*(one.name for one in config.reference), *config.included]


def _expected(config: CurationConfig) -> Sequence[str]:
    return [one.name for one in config.curated if one.expected is not None]


def _asking(config: CurationConfig) -> Sequence[str]:
    return [one.name for one in config.curated if one.retrieve.mode != "as_is"]


def _targets(config: CurationConfig) -> Sequence[str]:
    return [one.name for one in config.targets]


KEPT = Measure(name="kept", unit="images", function=kept, reads=_stage("write_shards"), takes=("stage", "set"))
KEPT_SHARE = Measure(
    name="kept_share",
    unit="share",
    function=kept_share,
    reads=_stage(),
    takes=("stage", "set"),
    needs=("stage",),
)
DROPPED = Measure(
    name="dropped",
    unit="images",
    function=dropped,
    reads=_stage(),
    takes=("stage", "set", "reason"),
    needs=("stage",),
)
DROPPED_SHARE = Measure(
    name="dropped_share",
    unit="share",
    function=dropped_share,
    reads=_stage(),
    takes=("stage", "set", "reason"),
    needs=("stage",),
)
DUPLICATES = Measure(name="duplicates", unit="share", function=duplicates, reads=_always(DEDUP))
LEAKS = Measure(
    name="leaks",
    unit="images",
    function=leaks,
    reads=_always(DEDUP),
    takes=("set",),
    sets=_compared,
    kind="reference set, or curated set with `include: true` and images of its own",
)
LEAKS_IN_SHARDS = Measure(name="leaks_in_shards", unit="images", function=leaks_in_shards, reads=_always(SHARDS))
DRIFT = Measure(name="drift", unit="share", function=drift, reads=_always(CLUSTERS))
SHORTFALL = Measure(
    name="shortfall",
    unit="share",
    function=shortfall,
    reads=_of_retrieval,
    takes=("set",),
    sets=_expected,
    kind="curated set with `expected`",
)
UNFILLED = Measure(
    name="unfilled",
    unit="share",
    function=unfilled,
    reads=_of_retrieval,
    takes=("set",),
    sets=_asking,
    kind="curated set with `retrieve`",
)
KNN = Measure(
    name="knn",
    unit="share",
    function=knn,
    reads=_always(EVALUATED),
    takes=("set", "network"),
    sets=_targets,
    kind="target set",
)
SECONDS = Measure(name="seconds", unit="seconds", function=seconds, reads=_stage(), takes=("stage", "set"))
BYTES = Measure(name="bytes", unit="bytes", function=size, reads=_stage(), takes=("stage", "set"))


# -- what they have in common


def _details(cls: type[Read], artifact: Artifact) -> Read:
    from lodeset.pipeline.dag.stage import read_as

    return read_as(cls, artifact.details)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _lacking(got: int, expected: int) -> float:
    return max(0.0, _share(expected - got, expected))


def _worst(found: Sequence[tuple[float, str]], without: str) -> Measured:
    if not found:
        raise NotMade(without)
    return Measured(*max(found))


def _lost(artifact: Artifact, reason: str | None) -> int:
    """Dropped images; a reason that nothing was dropped for counts as 0."""
    counts = artifact.rows.dropped
    return sum(counts.values()) if reason is None else counts.get(reason, 0)


def _dropped(run: Finished, gate: Gate, artifact: Artifact, value: float) -> Measured:
    where: dict[str, Sequence[Any]] = {} if gate.reason is None else {"reason": [gate.reason]}
    if artifact.stage in ("dedup", "semdedup"):
        return Measured(value, images=_rows(run, artifact, "duplicates", {**where, "kept": [False]}))
    if artifact.stage == "filter":
        return Measured(value, images=_rows(run, artifact, "filtered", where))
    if artifact.stage == "ingest" and gate.reason != "exact_duplicate":
        chosen = "" if gate.reason is None else f" --where reason={gate.reason}"
        return Measured(value, see=f"rejects --of {artifact.id}{chosen}")
    return Measured(value)


def _rows(run: Finished, artifact: Artifact, table: str, where: Mapping[str, Any], column: str = "image_id") -> Images:
    """The distinct images of the rows of a table that have one of these values, a file at a time, in their order."""

    def images() -> Iterator[Sequence[str]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        seen: set[str] = set()
        for file in artifact.tables.get(table, ()):
            rows = run.store.table([file], [*dict.fromkeys([column, *where])])
            for name, values in where.items():
                rows = rows.filter(pc.is_in(rows[name], pa.array(values, rows.schema.field(name).type)))
            block = [one for one in pc.unique(rows[column]).to_pylist() if one is not None and one not in seen]
            seen.update(block)
            yield block

    return images
