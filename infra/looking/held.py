"""What the commands that look into a store show: the last finished run, whatever became of its sources and configuration since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lodeset.infra.config import Config
from lodeset.infra.report.pictures import public
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, newest_first, without_records
from lodeset.pipeline.dag.stage import PREVIOUS, Context, Follows, Input, Outcome, Stage, deferred, read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import WriteShardsRuntime, WriteShardsSpec


@dataclass(frozen=True)
class Held:
    """One run of a store.

    `run` is None where no run has finished yet, and in stores of lodeset 0.1.0. `ids` are all stages of its configuration, in the
    order of the DAG; `artifacts` those that are finished. `changed`: sources or configuration are no longer what they were; None:
    nobody can tell, because `why`.
    """

    run: Run | None
    ids: tuple[str, ...]
    artifacts: Mapping[str, Artifact]
    changed: bool | None
    why: str = ""

    def stages(self, graph: Mapping[str, Stage]) -> dict[str, Stage]:
        """Stages as they were configured, to be shown; none that is finished can be run. `graph` has those that are not."""
        return {id_: _stage(id_, self.artifacts.get(id_), graph.get(id_)) for id_ in self.ids}


def held(
    store: Store,
    config: Config,
    stages: Mapping[str, Stage],
    *,
    why: str = "",
    number: int | None = None,
    exactly: bool = False,
) -> Held:
    """The run with this number, or the last one of the configuration's name: of its limit, if there is one.

    Args:
        stages: the configuration's graph; empty where it cannot be built, because `why`.
        exactly: a run of this very configuration goes before later ones.

    Raises:
        LodesetError: there is no such run, or what is to be shown is damaged.
    """
    run = store.run(number) if number is not None else _chosen(store, config, exactly)
    if run is None:
        return _without_record(store, stages, why)
    return Held(run, tuple(run.stages), artifacts_of(store, run), _changed(store, run, stages), why)


def _chosen(store: Store, config: Config, exactly: bool) -> Run | None:
    told, last, alike = configuration(config), None, None
    for run in newest_first(store, config.name):
        last = last or run
        if run.limit == config.ingest.limit:
            alike = alike or run
        if (run.config == told) if exactly else (alike is not None):
            return run
    return alike or last


def _without_record(store: Store, stages: Mapping[str, Stage], why: str) -> Held:
    if not stages:
        found = without_records(store)
        return Held(None, tuple(found), found, None, why)
    done = {id_: d.artifact for id_, d in decide(store, stages).items() if d.artifact is not None}
    if not done and not store.run_numbers():
        found = without_records(store)
        if found:
            return Held(None, tuple(found), found, True)
    return Held(None, tuple(stages), done, None)


def _changed(store: Store, run: Run, stages: Mapping[str, Stage]) -> bool | None:
    """Whether `lodeset run` would make anything that this run has not made."""
    if not stages:
        return None
    now = {id_: d.artifact.fingerprint for id_, d in decide(store, stages).items() if d.artifact is not None}
    made = {id_: one.fingerprint for id_, one in run.stages.items() if one is not None}
    wanted = stages if not run.until else [id_ for id_ in stages if id_ in made]
    return {id_: now.get(id_) for id_ in wanted} != made


def wanted(config: Config, ids: tuple[str, ...], until: str | None) -> Wanted:
    return Wanted(config.name, config.ingest.limit, until or "", configuration(config), ids)


def configuration(config: Config) -> dict[str, Any]:
    """The whole configuration as JSON, without passwords and signatures in URLs."""
    told: dict[str, Any] = _public(config.model_dump(mode="json"))
    return told


def _public(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _public(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_public(value) for value in tree]
    return public(tree) if isinstance(tree, str) else tree


def rewriting(written: Artifact, shown: Held, beam: Mapping[str, str]) -> Stage:
    """`write_shards` as it made this artifact, to be made again from what the shards themselves hold.

    Raises:
        LodesetError: what it was made from is no longer there.
    """
    inputs = {}
    for role, told in written.inputs.items():
        if role == PREVIOUS:
            continue
        made_from = shown.artifacts.get(told["stage"])
        of = [""] if made_from and told["identity"] == made_from.fingerprint else []
        of += [
            name for name, identity in (made_from.content if made_from else {}).items() if identity == told["identity"]
        ]
        if made_from is None or not of:
            raise LodesetError(
                f"the shards were made from a {told['stage']} that is no longer there: `lodeset run` first"
            )
        inputs[role] = Input(_stage(told["stage"], made_from), of[0])
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


def _stage(id_: str, artifact: Artifact | None, configured: Stage | None = None) -> Stage:
    name, _, set_ = id_.partition("/")
    if artifact is None:
        return configured or Stage(name, set_, 0, "ray", _never, {})
    return Stage(name, set_, artifact.version, "ray", _never, artifact.config)


def _never(context: Context) -> Outcome:
    raise AssertionError(f"{context.stage.id} is only shown")
