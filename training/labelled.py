"""Labelled target sets: which images are the gallery, which are the test, and of which class each is.

What a source said of an image counts. Where it says no label of any image, the folders that the images lie in are their classes, as most
published sets come: `<class>/`, `<split>/<class>/` or `<class>/<split>/`, of files as of members of archives.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.containers import suffixes
from lodeset.pipeline.sources.metadata import field_of, label_text
from lodeset.pipeline.sources.reading import Location
from lodeset.pipeline.tables import records

GALLERY, TEST = "gallery", "test"
# What sets call their splits. The first of them that labelled images have is taken, in any case.
NAMES = {GALLERY: ("gallery", "train", "training"), TEST: ("test", "validation", "val", "valid", "query")}
DRAWN = 5  # where classes are folders and there is no split, every fifth image of a class is test
LABEL, SPLIT = (TargetSet.model_fields[name].default for name in ("label", "split"))
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Target:
    """One target set: its images in the order of their ids, with label and split.

    `understood` is what was read out of its source beyond what it says in so many words: names of splits, folders as labels.
    """

    name: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...]
    places: tuple[Location, ...]
    understood: Mapping[str, str] = field(default_factory=dict)

    def rows(self, split: str) -> list[int]:
        return [row for row, found in enumerate(self.splits) if found == split]


@dataclass(frozen=True)
class _Said:
    """What is known of an image before it is known which splits count."""

    label: str | None
    split: str | None


def read_target(store: Store, ingested: Artifact, name: str, label: str, split: str) -> tuple[Target, dict[str, int]]:
    """The labelled images of a target set, and how many of the others were left out, by reason.

    Raises:
        LodesetError: no labels, or no gallery or no test image; says which labels, splits and fields there are.
    """
    rows = store.table(ingested.tables.get("metadata", ()), None, records.METADATA).to_pylist()
    classes: dict[str, str] = {}
    called: dict[str, str] = {}
    for row in rows:  # of several places of one image, the first that says it
        for found, value in ((classes, _class_of(field_of(row, label))), (called, field_of(row, split))):
            if value is not None:
                found.setdefault(row["image_id"], value)
    places: dict[str, Location] = {}
    columns = ["image_id", "uri", "member", "offset", "size_bytes"]
    for row in store.table(ingested.tables["locations"], columns).to_pylist():
        places.setdefault(row["image_id"], Location(**row))
    said = {i: _Said(classes.get(i), called.get(i)) for i in sorted(places)}
    understood: dict[str, str] = {}
    if label == LABEL and not any(one.label for one in said.values()):
        said, understood = _by_folder(places, said)
    if not any(one.label for one in said.values()):
        folders = "or put each class into a folder of its name" if label == LABEL else "or none, if folders are classes"
        raise LodesetError(
            f"target set `{name}`: none of its {len(said)} images has {label}: give the field that holds the class as `label:` "
            f"(there are: {_fields(rows)}), {folders}"
        )
    taken = _splits(said, name, split)
    if "split" not in understood:
        understood |= {needed: str(told) for told, needed in taken.items() if told != needed}
    left_out = {"no_label": 0, "other_split": 0}
    chosen: list[tuple[str, str, str]] = []
    for image_id, one in said.items():
        its = taken.get(one.split)
        if its is None:
            left_out["other_split"] += 1
        elif one.label is None:
            left_out["no_label"] += 1
        else:
            chosen.append((image_id, one.label, its))
    ids, labels, splits = (tuple(column) for column in zip(*chosen, strict=True))
    target = Target(name, ids, labels, splits, tuple(places[i] for i in ids), understood)
    return target, {reason: n for reason, n in left_out.items() if n}


def _class_of(label: str | None) -> str | None:
    return None if label is None else label_text(label) or None


def unknown_classes(target: Target) -> str | None:
    """What to tell of test images whose class no gallery image has: no neighbour can name it. None where there are none."""
    known = {target.labels[row] for row in target.rows(GALLERY)}
    missing = Counter(target.labels[row] for row in target.rows(TEST) if target.labels[row] not in known)
    if not missing:
        return None
    names = ", ".join(f"{shown(name)!r} ({count})" for name, count in missing.most_common(_SHOWN))
    others = ", ".join(repr(shown(name)) for name in sorted(known)[:_SHOWN])
    return (
        f"target set `{target.name}`: {missing.total()} of {len(target.rows(TEST))} test images are of classes that no gallery image has, "
        f"so none of them can be named rightly: {names}; the gallery has {others}{', ...' if len(known) > _SHOWN else ''}"
    )


def _splits(said: Mapping[str, _Said], name: str, field: str) -> dict[str | None, str]:
    """The names of splits that count -> gallery or test."""
    labelled = Counter(one.split for one in said.values() if one.label is not None)
    taken: dict[str | None, str] = {}
    for needed, names in NAMES.items():
        called = next((n for n in names if any(_plain(split) == n for split in labelled)), None)
        if called is None:
            told = ", ".join(f"{n} x {s!r}" for s, n in labelled.most_common(_SHOWN))
            raise LodesetError(
                f"target set `{name}`: no labelled image has {field} = {' or '.join(map(repr, names))} ({field}: {told}): "
                f"evaluation compares test images with a gallery, so correct its `label:` and `split:`"
            )
        taken |= {split: needed for split in labelled if _plain(split) == called}
    return taken


def _plain(split: str | None) -> str:
    return (split or "").strip().lower()


def _fields(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the first images' metadata call their fields."""
    names: dict[str, None] = {}
    for row in rows[:100]:
        known = {column: None for column in ("label", "caption", "url", "licence") if row.get(column) is not None}
        names |= known | dict.fromkeys(json.loads(row["extra"]) if row.get("extra") else ())
    return ", ".join(list(names)[:_SHOWN]) or "none"


# -- classes that are folders


def _by_folder(places: Mapping[str, Location], said: Mapping[str, _Said]) -> tuple[dict[str, _Said], dict[str, str]]:
    """Labels by folder, and splits too where metadata say none; drawn where folders say none either; and what was done, in words."""
    folders = {i: _pieces(place) for i, place in places.items()}
    shared = _shared(list(folders.values()))
    found = {i: _read(folders[i][shared:]) for i in said}
    if len({one.label for one in found.values()} - {None}) < 2:
        return dict(said), {}  # one folder tells nothing apart
    by = {"label": "by folder"}
    if not any(one.split for one in said.values()):
        if any(one.split for one in found.values()):
            return found, by
        return _drawn(found), {**by, "split": f"drawn: every {DRAWN}th image of a class is test"}
    return {i: _Said(found[i].label, one.split) for i, one in said.items()}, by


def _pieces(place: Location) -> list[str]:
    """The folders of an image from the outermost on; an archive counts as one, and a table's rows lie in no folder."""
    if place.uri.lower().endswith(".parquet"):
        return place.uri.split("/")
    return posixpath.dirname(f"{place.uri}/{place.member}" if place.member else place.uri).split("/")


def _shared(folders: Sequence[list[str]]) -> int:
    """How many folders all have in common: where the set lies."""
    least, most = min(folders), max(folders)
    pairs = zip(least, most, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(least), len(most)))


def _read(pieces: Sequence[str]) -> _Said:
    """`<split>/<class>/...`, `<class>/<split>/...` or `<class>/...`; a folder that holds no others is a class, whatever its name. Files
    (`train.tar`) may name a split, and no class: shards do not."""
    files = [piece for piece in pieces if piece.lower().endswith(suffixes())]
    folders = [piece for piece in pieces if piece not in files]
    split = next((found for piece in files if (found := _split_of(piece))), None)
    if not folders:
        return _Said(None, split)
    if split is None and len(folders) > 1 and (split := _split_of(folders[0])):
        return _Said(folders[1], split)
    return _Said(folders[0], split or (_split_of(folders[1]) if len(folders) > 1 else None))


def _split_of(name: str) -> str | None:
    """The split that a folder or a file (`train.tar`) names."""
    stem = next((name.lower().removesuffix(end) for end in suffixes() if name.lower().endswith(end)), name.lower())
    return stem if any(stem in names for names in NAMES.values()) else None


def _drawn(found: Mapping[str, _Said]) -> dict[str, _Said]:
    """Every fifth image of a class, in the order of the ids (which are random), is test; of a class of several at least one."""
    seen: Counter[str | None] = Counter()
    sizes = Counter(one.label for one in found.values())
    drawn = {}
    for image_id in sorted(found):
        label = found[image_id].label
        seen[label] += 1
        test = seen[label] % DRAWN == 0 or (sizes[label] < DRAWN and sizes[label] == seen[label] > 1)
        drawn[image_id] = _Said(label, TEST if test else GALLERY)
    return drawn
