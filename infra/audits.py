"""Audits: samples of what a run rejected, dropped and selected, judged by people, kept beside the run."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError

FOLDER = "audits"
MOST_BYTES = 4 * 2**20
CONFIDENCE = 1.959964  # standard deviations that 95 % of a normal distribution lie within

Verdict = Literal["right", "wrong", "unsure"]
VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "unsure")


class Judged(BaseModel):
    """The verdicts about one sample. `of` names the decision, `count` is how often the run took it, `size` how many were drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: Annotated[str, Field(max_length=300)]
    count: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=1, le=10_000)]
    verdicts: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")], Verdict], Field(max_length=10_000)]


class Audit(BaseModel):
    """What the dashboard offers to download, and `lodeset audit` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    run: Annotated[int, Field(ge=1)]
    samples: Annotated[tuple[Judged, ...], Field(max_length=1_000)]


class Kept(Judged):
    """A sample as the store keeps it: also the stage that decided, and the fingerprint of what it made."""

    stage: str
    fingerprint: str

    @property
    def estimate(self) -> Estimate:
        return Estimate.of(self.verdicts, self.count)


class KeptAudit(BaseModel):
    """An audit as the store keeps it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    run: int
    samples: tuple[Kept, ...]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How often a decision is wrong, from the verdicts about a sample. `count`: how often it was taken.

    Attributes:
        rate: the share of wrong ones among those judged right or wrong; None before there is any.
        low, high: the 95 % confidence interval of the share among all (`interval`).
    """

    right: int
    wrong: int
    unsure: int
    count: int
    rate: float | None
    low: float
    high: float

    @classmethod
    def of(cls, verdicts: Mapping[str, Verdict], count: int) -> Estimate:
        right, wrong, unsure = (sum(one == verdict for one in verdicts.values()) for verdict in VERDICTS)
        low, high = interval(wrong, right + wrong, count)
        rate = wrong / (right + wrong) if right + wrong else None
        return cls(right=right, wrong=wrong, unsure=unsure, count=count, rate=rate, low=low, high=high)

    @property
    def between(self) -> tuple[int, int]:
        """How many of all that would be: no fewer than were found, and no more than were not found right."""
        low, high = math.floor(self.low * self.count), math.ceil(self.high * self.count)
        return max(self.wrong, low), max(self.wrong, min(self.count - self.right, high))


@dataclass(frozen=True)
class StoredAudit:
    """An audit in the store: its path there, and whether it was put there just now."""

    audit: KeptAudit
    path: str
    new: bool


def interval(found: int, of: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share among `count`, of which `of` were drawn without replacement.

    Wilson's, with a sample that counts for more the larger a part of all it is (Cochran, Sampling Techniques, 3rd edition, section
    2.6): exact where everything was drawn.
    """
    if of and of >= count:
        return found / of, found / of
    worth = of * (count - 1) / (count - of) if of else 0.0
    return wilson(found * worth / of if of else 0.0, worth)


def wilson(found: float, of: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    if of == 0:
        return 0.0, 1.0
    share, square = found / of, CONFIDENCE**2
    middle = (share + square / (2 * of)) / (1 + square / of)
    reach = CONFIDENCE * math.sqrt(share * (1 - share) / of + square / (4 * of**2)) / (1 + square / of)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def read(path: Path) -> Audit:
    """A file of verdicts.

    Raises:
        LodesetError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise LodesetError(f"cannot read the verdicts {path}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise LodesetError(f"{path} is larger than {MOST_BYTES:,} bytes: verdicts are smaller")
    return parsed(data, str(path))


def parsed(data: bytes | str, name: str) -> Audit:
    """Raises LodesetError: these are no verdicts."""
    try:
        return Audit.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LodesetError(f"{name} holds no verdicts of the dashboard: {where}: {first['msg']}") from None


def store(store_: Store, audit: KeptAudit) -> tuple[str, bool]:
    """Keeps an audit; returns its path, and whether it is new."""
    tree = audit.model_dump(mode="json")
    path = f"{FOLDER}/{audit.run}-{digest(tree)[:16]}.json"
    data = json.dumps(tree, indent=1, sort_keys=True).encode()
    return path, store_.put_absent(path, data)


def drop_audits(store_: Store, ids: Collection[str]) -> None:
    """Takes the audits that name one of these images out of the store."""
    wanted = [one.encode() for one in ids]
    for name in store_.names(FOLDER):
        data = store_.read(f"{FOLDER}/{name}")
        if data is not None and any(one in data for one in wanted):
            store_.delete(f"{FOLDER}/{name}")


def kept(store_: Store, made: Mapping[str, str]) -> Iterator[tuple[str, Kept]]:
    """The samples that were judged of these artifacts (stage id -> fingerprint), with the names of their files.

    Raises:
        LodesetError: a file is damaged.
    """
    for name in store_.names(FOLDER):
        if not name.endswith(".json"):
            continue
        data: Any = store_.read(f"{FOLDER}/{name}")
        if data is None:
            continue
        try:
            audit = KeptAudit.model_validate_json(data)
        except ValidationError as error:
            raise LodesetError(f"{FOLDER}/{name} in the store is damaged: {error.errors()[0]['msg']}") from None
        for sample in audit.samples:
            if made.get(sample.stage) == sample.fingerprint:
                yield name, sample
