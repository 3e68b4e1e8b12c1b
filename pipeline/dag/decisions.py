"""What would happen to each stage of a DAG, and why: finished, taken over from an earlier run, to be run, waiting."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from lodeset.pipeline.dag.fingerprint import canonical
from lodeset.pipeline.dag.rollbacks import withdrawn
from lodeset.pipeline.dag.stage import PREVIOUS, Follows, Stage
from lodeset.pipeline.dag.store import Artifact, Store

Action = Literal["finished", "taken over", "run", "wait"]


@dataclass(frozen=True)
class Decision:
    """What would happen to one stage, and why; `previous` is its last artifact, from which it goes on where it `follows`."""

    stage: Stage
    action: Action
    reason: str
    fingerprint: str | None = None
    artifact: Artifact | None = None
    previous: Artifact | None = None


def decide(
    store: Store,
    stages: Mapping[str, Stage],
    fresh: Container[str] = (),
    given: Mapping[str, Artifact] = MappingProxyType({}),
) -> dict[str, Decision]:
    """One decision a stage, in the order given (which must be topological). Reads manifests, spends nothing.

    `fresh` are the names of stages that take nothing over from earlier runs, `given` what is finished besides these stages, by id.
    """
    decisions: dict[str, Decision] = {}
    finished = dict(given)
    for stage in stages.values():
        decision = decided(store, stage, finished, fresh)
        decisions[stage.id] = decision
        if decision.artifact is not None:
            finished[stage.id] = decision.artifact
    return decisions


def decided(store: Store, stage: Stage, finished: Mapping[str, Artifact], fresh: Container[str]) -> Decision:
    fingerprint = stage.fingerprint(finished)
    if fingerprint is None:
        waiting = sorted({i.stage.id for i in stage.inputs.values() if i.stage.id not in finished})
        return Decision(stage, "wait", f"after {', '.join(waiting)}")
    anew = stage.name in fresh
    if stage.follows is not None:
        return _following(store, stage, stage.follows, finished, anew)
    artifact = store.artifact(stage.name, stage.set, fingerprint)
    if artifact is not None:
        return Decision(stage, "finished", "unchanged", fingerprint, artifact)
    history = store.history(stage.name, stage.set)
    if stage.frozen and not anew:
        for earlier in history:
            if _still_fits(stage, earlier, finished):
                reason = f"fitted {_day(earlier)}; `--fresh` refits"
                return Decision(stage, "taken over", reason, earlier.fingerprint, earlier)
    last = None if anew or not history else history[0]
    return Decision(stage, "run", _why(stage, finished, history), fingerprint, previous=last)


def _following(store: Store, stage: Stage, follows: Follows, finished: Mapping[str, Artifact], anew: bool) -> Decision:
    """Finished is what was made from these inputs, whatever it went on from; the newest where there are several. What was rolled
    back is not: it is finished only if this stage, going on from what counts, would make just the same."""
    gone = withdrawn(store, stage.id)
    history = [one for one in store.history(stage.name, stage.set) if one.fingerprint not in gone]
    for made in history:
        before = made.inputs.get(PREVIOUS, {}).get("fingerprint")
        if not (anew and before) and made.fingerprint == stage.fingerprint(finished, before):
            return Decision(stage, "finished", "unchanged", made.fingerprint, made)
    last = None if anew else _base(store, stage, follows, history)
    fingerprint = stage.fingerprint(finished, last.fingerprint if last else None)
    again = (
        store.artifact(stage.name, stage.set, fingerprint) if fingerprint is not None and fingerprint in gone else None
    )
    if again is not None:
        return Decision(stage, "finished", "made before, by a run that was rolled back", fingerprint, again)
    reason = _why(stage, finished, history)
    if last is not None:
        reason += f"; goes on from {_day(last)}"
    return Decision(stage, "run", reason, fingerprint, previous=last)


def _base(store: Store, stage: Stage, follows: Follows, history: list[Artifact]) -> Artifact | None:
    """What a stage goes on from."""
    config: Mapping[str, Any] = canonical(stage.config)

    def fits(earlier: Artifact | None) -> bool:
        return (
            earlier is not None
            and earlier.version == stage.version
            and all(earlier.config.get(key) == config.get(key) for key in follows.keys)
        )

    if follows.published is not None:
        later, role = follows.published
        name, _, set_ = later.partition("/")
        gone = withdrawn(store, later)
        for one in store.history(name, set_):
            if one.fingerprint in gone:
                continue
            made_from = store.artifact(stage.name, stage.set, one.inputs.get(role, {}).get("fingerprint", ""))
            if fits(made_from):
                return made_from
    return next((one for one in history if fits(one)), None)


def _day(artifact: Artifact) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(artifact.created))


def _still_fits(stage: Stage, earlier: Artifact, finished: Mapping[str, Artifact]) -> bool:
    """Whether what was fitted before may be taken over: alike but for the data, and fitted on what is fitted now."""
    fitted = {role: i for role, i in stage.inputs.items() if i.stage.frozen}
    return (
        earlier.version == stage.version
        and earlier.config == canonical(stage.config)
        and all(
            earlier.inputs.get(role, {}).get("identity") == finished[needed.stage.id].identity(needed.of)
            for role, needed in fitted.items()
        )
    )


def _why(stage: Stage, finished: Mapping[str, Artifact], history: list[Artifact]) -> str:
    if not history:
        return "not made yet"
    last = history[0]
    if last.version != stage.version:
        return f"version {last.version} -> {stage.version}"
    changes = differences(last.config, canonical(stage.config))
    for role, needed in stage.inputs.items():
        identity = finished[needed.stage.id].identity(needed.of)
        if last.inputs.get(role, {}).get("identity") != identity:
            changes.append(f"{needed.stage.id} changed")
    now: Mapping[str, Any] = canonical(stage.config)
    changes += [words for key, words in stage.advice.items() if last.config.get(key) != now.get(key)]
    return "; ".join(changes) or "made before, from other inputs"


_DIGEST = re.compile(r"[0-9a-f]{64}")  # which says nothing to a reader


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two configurations of a stage, in words."""
    if old != new and all(one is None or _is_list_of_ids(one) for one in (old, new)):
        return [_other_ids(old, new, where)]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    if old == new:
        return []
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new)):
        return [f"{where} changed"]
    short = [text if len(text) <= 40 else text[:37] + "..." for text in (json.dumps(old), json.dumps(new))]
    return [f"{where} {short[0]} -> {short[1]}"]


def _is_list_of_ids(value: Any) -> bool:
    """Whether this is how a specification tells what a list of ids holds (`pipeline.by_hand`)."""
    return isinstance(value, dict) and value.keys() == {"ids", "digest"}


def _other_ids(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, where: str) -> str:
    if old is None or new is None:
        is_new = old is None
        count = (new or old or {})["ids"]
        return f"{where} is {'new' if is_new else 'gone'}: {count:,} ids"
    more = new["ids"] - old["ids"]
    how = (
        f"{abs(more):,} ids {'more' if more > 0 else 'fewer'}" if more else f"{new['ids']:,} ids as before, but others"
    )
    return f"{where} has changed: {how}"
