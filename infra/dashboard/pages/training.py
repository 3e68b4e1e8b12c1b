"""What training and pruning made of the images: curves, accuracies, patch features, and models of smaller sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from starlette.responses import Response

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.site import TheSite
from lodeset.infra.looking import looking
from lodeset.infra.looking.held import Held
from lodeset.infra.report import charts
from lodeset.infra.report.collect import TRAINED
from lodeset.infra.report.contents import Scores, Training
from lodeset.infra.report.curves import Curves, curves
from lodeset.infra.report.pruned import drawn, report_of, smallest_k
from lodeset.infra.report.section import stored
from lodeset.infra.report.trained import scores_of, training_of
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.runs import newest_first
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Store
from lodeset.pruning.specs import PruneDetails
from lodeset.training.specs import EvaluateDetails

router = APIRouter()

RUNS_OFFERED = 50
RUNS_DRAWN = 20  # in the chart of accuracies
PICTURES = 16  # of each target set
STAGES = {
    "train": "Pretraining",
    "finish": "At a higher resolution",
    "distill": "A smaller model that learns from it",
}
NETWORKS = {
    "trained": "trained here",
    "finished": "finished at a higher resolution",
    "distilled": "smaller one that learned from it",
    "untrained": "same network before training",
    "embedder": "embedder that curated",
}

RunNumber = Annotated[int | None, Query(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One stage that trains, beside that of another run.

    Attributes:
        other: None if there is no other run, or if it has no such stage.
        same: whether both runs used one result.
    """

    title: str
    own: Training
    other: Training | None
    same: bool
    curves: Sequence[Curves]
    legend: Sequence[tuple[str, Markup]]


@router.get("/training")
def training(
    request: Request,
    site: TheSite,
    run: RunNumber = None,
    with_: Annotated[int | None, Query(alias="with", ge=1)] = None,
) -> Response:
    """The models of a run, and with `with` those of another one beside them."""
    store = site.opened.store
    shown = looking.held(site.opened, run or site.number)
    other = looking.held(site.opened, with_) if with_ is not None else None
    number = shown.run.number if shown.run is not None else None
    runs = list(islice(newest_first(store, site.opened.config.name), RUNS_OFFERED))
    evaluated, pruned = shown.artifacts.get("evaluate/all"), shown.artifacts.get("prune/all")
    scores = scores_of(store, evaluated) if evaluated is not None else ()
    others = other.artifacts.get("evaluate/all") if other is not None else None
    jobs = [report_of(job) for job in read_as(PruneDetails, pruned.details).jobs] if pruned is not None else []
    section = request.app.state.templates.from_string(stored("pruning.html.jinja"))
    return render.page(
        request,
        "training.html.jinja",
        runs=runs,
        number=number,
        with_number=with_,
        trained=_trained(store, shown, other, number, with_),
        scores=scores,
        before={one.target: one for one in scores_of(store, others)} if others is not None else {},
        ks={one.target: _ks(one) for one in scores},
        networks=NETWORKS,
        pictures=PICTURES,
        over_runs=_over_runs(store, runs[:RUNS_DRAWN]),
        pruning=Markup(section.render(jobs=[drawn(job, store.read) for job in jobs], smallest_k=smallest_k))
        if jobs
        else Markup(""),
        has_shards="write_shards/all" in shown.artifacts,
    )


def _trained(store: Store, shown: Held, other: Held | None, number: int | None, with_: int | None) -> list[Trained]:
    found = []
    for stage in TRAINED:
        artifact = shown.artifacts.get(f"{stage}/all")
        if artifact is None:
            continue
        beside = other.artifacts.get(f"{stage}/all") if other is not None else None
        same = beside is not None and beside.fingerprint == artifact.fingerprint
        own = training_of(store, artifact)
        second = training_of(store, beside) if beside is not None and not same else None
        names = {f"run {number}" if second is not None else "": own}
        if second is not None:
            names[f"run {with_}"] = second
        legend = [(f"run {number}", charts.key(0)), (f"run {with_}", charts.key(1, "dashed"))]
        found.append(
            Trained(
                title=STAGES[stage],
                own=own,
                other=second,
                same=same,
                curves=curves(names),
                legend=legend if second is not None else (),
            )
        )
    return found


def _ks(scores: Scores) -> list[str]:
    return sorted({k for by_k in scores.knn.values() for k in by_k}, key=int)


def _over_runs(store: Store, runs: Sequence[Run]) -> list[tuple[str, Markup, list[tuple[int, float]]]]:
    """For each target set: how accurate the trained network was in each run, as a chart and as figures; empty for a single run."""
    points: dict[str, list[tuple[int, float]]] = {}
    for run in reversed(runs):
        made = run.stages.get("evaluate/all")
        artifact = store.artifact("evaluate", "all", made.fingerprint) if made is not None else None
        if artifact is None:
            continue
        for target, tree in read_as(EvaluateDetails, artifact.details).targets.items():
            by_k: Mapping[str, float] = tree["knn"].get("trained", {})
            if by_k:
                points.setdefault(target, []).append((run.number, 100 * by_k[smallest_k(by_k)]))
    return [
        (
            target,
            charts.line_chart([charts.Series(target, found)], "run", "kNN accuracy of the trained network, %"),
            found,
        )
        for target, found in points.items()
        if len(found) > 1
    ]
