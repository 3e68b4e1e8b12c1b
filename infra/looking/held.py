"""Find the run that commands show: the last finished run, whatever happened to its sources and configuration since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lodeset.infra.config import Config
from lodeset.infra.report.pictures import public
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, newest_first, without_records
from lodeset.pipeline.dag.stage import PREVIOUS, Follows, Input, Stage, deferred, finished, only_read, read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import WriteShardsRuntime, WriteShardsSpec


@dataclass(frozen=True)
class Held:
    """One run of a store.

    `run` is None if no run has finished yet, and in stores of lodeset 0.1.0. `ids` are all stages of its configuration
    in the order of the DAG; `artifacts` are the finished ones. `changed`: whether sources or configuration have changed
    since; None if that cannot be determined, because of `why`.
    """

    run: Run | None
    ids: tuple[str, ...]
    artifacts: Mapping[str, Artifact]
    changed: bool | None
    why: str = ""

    def stages(self, graph: Mapping[str, Stage]) -> dict[str, Stage]:
        """Stages as they were configured, for display; finished ones cannot be run. `graph` provides the unfinished
        ones.
        """
        return {id_: _shown(id_, self.artifacts.get(id_), graph.get(id_)) for id_ in self.ids}


def held(
    store: Store,
    config: Config,
    stages: Mapping[str, Stage],
    *,
    why: str = "",
    number: int | None = None,
    exactly: bool = False,
) -> Held:
    """The run with this number, or the last one with the configuration's name (and with its limit, if there is one).

    Args:
        stages: the configuration's graph; empty if it cannot be built, because of `why`.
        exactly: prefer a run of exactly this configuration to later ones.

    Raises:
        LodesetError: there is no such run, or what is to be shown is damaged.
    """
    run = store.run(number) if number is not None else _chosen(store, config, exactly)
    if run is None:
        return _without_record(store, stages, why)
    return Held(run, tuple(run.stages), artifacts_of(store, run), _changed(store, run, stages), why)


def _chosen(store: Store, config: Config, exactly: bool) -> Run | None:
    own, last, alike = configuration(config), None, None
    for run in newest_first(store, config.name):
        last = last or run
        if run.limit == config.ingest.limit:
            alike = alike or run
        if (run.config == own) if exactly else (alike is not None):
            return run
    return alike or last


def _without_record(store: Store, stages: Mapping[str, Stage], why: str) -> Held:
    if not stages:
        artifacts = without_records(store)
        return Held(None, tuple(artifacts), artifacts, None, why)
    done = {id_: d.artifact for id_, d in decide(store, stages).items() if d.artifact is not None}
    if not done and not store.run_numbers():
        artifacts = without_records(store)
        if artifacts:
            return Held(None, tuple(artifacts), artifacts, True)
    return Held(None, tuple(stages), done, None)


def _changed(store: Store, run: Run, stages: Mapping[str, Stage]) -> bool | None:
    """Whether `lodeset run` would make anything that this run has not made."""
    if not stages:
        return None
    current = {id_: d.artifact.fingerprint for id_, d in decide(store, stages).items() if d.artifact is not None}
    made = {id_: artifact.fingerprint for id_, artifact in run.stages.items() if artifact is not None}
    wanted = stages if not run.until else [id_ for id_ in stages if id_ in made]
    return {id_: current.get(id_) for id_ in wanted} != made


def wanted(config: Config, ids: tuple[str, ...], until: str | None) -> Wanted:
    return Wanted(config.name, config.ingest.limit, until or "", configuration(config), ids)


def configuration(config: Config) -> dict[str, Any]:
    """The configuration of what a run makes as JSON, without passwords and signatures in URLs. Gates and schedules make nothing:
    another one is no other run. Lists by hand that are not there are left out, so runs from before there were any are alike.
    """
    apart = {"gates", "deploy", "notify", "inspect", "lineage"}
    public: dict[str, Any] = _public(config.model_dump(mode="json", exclude=apart))
    for tree, key in ((public, "by_hand"), *((one, "pool_ids") for one in public["curated"])):
        if tree[key] is None:
            del tree[key]
    return public


def _public(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _public(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_public(value) for value in tree]
    return public(tree) if isinstance(tree, str) else tree


def rewriting(written: Artifact, shown: Held, beam: Mapping[str, str]) -> Stage:
    """The stage `write_shards` of this artifact, to be run again on the contents of the shards themselves.

    Raises:
        LodesetError: an input of the artifact no longer exists.
    """
    inputs = {}
    for role, source in written.inputs.items():
        if role == PREVIOUS:
            continue
        made_from = shown.artifacts.get(source["stage"])
        of = [""] if made_from and source["identity"] == made_from.fingerprint else []
        of += [
            name
            for name, identity in (made_from.content if made_from else {}).items()
            if identity == source["identity"]
        ]
        if made_from is None or not of:
            raise LodesetError(
                f"the shards were made from a {source['stage']} that no longer exists: `lodeset run` first"
            )
        inputs[role] = Input(finished(made_from), of[0])
    return Stage(
        written.stage,
        written.set,
        WriteShardsSpec.VERSION,
        "beam",
        deferred("lodeset.pipeline.stages.write_shards:run"),
        read_as(WriteShardsSpec, written.config),
        inputs,
        WriteShardsRuntime(beam=beam, rewritten=written),
        follows=Follows(("size_mb", "seed", "limit", "name")),
    )


def _shown(id_: str, artifact: Artifact | None, configured: Stage | None) -> Stage:
    if artifact is not None:
        return finished(artifact)
    name, _, set_ = id_.partition("/")
    return configured or Stage(name, set_, 0, "ray", only_read, {})
