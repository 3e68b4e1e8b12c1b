"""Labeled target sets: which images are the gallery, which are the test images, and the class of each.

Labels and splits of the source take precedence. If the source labels no image, the folders of the images are their
classes, as in most published sets: `<class>/`, `<split>/<class>/` or `<class>/<split>/`, for files and for members of
archives.
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
# Common names of splits. The first one that labeled images have is used, in upper or lower case.
NAMES = {GALLERY: ("gallery", "train", "training"), TEST: ("test", "validation", "val", "valid", "query")}
DRAWN = 5  # if classes are folders and there is no split, every fifth image of a class is a test image
LABEL, SPLIT = (TargetSet.model_fields[name].default for name in ("label", "split"))
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Target:
    """One target set: its images in the order of their ids, with label and split.

    `understood` records what was inferred from the source rather than read from it: names of splits, folders as labels.
    """

    name: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...]
    places: tuple[Location, ...]
    understood: Mapping[str, str] = field(default_factory=dict)

    def rows(self, split: str) -> list[int]:
        return [row for row, of in enumerate(self.splits) if of == split]


@dataclass(frozen=True)
class _Facts:
    """What is known about an image before the names of the splits are resolved."""

    label: str | None
    split: str | None


def read_target(store: Store, ingested: Artifact, name: str, label: str, split: str) -> tuple[Target, dict[str, int]]:
    """The labeled images of a target set, and the number of images that were left out, by reason.

    Raises:
        LodesetError: there are no labels, no gallery or no test images; the message lists the labels, splits and fields
            that exist.
    """
    rows = store.table(ingested.tables.get("metadata", ()), None, records.METADATA).to_pylist()
    classes: dict[str, str] = {}
    called: dict[str, str] = {}
    for row in rows:  # if an image has several places, the first value counts
        for values, value in ((classes, _class_of(field_of(row, label))), (called, field_of(row, split))):
            if value is not None:
                values.setdefault(row["image_id"], value)
    places: dict[str, Location] = {}
    columns = ["image_id", "uri", "member", "offset", "size_bytes"]
    for row in store.table(ingested.tables["locations"], columns).to_pylist():
        places.setdefault(row["image_id"], Location(**row))
    facts = {i: _Facts(classes.get(i), called.get(i)) for i in sorted(places)}
    understood: dict[str, str] = {}
    if label == LABEL and not any(fact.label for fact in facts.values()):
        facts, understood = _by_folder(places, facts)
    if not any(fact.label for fact in facts.values()):
        folders = "or put each class into a folder of its name" if label == LABEL else "or none, if folders are classes"
        raise LodesetError(
            f"target set `{name}`: none of its {len(facts)} images has {label}: give the field that holds the class "
            f"as `label:` (existing fields: {_fields(rows)}), {folders}"
        )
    taken = _splits(facts, name, split)
    if "split" not in understood:
        understood |= {needed: str(original) for original, needed in taken.items() if original != needed}
    left_out = {"no_label": 0, "other_split": 0}
    chosen: list[tuple[str, str, str]] = []
    for image_id, fact in facts.items():
        role = taken.get(fact.split)
        if role is None:
            left_out["other_split"] += 1
        elif fact.label is None:
            left_out["no_label"] += 1
        else:
            chosen.append((image_id, fact.label, role))
    ids, labels, splits = (tuple(column) for column in zip(*chosen, strict=True))
    target = Target(name, ids, labels, splits, tuple(places[i] for i in ids), understood)
    return target, {reason: n for reason, n in left_out.items() if n}


def _class_of(label: str | None) -> str | None:
    return None if label is None else label_text(label) or None


def unknown_classes(target: Target) -> str | None:
    """A warning about test images whose class no gallery image has, so that no neighbor can name it; None if there are
    none.
    """
    known = {target.labels[row] for row in target.rows(GALLERY)}
    missing = Counter(target.labels[row] for row in target.rows(TEST) if target.labels[row] not in known)
    if not missing:
        return None
    names = ", ".join(f"{shown(name)!r} ({count})" for name, count in missing.most_common(_SHOWN))
    others = ", ".join(repr(shown(name)) for name in sorted(known)[:_SHOWN])
    return (
        f"target set `{target.name}`: {missing.total()} of {len(target.rows(TEST))} test images are of classes that "
        f"no gallery image has, so they cannot be classified correctly: {names}; the gallery has "
        f"{others}{', ...' if len(known) > _SHOWN else ''}"
    )


def _splits(facts: Mapping[str, _Facts], name: str, field: str) -> dict[str | None, str]:
    """Map the names of the splits that are used to gallery or test."""
    labelled = Counter(fact.split for fact in facts.values() if fact.label is not None)
    taken: dict[str | None, str] = {}
    for needed, names in NAMES.items():
        called = next((n for n in names if any(_plain(split) == n for split in labelled)), None)
        if called is None:
            counts = ", ".join(f"{n} x {s!r}" for s, n in labelled.most_common(_SHOWN))
            raise LodesetError(
                f"target set `{name}`: no labeled image has {field} = {' or '.join(map(repr, names))} ({field}: "
                f"{counts}): evaluation compares test images with a gallery, so correct its `label:` and `split:`"
            )
        taken |= {split: needed for split in labelled if _plain(split) == called}
    return taken


def _plain(split: str | None) -> str:
    return (split or "").strip().lower()


def _fields(rows: Sequence[Mapping[str, Any]]) -> str:
    """The names of the metadata fields of the first images."""
    names: dict[str, None] = {}
    for row in rows[:100]:
        known = {column: None for column in ("label", "caption", "url", "licence") if row.get(column) is not None}
        names |= known | dict.fromkeys(json.loads(row["extra"]) if row.get("extra") else ())
    return ", ".join(list(names)[:_SHOWN]) or "none"


# -- classes that are folders


def _by_folder(places: Mapping[str, Location], facts: Mapping[str, _Facts]) -> tuple[dict[str, _Facts], dict[str, str]]:
    """Labels from folders, and splits too unless metadata give them (drawn if folders give none either); and a
    description of what was done.
    """
    folders = {i: _pieces(place) for i, place in places.items()}
    shared = _shared(list(folders.values()))
    by_folder = {i: _read(folders[i][shared:]) for i in facts}
    if len({fact.label for fact in by_folder.values()} - {None}) < 2:
        return dict(facts), {}  # a single folder distinguishes nothing
    by = {"label": "by folder"}
    if not any(fact.split for fact in facts.values()):
        if any(fact.split for fact in by_folder.values()):
            return by_folder, by
        return _drawn(by_folder), {**by, "split": f"drawn: every {DRAWN}th image of a class is test"}
    return {i: _Facts(by_folder[i].label, fact.split) for i, fact in facts.items()}, by


def _pieces(place: Location) -> list[str]:
    """The folders of an image, outermost first; an archive counts as a folder, and rows of a table are in no folder."""
    if place.uri.lower().endswith(".parquet"):
        return place.uri.split("/")
    return posixpath.dirname(f"{place.uri}/{place.member}" if place.member else place.uri).split("/")


def _shared(folders: Sequence[list[str]]) -> int:
    """The number of folders that all images have in common: the location of the set."""
    least, most = min(folders), max(folders)
    pairs = zip(least, most, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(least), len(most)))


def _read(pieces: Sequence[str]) -> _Facts:
    """Parse `<split>/<class>/...`, `<class>/<split>/...` or `<class>/...`; a folder without subfolders is a class,
    whatever its name. Files (`train.tar`) may name a split but not a class: shards do not.
    """
    files = [piece for piece in pieces if piece.lower().endswith(suffixes())]
    folders = [piece for piece in pieces if piece not in files]
    split = next((named for piece in files if (named := _split_of(piece))), None)
    if not folders:
        return _Facts(None, split)
    if split is None and len(folders) > 1 and (split := _split_of(folders[0])):
        return _Facts(folders[1], split)
    return _Facts(folders[0], split or (_split_of(folders[1]) if len(folders) > 1 else None))


def _split_of(name: str) -> str | None:
    """The split that a folder or a file (`train.tar`) names."""
    stem = next((name.lower().removesuffix(end) for end in suffixes() if name.lower().endswith(end)), name.lower())
    return stem if any(stem in names for names in NAMES.values()) else None


def _drawn(by_folder: Mapping[str, _Facts]) -> dict[str, _Facts]:
    """Mark every fifth image of a class as test, in the (random) order of the ids; at least one if the class has
    several.
    """
    seen: Counter[str | None] = Counter()
    sizes = Counter(fact.label for fact in by_folder.values())
    drawn = {}
    for image_id in sorted(by_folder):
        label = by_folder[image_id].label
        seen[label] += 1
        test = seen[label] % DRAWN == 0 or (sizes[label] < DRAWN and sizes[label] == seen[label] > 1)
        drawn[image_id] = _Facts(label, TEST if test else GALLERY)
    return drawn
