"""What the manifests of a store say, and how they are written so that no changed bit of them passes for another fact.

A manifest is JSON. Its last key, `checksum`, is the SHA-256 of the text without that key. Manifests of lodeset 0.1.0 have none;
of these, the form alone is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lodeset.pipeline.dag import lists

_SEAL = re.compile(rb',\n "checksum": "([0-9a-f]{64})"\n\}$')
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class File:
    """One committed file. `path` is relative to the store; `sha256` is that of its bytes."""

    path: str
    rows: int
    size_bytes: int
    sha256: str

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Part:
    """One committed unit of work: a file a table, and what was counted while making it.

    `created` (seconds since 1970) and `version`, of the code that made it, are for people; 0 and empty where lodeset 0.1.0 made it.
    """

    key: str
    files: Mapping[str, File]
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    created: float = 0.0
    version: str = ""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Rows:
    """What went in, what came out, what was dropped for which reason."""

    taken: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def balanced(self) -> bool:
        return self.taken == self.kept + sum(self.dropped.values())


@dataclass(frozen=True)
class Artifact:
    """A finished stage, as its manifest tells it.

    `created` is for people. `order` is larger than that of all earlier artifacts of the same stage and set, whatever the clock
    said; 0 in the manifests of lodeset 0.1.0. `used` are all parts that the stage read or made, by their stage, also those whose files
    it does not list and that save the next run work; None where that was not recorded.
    """

    stage: str
    set: str
    version: int
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    tables: Mapping[str, tuple[File, ...]]
    rows: Rows
    content: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    created: float = 0.0
    order: int = 0
    used: Mapping[str, tuple[str, ...]] | None = None

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @property
    def id(self) -> str:
        return f"{self.stage}/{self.set}"

    def identity(self, of: str) -> str:
        """What stages downstream depend on: a digest of the content named `of`, or the fingerprint."""
        return self.content[of] if of else self.fingerprint

    def files(self) -> tuple[File, ...]:
        return tuple(file for files in self.tables.values() for file in files)

    def to_json(self, put: lists.Put) -> dict[str, Any]:
        """Its manifest, once the pieces of its long lists are put."""
        tree = asdict(self)
        for key in _LISTS:
            if tree[key] is not None:
                tree[key] = {name: lists.packed(rows, put) for name, rows in tree[key].items()}
        return tree


_LISTS = ("tables", "used")  # of an artifact


@dataclass(frozen=True)
class Made:
    """A stage as a run left it: which artifact, and where this one stands among those of its stage and set (`Artifact.order`)."""

    fingerprint: str
    order: int

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class RolledBack:
    """Why the record of a run repeats that of an earlier one.

    Attributes:
        to: the number of the run whose artifacts count again.
        runs: the numbers of the runs that do not count anymore.
        artifacts: what these made, by stage id: fingerprints of stages that continue from their own last artifact.
        made_from: digest of what one of these runs was made from (`pipeline/dag/rollbacks.py`) -> its number.
        at, by, why: when (UTC), who did it, and the reason that they gave.
    """

    to: int
    runs: tuple[int, ...]
    artifacts: Mapping[str, tuple[str, ...]]
    made_from: Mapping[str, int]
    at: str
    by: str
    why: str

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Run:
    """What a finished run made, or found made: a store can be understood by its runs alone.

    Attributes:
        number: 1, 2, ... in the store, in the order in which runs finished.
        before: the number of the last run of the same name and limit.
        name, limit: which data set it is a version of, as the configuration tells.
        until: the stage that it was to stop after; empty for all.
        config: the whole configuration, as it was understood.
        stages: every stage of the configuration by id, in the order of the DAG; null for those after `until`.
        rolled_back: this record was made by a rollback and not by a run. All else is that of the run which it repeats.
    """

    number: int
    before: int | None
    name: str
    limit: int | None
    until: str
    config: Mapping[str, Any]
    stages: Mapping[str, Made | None]
    versions: Mapping[str, str]
    began: float
    ended: float
    rolled_back: RolledBack | None = None

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


def sealed(tree: Mapping[str, Any]) -> bytes:
    """A manifest's text, with its checksum."""
    body = json.dumps(tree, indent=1).encode()
    return body[:-2] + f',\n "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}'.encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        ValueError: it is no JSON object, or not what was written.
    """
    seal = _SEAL.search(data)
    body = data if seal is None else data[: seal.start()] + b"\n}"
    if seal is not None and hashlib.sha256(body).hexdigest() != seal.group(1).decode():
        raise ValueError("its text does not fit its checksum")
    tree = json.loads(body)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not an object")
    if "checksum" in tree:
        raise ValueError("its checksum is cut off or garbled")
    return tree


Told = TypeVar("Told")


def parsed(kind: TypeAdapter[Told], data: bytes) -> Told:
    """A manifest as what it is.

    Raises:
        ValueError: as above, or it lacks a field, or has one too many, or one of another type.
    """
    return _validated(kind, unsealed(data))


def _validated(kind: TypeAdapter[Told], tree: Mapping[str, Any]) -> Told:
    try:
        # By way of JSON, where a list stands for a tuple.
        return kind.validate_json(json.dumps(tree))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from None


def parsed_artifact(data: bytes, get: lists.Get) -> Artifact:
    """An artifact's manifest with its lists.

    Raises:
        ValueError: as above, or a piece of a list is missing, or not what was written.
    """
    tree = unsealed(data)
    for key in _LISTS:
        if isinstance(tree.get(key), dict):
            try:
                tree[key] = {name: lists.unpacked(rows, get) for name, rows in tree[key].items()}
            except (KeyError, TypeError) as error:
                raise ValueError(f"{key}: {type(error).__name__} {error}") from None
    return _validated(_ARTIFACT, tree)


def pieces_of(data: bytes, get: lists.Get) -> set[str]:
    """The digests of all pieces of an artifact's lists."""
    tree = unsealed(data)
    every = (rows for key in _LISTS for rows in (tree.get(key) or {}).values())
    return {digest for rows in every for digest in lists.pieces(rows, get)}


PART, RUN, _ARTIFACT = TypeAdapter(Part), TypeAdapter(Run), TypeAdapter(Artifact)
