"""The runs of the data set: what each kept and dropped and how fast it was, and the progress of the one at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.site import Site, TheSite
from lodeset.infra.gates.accepted import accepted
from lodeset.infra.gates.outcome import last_outcome
from lodeset.infra.looking import looking
from lodeset.infra.looking.held import Held
from lodeset.infra.looking.summary import REPORTS, report_path
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.runs import artifacts_of, newest_first
from lodeset.pipeline.dag.store import Artifact, Store

router = APIRouter()

RUNS_SHOWN = 12
FUNNEL = (  # stage, which of its figures, what that is
    ("ingest/pool", "taken", "files in the pool"),
    ("ingest/pool", "kept", "distinct, readable images"),
    ("filter/pool", "kept", "left by the filters"),
    ("dedup/pool", "kept", "left without near-duplicates and leaks"),
    ("semdedup/pool", "kept", "left without semantic duplicates"),
    ("retrieve/all", "kept", "selected"),
    ("write_shards/all", "kept", "in shards"),
)
# The page of a run is a document of its own, made when the run ended: it may have its styles, and nothing else.
REPORT_POLICY = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"

RunNumber = Annotated[int | None, Query(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One row of the list of runs."""

    number: int
    ended: float
    limit: int | None
    until: str
    rolled_back_to: int | None
    images: int | None  # in its shards
    gates: str  # what its gates found: ok, warn, error or empty


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the funnel.

    Attributes:
        stage: the stage whose figure this is.
        images_before: the same figure of the run before; None if it had no such stage.
    """

    label: str
    stage: str
    images: int
    images_before: int | None

    @property
    def change(self) -> int:
        return self.images - self.images_before if self.images_before is not None else 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the chosen run, beside that of the run before.

    Attributes:
        artifact: None if the stage did not run.
        before: the artifact of the run before, if that had one.
        rate: images per second; None where the stage took no time that counts.
    """

    id: str
    artifact: Artifact | None
    before: Artifact | None

    @property
    def same(self) -> bool:
        """Whether this is what an earlier run had made."""
        return (
            self.artifact is not None
            and self.before is not None
            and self.artifact.fingerprint == self.before.fingerprint
        )

    @property
    def rate(self) -> float | None:
        return _rate(self.artifact)

    @property
    def rate_before(self) -> float | None:
        return None if self.same else _rate(self.before)


@router.get("/")
def runs(request: Request, site: TheSite, run: RunNumber = None, before: RunNumber = None) -> Response:
    """The list of runs, and the funnel of one of them."""
    opened = site.opened
    shown = looking.held(opened, run or site.number)
    number = shown.run.number if shown.run is not None else None
    request.state.run = number  # the head of the page names it
    found, older = _listed(opened.store, opened.config.name, before)
    earlier = _run_before(opened.store, shown.run)
    made_before = artifacts_of(opened.store, earlier) if earlier is not None else {}
    event = accepted(opened.store, shown.run.name, shown.run.limit) if shown.run is not None else None
    return render.page(
        request,
        "runs.html.jinja",
        shown=shown,
        number=number,
        earlier=earlier,
        stages=_stages(shown, made_before),
        funnel=_funnel(shown, made_before),
        seconds=sum(artifact.seconds for artifact in shown.artifacts.values()),
        runs=found,
        older=older,
        newest_first=before is None,
        accepted=event.run if event is not None else None,
        report=number is not None and report_path(number).rpartition("/")[2] in opened.store.names(REPORTS),
        **_live(site, number),
    )


@router.get("/runs/now")
def now(request: Request, site: TheSite, shown: RunNumber = None) -> Response:
    """The progress of the run at work, which the page asks for again and again. `shown` is the run on that page."""
    return render.page(request, "now.html.jinja", **_live(site, shown))


@router.get("/runs/{number}/report")
def report(site: TheSite, number: int) -> Response:
    """The report that the store keeps of a run."""
    page = site.opened.store.read(report_path(number))
    if page is None:
        raise HTTPException(404, f"The store has no report of run {number}. `lodeset report` writes one.")
    return Response(page, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": REPORT_POLICY})


def _live(site: Site, shown: int | None) -> dict[str, Any]:
    """What the fragment with the progress needs."""
    found = looking.now(site.opened)
    newest = next(newest_first(site.opened.store, site.opened.config.name), None)
    later = newest.number if newest is not None and newest.number > (shown or 0) else None
    return {"now": found, "later": later, "shown_run": shown}


def _listed(store: Store, name: str, before: int | None) -> tuple[list[Listed], int | None]:
    """A page of runs, the newest first, and the `before` of the page after it."""
    runs = (run for run in newest_first(store, name) if before is None or run.number < before)
    found = list(islice(runs, RUNS_SHOWN + 1))
    page = found[:RUNS_SHOWN]
    return [_row(store, run) for run in page], page[-1].number if len(found) > RUNS_SHOWN else None


def _row(store: Store, run: Run) -> Listed:
    made = run.stages.get("write_shards/all")
    written = store.artifact("write_shards", "all", made.fingerprint) if made is not None else None
    outcome = last_outcome(store, run.number)
    return Listed(
        number=run.number,
        ended=run.ended,
        limit=run.limit,
        until=run.until,
        rolled_back_to=run.rolled_back.to if run.rolled_back is not None else None,
        images=written.rows.kept if written is not None else None,
        gates=outcome.status if outcome is not None else "",
    )


def _run_before(store: Store, run: Run | None) -> Run | None:
    """The run that this one is compared with; None if there was none, or if `gc` has deleted its record."""
    if run is None or run.before is None or run.before not in store.run_numbers():
        return None
    return store.run(run.before)


def _stages(shown: Held, before: Mapping[str, Artifact]) -> list[Stage]:
    return [Stage(id=id_, artifact=shown.artifacts.get(id_), before=before.get(id_)) for id_ in shown.ids]


def _funnel(shown: Held, before: Mapping[str, Artifact]) -> list[Step]:
    """The way of the pool into the shards, as far as the run went."""
    return [
        Step(
            label=label,
            stage=id_,
            images=int(getattr(shown.artifacts[id_].rows, field)),
            images_before=int(getattr(before[id_].rows, field)) if id_ in before else None,
        )
        for id_, field, label in FUNNEL
        if id_ in shown.artifacts
    ]


def _rate(artifact: Artifact | None) -> float | None:
    """Images per second of a stage that made them one by one."""
    if artifact is None or artifact.seconds < 0.05 or artifact.rows.taken == 0:
        return None
    return artifact.rows.taken / artifact.seconds
