"""What lies in a source, and which sidecars describe which image."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.sources.metadata import Metadata

# Members that say something about the image that shares their name up to the first dot (the WebDataset convention).
SIDECARS = (".json", ".txt", ".cls")


@dataclass(frozen=True, slots=True)
class Member:
    """Encoded bytes that may be an image, or what is known to be none (`reason`).

    Attributes:
        sidecars: what describes the image, at most one an extension, by extension.
        shared: of a sidecar: another image reports on it.
    """

    name: str
    offset: int
    size_bytes: int
    reason: str = ""
    detail: str = ""
    sidecars: tuple[Member, ...] = ()
    shared: bool = False

    @property
    def sample(self) -> str:
        """What a WebDataset sample's members share: the path up to the first dot of the file name."""
        folder, base = posixpath.split(self.name)
        return posixpath.join(folder, base.split(".", 1)[0])

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
        return (self.name, self.offset, self.size_bytes, self.reason, self.detail, told, self.shared)

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

    A sidecar describes the images beside it that share its name up to the first dot; if none does, all of that name in the
    whole file (some writers put all images first). Of several with one extension the one beside the image counts, then the
    last, as in a tar that was appended to. A sidecar that describes nothing comes with a reason.
    """
    runs = [(sample, list(run)) for sample, run in itertools.groupby(members, key=lambda m: m.sample)]
    with_image = {sample for sample, run in runs if any(is_image(m) for m in run)}
    apart: dict[str, dict[str, Member]] = {}
    for sample, run in runs:
        if sample in with_image and not any(is_image(m) for m in run):
            apart.setdefault(sample, {}).update(_sidecars(run))
    described = [
        {**apart.get(sample, {}), **_sidecars(run)} if any(is_image(m) for m in run) else {} for sample, run in runs
    ]
    used = {id(sidecar) for sidecars in described for sidecar in sidecars.values()}
    out: list[Member] = []
    for (sample, run), describing in zip(runs, described, strict=True):
        sidecars = tuple(describing[extension] for extension in sorted(describing))
        for member in run:
            if is_image(member):
                out.append(replace(member, sidecars=sidecars))
            elif member.reason:
                out.append(member)
            elif sample not in with_image:
                out.append(replace(member, reason="metadata_without_image", detail="no image shares its name"))
            elif id(member) not in used:
                out.append(replace(member, reason="repeated_metadata", detail=f"another {member.extension} counts"))
    return out


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


def _sidecars(run: Sequence[Member]) -> dict[str, Member]:
    return {m.extension: m for m in run if m.is_sidecar and not m.reason}


def is_image(member: Member) -> bool:
    """Nothing speaks against it before it is decoded."""
    return not member.reason and not member.is_sidecar
