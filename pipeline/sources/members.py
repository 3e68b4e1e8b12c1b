"""What lies in a source, and which sidecars describe which image."""

from __future__ import annotations

import functools
import itertools
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lodeset.pipeline.sources.choice import Members, matches
from lodeset.pipeline.sources.metadata import Metadata

Listed = TypeVar("Listed")

# What the members of one file may take in memory: 2 million at most, 512 bytes each and its name.
_LISTING_BYTES = 2**30
_MEMBER_BYTES = 512
# Members that say something about an image whose name they share.
SIDECARS = (".json", ".txt", ".cls")
# Sidecars of one image, and images of one sidecar that none of them is named after: what crafted archives could multiply.
_MOST = 16
# What a sidecar's name has to do with the image's, the farthest first: both extend one sample's, it is the start of the image's,
# it goes on where the image's ends, it is the image's without or with its extension.
_SAMPLE, _SHORTER, _LONGER, _STEM, _FULL = range(5)
# Dots of a name that are looked at.
_PIECES = 16
# What extends the name of a sample in WebDataset (`0001.seg.png`, `0001.meta.json`). Numbers do not: `img_0.5` is a name.
_WORD = re.compile(r"[A-Za-z][\w-]*(\.[A-Za-z][\w-]*)*")
# What a sidecar is called that belongs to a whole sample (`0001.meta.json` beside `0001.rgb.jpg`); other words may be another
# image's name (`photo.draft.json` beside `photo.final.jpg`).
_OF_SAMPLE = re.compile(
    r"(?i)([\w.-]*[._-])?(supplemental-?)?(meta|metadata|info|captions?|text|txt|alt|prompt|desc(ription)?|labels?|class(es)?|cls|category"
    r"|tags?|ann(o|otations?)?|attr(ibute)?s?|json|data|urls?|licen[cs]e|exif|pose|bbox(es)?|boxes|objects?|scores?)"
)


@dataclass(frozen=True, slots=True)
class Member:
    """Encoded bytes that may be an image, or what is known to be none (`reason`).

    Attributes:
        sidecars: what describes the image; of two that say the same thing the later one counts.
        shared: of a sidecar: another image reports on it.
        state: of a member that is a file of its own: changes when its content, or what the list says about it, does.
    """

    name: str
    offset: int
    size_bytes: int
    reason: str = ""
    detail: str = ""
    sidecars: tuple[Member, ...] = ()
    shared: bool = False
    state: str = ""

    @property
    def sample(self) -> str:
        """What a WebDataset sample's members share: the path up to the first dot of the file name."""
        folder, base = posixpath.split(self.name)
        return posixpath.join(folder, base[:1] + base[1:].split(".", 1)[0])

    @property
    def stem(self) -> str:
        """The path without the extension."""
        return posixpath.splitext(self.name)[0]

    @property
    def extension(self) -> str:
        return posixpath.splitext(self.name.lower())[1]

    @property
    def is_sidecar(self) -> bool:
        return self.extension in SIDECARS

    @property
    def identity(self) -> tuple[Any, ...]:
        """All fields, for a digest."""
        told = tuple(s.identity for s in self.sidecars)
        state = (self.state,) if self.state else ()
        return (self.name, self.offset, self.size_bytes, self.reason, self.detail, told, self.shared, *state)

    @property
    def total_bytes(self) -> int:
        return self.size_bytes + sum(s.size_bytes for s in self.sidecars)


@dataclass(frozen=True)
class Sample:
    """One member with its bytes, or (`reason`) why there are none."""

    uri: str
    member: str
    offset: int
    size_bytes: int
    data: bytes = b""
    reason: str = ""
    detail: str = ""
    metadata: Metadata = field(default_factory=Metadata)


def joined(members: Sequence[Member]) -> list[Member]:
    """The members of one file or folder in their order, with the sidecars put to the images that they describe.

    A sidecar describes the images whose names, with or without extension, are its own without `.json`, `.txt` or `.cls`;
    those that go on from there with words (`0001.seg.png`: members of one WebDataset sample) too, unless they have a sidecar
    named after them. Where no image is named as it is, it describes those that go on from its name, those from whose name it
    goes on (`0001.meta.json`), or the other members of its sample if it is called so that it means them all. Where names
    merely begin alike (`img_0.5.jpg` and `img_0.7.json`) it describes none. Several sidecars of an image are merged; where
    they contradict each other, the longest shared name counts. Of several with one name, the one beside the image counts,
    then the last, as in a tar that was appended to. A sidecar that describes nothing comes with a reason.
    """
    runs = [(sample, list(run)) for sample, run in itertools.groupby(members, key=lambda m: m.sample)]
    of_sample: dict[str, list[int]] = {}
    for number, (sample, _) in enumerate(runs):
        of_sample.setdefault(sample, []).append(number)
    settled: dict[int, list[Member]] = {}
    out: list[Member] = []
    for number, (sample, _) in enumerate(runs):
        if number not in settled:  # nearly always a sample is one run, and nothing of it is kept
            inside = {n: runs[n][1] for n in of_sample[sample]}
            settled.update(_Names(inside).settled())
        out += settled.pop(number)
    return out


class _Names:
    """The members that share a name up to its first dot, in runs, and who describes whom by name."""

    def __init__(self, runs: Mapping[int, Sequence[Member]]) -> None:
        self._runs = runs
        self._images = dict.fromkeys(m.name for run in runs.values() for m in run if is_image(m))
        self._sidecars = dict.fromkeys(name for run in runs.values() for name in _sidecars(run))

    def settled(self) -> dict[int, list[Member]]:
        """The members of each run as they are read: without the sidecars that an image has."""
        last: dict[str, Member] = {}  # sidecars by name, those that describe an image of their own run aside
        for run in self._runs.values():
            own = {name for m in run if is_image(m) for *_, name in self._told.get(m.name, ())}
            last.update({name: m for name, m in _sidecars(run).items() if name not in own})
        used: set[tuple[str, int]] = set()
        described: dict[int, list[Member]] = {}
        for number, run in self._runs.items():
            beside = _sidecars(run)
            described[number] = []
            for member in run:
                if is_image(member):
                    found = (beside.get(name, last.get(name)) for *_, name in self._told.get(member.name, ()))
                    sidecars = tuple(s for s in found if s is not None)
                    used.update((s.name, s.offset) for s in sidecars)
                    member = replace(member, sidecars=sidecars)
                described[number].append(member)
        return {n: [one for m in run for one in self._settled(m, used)] for n, run in described.items()}

    def _settled(self, member: Member, used: set[tuple[str, int]]) -> Iterator[Member]:
        if is_image(member) or member.reason:
            yield member
        elif (member.name, member.offset) not in used:
            reason, detail = self._unused(member)
            yield replace(member, reason=reason, detail=detail)

    def _unused(self, sidecar: Member) -> tuple[str, str]:
        """Why a sidecar describes nothing: (reason, detail)."""
        if not self._images:
            return "metadata_without_image", "no image shares its name"
        if sidecar.name in self._taken:
            return "repeated_metadata", f"another {posixpath.basename(sidecar.name)} counts"
        first = next(iter(self._images))
        others = f" and {len(self._images) - 1} more" if len(self._images) > 1 else ""
        return "ambiguous_metadata", f"part of its name is that of {first}{others}, but no image is named as it is"

    @functools.cached_property
    def _taken(self) -> set[str]:
        return {name for told in self._told.values() for *_, name in told}

    @functools.cached_property
    def _told(self) -> dict[str, list[tuple[int, int, str, str]]]:
        """Image -> (rank, length that is shared, extension, name) of its sidecars, by names alone, the nearest last."""
        by_stem: dict[str, list[str]] = {}
        beyond: dict[str, list[str]] = {}  # a start of names, up to a dot -> the images whose names go on from there
        for image in self._images:
            stem = posixpath.splitext(image)[0]
            by_stem.setdefault(stem, []).append(image)
            for start in _starts(stem):
                beyond.setdefault(start, []).append(image)
        parted = {name: posixpath.splitext(name) for name in self._sidecars}
        named: dict[str, set[str]] = {}
        for stem, extension in parted.values():
            for _, image in self._named(stem, by_stem):
                named.setdefault(image, set()).add(extension.lower())
        told: dict[str, list[tuple[int, int, str, str]]] = {}
        for name, (stem, extension) in parted.items():
            for rank, image in self._described(stem, extension.lower(), by_stem, beyond, named):
                shared = len(stem) if rank == _SHORTER else 0
                told.setdefault(image, []).append((rank, shared, extension.lower(), name))
        return {image: sorted(sidecars)[-_MOST:] for image, sidecars in told.items()}

    def _named(self, stem: str, by_stem: Mapping[str, list[str]]) -> list[tuple[int, str]]:
        """The images that a sidecar is named after: `a.jpg` by `a.jpg.json` alone, by `a.json` like `a.png`."""
        if stem in self._images and posixpath.splitext(stem)[1]:
            return [(_FULL, stem)]
        return [(_STEM, image) for image in by_stem.get(stem, [])]

    def _described(
        self,
        stem: str,
        extension: str,
        by_stem: Mapping[str, list[str]],
        beyond: Mapping[str, list[str]],
        named: Mapping[str, set[str]],
    ) -> list[tuple[int, str]]:
        """(rank, image) of what a sidecar describes; `named` has the extensions of the sidecars that are named after an image."""
        further = beyond.get(stem, [])
        exact = self._named(stem, by_stem)
        if exact:
            others = [i for i in further if i not in named and _words(_rest(i, stem))]
            return exact + [(_SHORTER, image) for image in others]
        if further:
            own = [i for i in further if i in named]
            taking = {i for i in own if extension not in named[i] and _words(_rest(i, stem))}
            return [(_SHORTER, image) for image in further if image not in named or image in taking]
        for start in reversed(_starts(stem)):
            if not _words(stem[len(start) + 1 :]):
                break
            if start in by_stem:
                return [(_LONGER, image) for image in by_stem[start]]
            sample = beyond.get(start, [])
            if sample:
                of_all = _OF_SAMPLE.fullmatch(stem[len(start) + 1 :]) is not None and len(sample) <= _MOST
                clear = of_all and all(i not in named and _words(_rest(i, start)) for i in sample)
                return [(_SAMPLE, image) for image in sample] if clear else []
        return []


def _sidecars(run: Sequence[Member]) -> dict[str, Member]:
    return {m.name: m for m in run if m.is_sidecar and not m.reason}


def _starts(stem: str) -> list[str]:
    """a.b.c -> a, a.b. A dot at the start of a file name parts nothing."""
    at, found = posixpath.dirname(stem), list[str]()
    where = len(at) + 1 if at else 0
    while len(found) < _PIECES:
        where = stem.find(".", where + 1)
        if where < 0:
            break
        found.append(stem[:where])
    return found


def _rest(image: str, start: str) -> str:
    return posixpath.splitext(image)[0][len(start) + 1 :]


def _words(text: str) -> bool:
    return _WORD.fullmatch(text) is not None


def without_excluded(members: Iterable[Member], chosen: Members, sidecars: bool = False) -> Iterator[Member]:
    """The members, with a reason where the source's `members` leave them out: images, or (before they are joined) sidecars."""
    for member in members:
        left_out = matches(member.name, chosen.exclude) if sidecars else not chosen.takes(member.name)
        if left_out and not member.reason and member.is_sidecar == sidecars:
            member = replace(member, reason="excluded", detail="left out by `members` of its source", sidecars=())
        yield member


def reported_once(members: Sequence[Member]) -> list[Member]:
    """The members that are read, of several that one sidecar describes all but the first marked as sharing it."""
    told: set[Member] = set()
    out = []
    for member in members:
        if member.sidecars:
            shared = tuple(replace(s, shared=s in told) for s in member.sidecars)
            told.update(member.sidecars)
            member = replace(member, sidecars=shared)
        out.append(member)
    return out


def bounded(
    listed: Iterable[Listed], member_of: Callable[[Listed], Member], refused: Callable[[Listed, str], Listed]
) -> Iterator[Listed]:
    """What is listed of one file, as far as it fits into memory; the rest is one refused member."""
    size = 0
    for number, one in enumerate(listed):
        size += _MEMBER_BYTES + len(member_of(one).name)
        if size > _LISTING_BYTES:
            yield refused(one, f"not read from here on, behind {number} members: split the file into smaller ones")
            return
        yield one


def is_image(member: Member) -> bool:
    """Nothing speaks against it before it is decoded."""
    return not member.reason and not member.is_sidecar
