"""The decisions of a run that people can judge, and random samples of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.infra import audits
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.remembered import remembered
from lodeset.infra.report.pictures import short_name
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables import records

Kind = Literal["reject", "drop", "selection"]
COPIES = ("near", "reference", "included", "semantic")
SIZES = (20, 50, 100)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a stage decided for one reason: `count` files or images of a set.

    Attributes:
        stage: the id of the stage, such as filter/pool.
        reason: why; of selections, the set that wanted the images.
    """

    kind: Kind
    stage: str
    set: str
    reason: str
    count: int

    @property
    def id(self) -> str:
        other = "" if self.stage.endswith(f"/{self.set}") or self.kind == "selection" else f"{self.set}/"
        return f"{self.kind}/{self.stage}/{other}{self.reason}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of samples that are worth offering: up to the first that holds all."""
        return tuple(size for n, size in enumerate(SIZES) if n == 0 or SIZES[n - 1] < self.count)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file or image of a sample.

    Attributes:
        id: the image_id; of a rejected file, a digest of its place.
        other: the image_id of the keeper of a copy, or of the query that found the image; empty if there is none.
        facts: what the run measured, by name.
    """

    id: str
    rejected: bool
    name: str
    other: str
    facts: Mapping[str, str]
    place: tuple[str, str, int, int] = ("", "", 0, 0)  # of a rejected file: uri, member, offset, size


@remembered(1)
def decisions(data: Data) -> tuple[Decision, ...]:
    """Rejects, drops and selections, the most frequent first in each kind."""
    found = [
        Decision(kind="reject", stage=id_, set=id_.partition("/")[2], reason=reason, count=count)
        for id_, artifact in data.inspected.held.artifacts.items()
        if artifact.stage == "ingest"
        for reason, count in _rejected(data, id_)
    ]
    dropped = data.rows(
        "SELECT set, dropped_by, outcome, count(*) AS n FROM inspected WHERE dropped_by != '' GROUP BY ALL"
    )
    found += [
        Decision(
            kind="drop", stage=_stage(data, row["dropped_by"]), set=row["set"], reason=row["outcome"], count=row["n"]
        )
        for row in dropped
    ]
    selected = data.rows(
        "SELECT name, count(*) AS n FROM (SELECT unnest(selected_for) AS name FROM inspected WHERE selected_for IS NOT NULL) "
        "GROUP BY name"
    )
    found += [
        Decision(kind="selection", stage="retrieve/all", set="pool", reason=row["name"], count=row["n"])
        for row in selected
    ]
    order = ("reject", "drop", "selection")
    return tuple(sorted(found, key=lambda one: (order.index(one.kind), -one.count, one.id)))


def _stage(data: Data, name: str) -> str:
    """The stage of this name that decides about the pool."""
    return "retrieve/all" if name == "retrieve" else f"{name}/pool"


def _rejected(data: Data, id_: str) -> list[tuple[str, int]]:
    artifact = data.artifact(id_)
    assert artifact is not None
    table = data.store.table(artifact.tables.get("rejects", ()), ["reason"], records.REJECTS)
    counts = pc.value_counts(table["reason"]).to_pylist()
    return [(one["values"], one["counts"]) for one in counts]


def decision(data: Data, id_: str) -> Decision:
    """Raises LodesetError: the run took no such decision."""
    for one in decisions(data):
        if one.id == id_:
            return one
    raise LodesetError(f"this run decided nothing that is called {id_[:120]}: the page Audit lists what there is")


@remembered(4)
def sample(data: Data, of: Decision, size: int) -> list[Item]:
    """Some of a decision, drawn at random: the same ones for a run each time, and a larger sample holds every smaller one."""
    run = data.inspected.held.run
    seed = int(digest("audit", run.number if run is not None else 0, of.id)[:16], 16)
    if of.kind == "reject":
        return _files(data, of, seed, size)
    if of.kind == "selection":
        condition, values = "list_contains(selected_for, ?)", [of.reason]
    else:
        condition = "set = ? AND outcome = ? AND dropped_by = ?"
        values = [of.set, of.reason, of.stage.partition("/")[0]]
    rows = np.sort(data.query(f"SELECT row FROM inspected WHERE {condition}", values)["row"].to_numpy())
    chosen = rows[_drawn(len(rows), seed, size)]
    table = pa.table({"row": chosen.astype(np.int32), "n": np.arange(len(chosen))})
    found = data.query("SELECT i.* FROM inspected i JOIN drawn USING (row) ORDER BY n", tables={"drawn": table})
    return [_item(row, of) for row in found.to_pylist()]


def _drawn(count: int, seed: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)[:size]


def _item(row: Mapping[str, Any], of: Decision) -> Item:
    facts = {"size": f"{row['width']:,} × {row['height']:,}, {row['format']}"}
    if row["label"]:
        facts["label"] = row["label"]
    if of.stage.startswith("filter/") and row["filter_score"] is not None:
        limit = row["filter_threshold"]
        facts["score"] = f"{row['filter_score']:.3g}" + (f" (limit {limit:.3g})" if limit is not None else "")
    other = ""
    if of.kind == "drop" and of.reason in COPIES:
        other = row["matched_id"] or ""
        if row["matched_similarity"] is not None:
            facts["cosine similarity"] = f"{row['matched_similarity']:.3f}"
    elif of.kind == "selection":
        other = row["query_id"] or ""
        if row["query_similarity"] is not None:
            facts["similarity to the query"] = f"{row['query_similarity']:.3f}"
    name = short_name(row["uri"] or "", row["member"] or "")
    return Item(id=row["image_id"], rejected=False, name=name, other=other, facts=facts)


def _files(data: Data, of: Decision, seed: int, size: int) -> list[Item]:
    artifact = data.artifact(of.stage)
    assert artifact is not None
    table = data.store.table(artifact.tables.get("rejects", ()), None, records.REJECTS)
    rows = np.flatnonzero(pc.equal(table["reason"], of.reason).to_numpy(zero_copy_only=False))
    found = []
    for row in table.take(pa.array(rows[_drawn(len(rows), seed, size)])).to_pylist():
        place = (row["uri"], row["member"], row["offset"], row["size_bytes"])
        facts = {"detail": row["detail"] or "none", "size": f"{row['size_bytes']:,} bytes"}
        found.append(
            Item(
                id=digest(*place)[:32],
                rejected=True,
                name=short_name(row["uri"], row["member"]),
                other="",
                facts=facts,
                place=place,
            )
        )
    return found


def checked(data: Data, audit: audits.Audit) -> audits.KeptAudit:
    """An audit whose verdicts are about the samples of this run.

    Raises:
        LodesetError: one is not.
    """
    kept = [_checked(data, one) for one in audit.samples]
    names = [one.of for one in kept]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LodesetError(f"the verdicts name {twice} twice: give one sample of each decision")
    if not any(one.verdicts for one in kept):
        raise LodesetError("the file has no verdict")
    return audits.KeptAudit(run=audit.run, samples=tuple(one for one in kept if one.verdicts))


def _checked(data: Data, judged: audits.Judged) -> audits.Kept:
    of = decision(data, judged.of)
    artifact = data.artifact(of.stage)
    assert artifact is not None
    if judged.count != of.count:
        raise LodesetError(f"{judged.of}: the run decided so {of.count:,} times, and the verdicts say {judged.count:,}")
    others = set(judged.verdicts) - _ids(sample(data, of, judged.size))
    if others:
        raise LodesetError(
            f"{judged.of}: {len(others):,} verdicts are about files that this run's sample of {judged.size} does not hold, "
            f"such as {min(others)}: are they of another run?"
        )
    return audits.Kept(**judged.model_dump(), stage=of.stage, fingerprint=artifact.fingerprint)


def _ids(items: Sequence[Item]) -> set[str]:
    return {one.id for one in items}
