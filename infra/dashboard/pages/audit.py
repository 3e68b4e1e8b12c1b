"""Audit: random samples of what the run rejected, dropped and selected, judged by people, and how often it was wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import ValidationError
from starlette.responses import Response

from lodeset.infra import audits
from lodeset.infra.audits import VERDICTS, Audit, Estimate, Judged
from lodeset.infra.dashboard import decoding, render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.links import Links, TheLinks
from lodeset.infra.dashboard.samples import SIZES, Decision, Item, decision, decisions, sample
from lodeset.infra.dashboard.site import number_of
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.containers import Ranges, recognized

router = APIRouter()

KEYS: Mapping[str, str] = {"right": "r", "wrong": "w", "unsure": "u"}
KINDS = {
    "reject": "Files that ingest rejected",
    "drop": "Images that were dropped",
    "selection": "Images that were selected",
}
SIDE = 640
MOST_BYTES = 2**20
LINKED = 150  # image_ids of a link: some proxies and servers refuse addresses longer than 8 kB

Of = Annotated[str, Query(max_length=300)]
Size = Annotated[int, Query(ge=1, le=1_000)]


@router.get("/audit")
def audit(request: Request, links: TheLinks, data: TheData) -> Response:
    """What can be judged, and what was found so far."""
    made = {id_: one.fingerprint for id_, one in data.inspected.held.artifacts.items()}
    known = list(audits.kept(links.site.opened.store, made))
    return render.page(
        request, "audit.html.jinja", decisions=decisions(data), kinds=KINDS, kept=known,
        estimates=_largest(known), number=number_of(data),
    )  # fmt: skip


def _largest(known: list[tuple[str, audits.Kept]]) -> dict[str, Estimate]:
    """The estimate of each decision: of its kept sample with the most verdicts, or of the latest run's between equals."""
    ordered = sorted(known, key=lambda found: (len(found[1].verdicts), _run_of(found[0]), found[0]))
    return {one.of: one.estimate for _, one in ordered}


def _run_of(name: str) -> int:
    """The number of the run, which the name of a kept file begins with; 0 where somebody renamed it."""
    number = name.partition("-")[0]
    return int(number) if re.fullmatch(r"[0-9]{1,18}", number) else 0


@router.get("/audit/judge")
def judge(request: Request, data: TheData, of: Of, size: Size = SIZES[0]) -> Response:
    """One sample, to be judged by keyboard or, without scripts, as a form."""
    found = decision(data, of)
    return render.page(
        request, "audit_judge.html.jinja", of=found, size=size, items=sample(data, found, size), keys=KEYS,
        verdicts=VERDICTS, question=_question(found), number=number_of(data), side=SIDE,
        other="the image that is kept" if found.kind == "drop" else "its query",
    )  # fmt: skip


def _question(of: Decision) -> str:
    if of.kind == "reject":
        return f"Is it right that this file was rejected as “{of.reason}”?"
    if of.kind == "selection":
        return f"Is it right that this image was selected for {of.reason}?"
    return {
        "near": "Is it right to drop the first image as a copy of the second?",
        "reference": "Is it right to drop the first image because of the second, which is in a reference set?",
        "included": "Is it right to drop the first image as a copy of the second, which is in an included set?",
        "semantic": "Is it right to drop the first image because the second, of the same cluster, means the same?",
        "not_selected": "Is it right that no set selected this image?",
    }.get(of.reason, f"Is it right that this image was dropped as “{of.reason}”?")


async def _fields(request: Request) -> list[tuple[str, str]]:
    """The fields of a form. It is read here, since a list of verdicts needs no library for uploads."""
    body = await request.body()
    if len(body) > MOST_BYTES:
        raise HTTPException(413, f"The verdicts are larger than {MOST_BYTES:,} bytes.")
    try:
        return parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=3_000)
    except ValueError:
        raise HTTPException(400, "These are no fields of a form.") from None


Fields = Annotated[list[tuple[str, str]], Depends(_fields)]


@router.post("/audit/result")
def result(request: Request, data: TheData, of: Of, size: Size, fields: Fields) -> Response:
    """How often the decision is wrong, as the verdicts so far say: a part of the page, or a page of its own."""
    found = decision(data, of)
    verdicts = _judged(data, found, size, fields).verdicts
    told = Estimate.of(verdicts, found.count)
    wrong = [] if found.kind == "reject" else [id_ for id_, verdict in verdicts.items() if verdict == "wrong"]
    template = "audit_told.html.jinja" if "hx-request" in request.headers else "audit_result.html.jinja"
    return render.page(
        request, template, of=found, told=told, size=min(size, found.count), wrong=len(wrong), linked=wrong[:LINKED]
    )


@router.post("/audit/verdicts.json")
def verdicts(data: TheData, of: Of, size: Size, fields: Fields) -> Response:
    """The verdicts as a file for `lodeset audit`: of this sample, and of those that the browser remembers."""
    number = number_of(data)
    if number is None:
        raise HTTPException(409, "No run has finished yet. Verdicts belong to a run.")
    judged = _judged(data, decision(data, of), size, fields)
    samples = {one.of: one for one in _earlier(fields) if one.of != of} | ({of: judged} if judged.verdicts else {})
    if not samples:
        raise HTTPException(400, "There are no verdicts yet.")
    made = Audit(run=number, samples=tuple(samples.values()))
    name = f"verdicts-run-{number}.json"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(made.model_dump_json(indent=1), media_type="application/json", headers=headers)


def _judged(data: Data, of: Decision, size: int, fields: list[tuple[str, str]]) -> Judged:
    """The verdicts that a form holds about the sample; a wrong field is refused."""
    known = {one.id for one in sample(data, of, size)}
    given: dict[str, Any] = {}
    for name, value in fields:
        if name.startswith("v-"):
            if name[2:] not in known or value not in VERDICTS:
                raise HTTPException(400, "A verdict is about something that this sample does not hold.")
            given[name[2:]] = value
    return Judged(of=of.id, count=of.count, size=size, verdicts=given)


def _earlier(fields: list[tuple[str, str]]) -> list[Judged]:
    """The samples that the browser remembers, one a field."""
    found = []
    for name, value in fields:
        if name == "earlier":
            try:
                found.append(Judged.model_validate_json(value))
            except ValidationError:
                raise HTTPException(400, "The browser remembers verdicts that cannot be read. Judge again.") from None
    return [one for one in found if one.verdicts]


@router.get("/audit/rejected.webp")
def rejected(links: TheLinks, data: TheData, of: Of, size: Size, id_: Annotated[str, Query(alias="id")]) -> Response:
    """A rejected file as a picture, if it can be decoded after all."""
    found = next((one for one in sample(data, decision(data, of), size) if one.id == id_ and one.rejected), None)
    if found is None:
        raise HTTPException(404, "The sample holds no such file.")
    try:
        made = decoding.small(_bytes(links, found), SIDE, links.site.opened.config.ingest.max_pixels)
    except (LodesetError, OSError) as error:
        made = decoding.placeholder(f"no picture: {error}", SIDE // 2)
    return Response(made, media_type="image/webp")


def _bytes(links: Links, item: Item) -> bytes:
    """The bytes of a rejected file as they are now; no image_id says whether they are still the same."""
    uri, member, offset, size = item.place
    most = links.site.opened.config.ingest.max_bytes
    if size > most:
        raise LodesetError(f"it has {size:,} bytes, and ingest.max_bytes allows {most:,}")
    container = recognized(uri) if member else None
    opened = container.opened if container is not None else Ranges
    with contextlib.closing(opened(uri, lambda: None)) as file:
        try:
            return file.read(member, offset, size, size)
        except LodesetError:
            raise
        except Exception as error:  # whatever the reader of a damaged archive says
            raise LodesetError(f"its source cannot be read: {error}") from error
