"""Every command as a function; the command line prints what these return.

Importing this loads neither torch nor an engine: what needs them is imported where it is used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodeset.infra.config import Config, cpus_of, read
from lodeset.infra.deploy.kubernetes import render_kubernetes as render_kubernetes
from lodeset.infra.deploy.launcher import render_cluster as render_cluster
from lodeset.infra.gates.commands import BreachedError as BreachedError
from lodeset.infra.gates.commands import accept as accept
from lodeset.infra.gates.commands import gates as gates
from lodeset.infra.gates.commands import rollback as rollback
from lodeset.infra.looking.looking import held, title_of
from lodeset.infra.looking.looking import now as now
from lodeset.infra.looking.looking import report as report
from lodeset.infra.looking.looking import report_text as report_text
from lodeset.infra.looking.looking import status as status
from lodeset.infra.looking.looking import summary as summary
from lodeset.infra.looking.looking import table as table
from lodeset.infra.looking.looking import tables as tables
from lodeset.infra.looking.looking import trace as trace
from lodeset.infra.looking.looking import verify as verify
from lodeset.infra.models import export as export
from lodeset.infra.models import prune as prune
from lodeset.infra.models import train as train
from lodeset.infra.schedule.schedule import schedule as schedule
from lodeset.infra.schedule.schedule import unschedule as unschedule
from lodeset.infra.session import Opened as Opened
from lodeset.infra.session import data_set, names_of, run_stages
from lodeset.infra.session import open_config as open_config
from lodeset.infra.session import open_store as open_store
from lodeset.infra.session import run as run
from lodeset.infra.template import TEMPLATE
from lodeset.pipeline.errors import ConfigError, GateError, LodesetError

if TYPE_CHECKING:
    from lodeset.infra.audits import StoredAudit
    from lodeset.infra.card.card import Card
    from lodeset.infra.composition import Composition
    from lodeset.infra.doctor import Check
    from lodeset.infra.estimate import Estimate
    from lodeset.infra.looking.rows import Listed as Listed
    from lodeset.infra.looking.summary import Summary as Summary
    from lodeset.infra.upkeep.compact import Compacted
    from lodeset.infra.upkeep.forget import Forgotten
    from lodeset.infra.upkeep.gc import Collected
    from lodeset.infra.upkeep.rejects import Chosen, Reject, Retried
    from lodeset.pipeline.dag.decisions import Decision
    from lodeset.pipeline.dag.runner import Event
    from lodeset.pipeline.dag.store import Artifact, File

DEDUP, SHARDS = "dedup/pool", "write_shards/all"


def init(path: str | Path = "lodeset.yaml", force: bool = False) -> Path:
    """Writes a commented configuration and returns its path; into `lodeset.yaml` where `path` is a folder.

    Raises:
        ConfigError: the file exists, and not `force`.
        LodesetError: it cannot be written.
    """
    target = Path(path) / "lodeset.yaml" if Path(path).is_dir() else Path(path)
    try:
        with target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise ConfigError(f"{target} exists: give another name, or --force") from None
    except OSError as error:
        raise LodesetError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def schema() -> dict[str, Any]:
    """The configuration's JSON schema, for editors."""
    return Config.model_json_schema()


def plan(opened: Opened, fresh: bool = False) -> list[tuple[Decision, Estimate]]:
    """What `run` would do, and why, with estimated time and bytes."""
    from lodeset.infra.estimate import estimates
    from lodeset.pipeline.dag.damage import missing, noted
    from lodeset.pipeline.dag.decisions import decide

    decisions = decide(opened.store, opened.stages, names_of(opened) if fresh else ())
    lost = {one.path: one.why for one in (*noted(opened.store), *missing(opened.store, _files(decisions)))}
    for id_, one in decisions.items():
        why = next((lost[f.path] for f in one.artifact.files() if f.path in lost), None) if one.artifact else None
        if why is not None:
            decisions[id_] = replace(one, action="run", reason=f"a file of it is damaged: {why}", artifact=None)
    return list(zip(decisions.values(), estimates(opened.store, decisions, cpus_of(opened.config)), strict=True))


def refused(opened: Opened, decisions: Sequence[Decision]) -> str | None:
    """Why `run` would be refused after a rollback; None if it would not, or if the sources must be read first to tell."""
    from lodeset.infra.upkeep.rollback import refusal

    sources = {one.stage.id: one.artifact for one in decisions if one.artifact is not None}
    return refusal(opened.store, data_set(opened), opened.stages, sources)


def _files(decisions: Mapping[str, Decision]) -> set[File]:
    return {file for one in decisions.values() if one.artifact is not None for file in one.artifact.files()}


def composition(opened: Opened) -> Composition:
    """How many images each curated set will bring, or brought, beside what is expected of it; needs no data."""
    from lodeset.infra.composition import compose

    return compose(opened.config, opened.store, artifacts(opened))


def compact(opened: Opened, watch: Callable[[Event], None], delete: bool = False) -> Compacted:
    """Writes the shards of the last finished run anew, without what they hold besides; then deletes, if asked to, the shards that
    these replace. The images are read from the shards: sources need not be there.

    Raises:
        LodesetError: there are no shards yet.
    """
    from lodeset.infra.looking.held import rewriting
    from lodeset.infra.upkeep.compact import compacted, superseded
    from lodeset.infra.versions import versions
    from lodeset.pipeline.dag.runs import Wanted, record

    began, shown = time.time(), held(opened)
    before = shown.artifacts.get(SHARDS)
    if before is None:
        raise LodesetError(f"no finished run of {opened.path} has written shards: `lodeset run` first")
    stage = rewriting(before, shown, opened.config.resources.beam)
    after = run_stages(opened, {stage.id: stage}, watch, frozenset({before.stage}), shown.artifacts)[SHARDS]
    if shown.run is not None:
        made = {**shown.artifacts, SHARDS: after}
        run = shown.run
        asked = Wanted(run.name, run.limit, run.until, run.config, tuple(run.stages))
        record(opened.store, asked, made, versions(), began, time.time())
    return compacted(after, superseded(opened.store, after, delete), delete)


def forget(path: str | Path, asked: Sequence[str], copies: bool = False, overrides: tuple[str, ...] = ()) -> Forgotten:
    """Takes images, by image_id or URL, out of every table, shard and page of the configuration's store, for ever. Sources and
    models need not be there.

    Raises:
        LodesetError: no store is there, or a URL that no image in it has.
        HeldError: a run is at work on the store.
    """
    from lodeset.infra.upkeep.forget import forget
    from lodeset.pipeline.dag.store import Store

    return forget(Store(read(path, overrides).store), asked, copies)


def gc(opened: Opened, keep: int = 10, older_than: float = 86_400.0, dry_run: bool = False) -> Collected:
    """Deletes what none of the last `keep` runs of any data set in the store needs, and accounts for every byte of the store. Runs
    that gates compare with are kept, too. What no run has on record goes once it has not changed for `older_than` seconds. With
    `dry_run` nothing is deleted.

    Raises:
        LodesetError: no store is there, or a manifest of it is damaged.
        HeldError: a take-down is at work on the store.
    """
    from lodeset.infra.gates.accepted import baselines
    from lodeset.infra.upkeep.gc import collect

    store = opened.store
    accepted = functools.partial(baselines, store)
    return collect(store, opened.stages, keep=keep, older_than=older_than, accepted=accepted, dry_run=dry_run)


def card(opened: Opened, out: str | Path | None = None, run: int | None = None) -> Card:
    """Describes the shards of the last finished run, or of `run`, for those who read them: a Hugging Face dataset card and a
    Croissant file. The same run gives the same bytes. With `out`, a folder for a copy of the shards, they are written there, and
    otherwise into the store.

    Raises:
        ConfigError: `out` is in the store.
        LodesetError: no run has shards, a file of it is missing or damaged, or the card cannot be written.
        HeldError: a take-down is at work on the store.
    """
    from lodeset.infra.card.card import card

    return card(opened, out, run)


def _ingested(opened: Opened) -> list[Artifact]:
    """Ingest of every set, as the last finished run left it, or as far as it is made."""
    found = [one for id_, one in held(opened).artifacts.items() if id_.startswith("ingest/")]
    if not found:
        raise LodesetError(
            f"no run of {opened.path} has read its sources yet, or they are to be read again: `lodeset run` first"
        )
    return found


def rejects(opened: Opened, chosen: Chosen) -> list[Reject]:
    """What ingest refused in the last finished run, with its history.

    Raises:
        ConfigError: `chosen.before` is no version.
        LodesetError: no run has read the sources.
    """
    from lodeset.infra.upkeep.rejects import rejects

    return list(rejects(opened.store, _ingested(opened), chosen))


def retry_rejects(opened: Opened, chosen: Chosen) -> Retried:
    """Has the next run read these rejects again, and only the slices of sources that hold them.

    Raises:
        HeldError: a run or a take-down is at work on the store.
    """
    from lodeset.infra.upkeep.rejects import retry

    return retry(opened.store, _ingested(opened), chosen)


def accept_rejects(opened: Opened, chosen: Chosen, by: str, why: str = "") -> int:
    """Notes that these rejects are known and let be; returns how many were new."""
    from lodeset.infra.upkeep.rejects import accept

    return accept(opened.store, _ingested(opened), chosen, by, why)


def audit(opened: Opened, path: str | Path) -> StoredAudit:
    """Keeps the verdicts of a file from the dashboard beside the run that they are about.

    Raises:
        LodesetError: the file holds no verdicts, they are not about samples of this run, or the run was not made ready for the dashboard.
    """
    from lodeset.infra.audits import StoredAudit, read, store
    from lodeset.infra.dashboard.data import opened as reading
    from lodeset.infra.dashboard.making import found
    from lodeset.infra.dashboard.samples import checked

    given = read(Path(path))
    opened.store.run(given.run)  # there is such a run
    made = found(opened, given.run)
    if made is None:
        raise LodesetError(
            f"run {given.run} was not made ready for the dashboard, so its samples cannot be drawn again: "
            f"`lodeset inspect {opened.path} --run {given.run} --make-only` makes it"
        )
    with reading(opened.store, made) as data:
        judged = checked(data, given)
    place, new = store(opened.store, judged)
    return StoredAudit(judged, place, new)


def artifacts(opened: Opened) -> dict[str, Artifact]:
    """The finished artifacts of this configuration, by stage id."""
    from lodeset.pipeline.dag.decisions import decide

    return {id_: d.artifact for id_, d in decide(opened.store, opened.stages).items() if d.artifact is not None}


def dedup_preview(
    opened: Opened, watch: Callable[[Event], None], path: str | Path, pairs: int = 12, run: int | None = None
) -> dict[str, Any]:
    """Runs everything up to dedup (which may refuse what it found) and writes a page of pairs around its line. With `run`, or where
    sources are gone, it is dedup as that run, or the last one, left it.

    Returns where the page is, and how many pairs each section counts.

    Raises:
        LodesetError: a stage before dedup failed, no run holds dedup, or `path` cannot be written.
    """
    from lodeset.infra.report.preview import bands, edges_of, write_preview
    from lodeset.pipeline.dag.decisions import decide
    from lodeset.pipeline.dag.stage import closure, read_as
    from lodeset.pipeline.specs import DedupSpec
    from lodeset.pipeline.stages.dedup.run import chosen_thresholds

    refused = None
    if run is not None or not opened.stages:
        done = dict(held(opened, run).artifacts)
        if DEDUP not in done:
            raise LodesetError(f"no finished run in {opened.store.url} holds {DEDUP}: `lodeset run` first")
        spec, edges = read_as(DedupSpec, done[DEDUP].config), done[DEDUP].tables["edges"]
    else:
        stages = closure(opened.stages, "dedup")
        try:
            run_stages(opened, stages, watch, ())
        except GateError as error:
            refused = str(error)
        decisions = decide(opened.store, stages)
        done = {id_: d.artifact for id_, d in decisions.items() if d.artifact is not None}
        spec, edges = decisions[DEDUP].stage.spec, edges_of(opened.store, decisions[DEDUP])
    limits = chosen_thresholds(spec, done.get("calibrate/pool"))
    found = bands(opened.store, edges, spec, limits.pool, pairs)
    line = (
        f"Aligned pairs are copies from log-odds {spec.min_score:g} on (dedup.min_score)."
        if spec.verify == "pixels"
        else f"Pairs are copies above a cosine of {limits.pool:.3f} (dedup.threshold)."
    )
    line += f" Dedup refused this: {refused}." if refused else ""
    page = write_preview(opened.store, done, found, line, opened.config.ingest.max_pixels, Path(path), title_of(opened))
    sections = [{"title": band.title, "copies": band.copies, "pairs": band.count} for band in found]
    return {"path": str(page), "refused": refused, "sections": sections}


def demo(folder: str | Path, watch: Callable[[Event], None], seed: int = 0) -> dict[str, Any]:
    """Makes a sample world with known truth, another for every seed (unless one is there), runs everything on it, and judges it.

    Raises:
        LodesetError: the folder is in use or cannot be written, or a stage failed.
        GateError: a reference image, or a copy of one, reached the shards.
    """
    from lodeset.infra.demo.run import run_demo

    return run_demo(Path(folder), watch, seed)


def metrics(opened: Opened) -> str:
    """The state of the last attempt and the totals of the last finished run in Prometheus' text format, from the store."""
    from lodeset.infra.observing.metrics import exposition

    shown = held(opened)
    return exposition(opened.config.name, now(opened), summary(opened), status(opened), shown.run)


def doctor(path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> list[Check]:
    """What works on this machine, and what to install for what does not; everything is tried for real. With a configuration, also
    its store, its disk and its Ray cluster.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from lodeset.infra.doctor import examine, examine_setting

    return [*examine(), *(examine_setting(read(path, overrides)) if path is not None else [])]
