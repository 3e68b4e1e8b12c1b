"""Words that both files of a card use."""

from __future__ import annotations

import re

from lodeset.infra.card.facts import Facts, Licences

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))  # fmt: skip
_CREATIVE = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/licenses/(by(?:-nc)?(?:-sa|-nd)?)/([1-4]\.\d)(?:/.*)?", re.I
)
_ZERO = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/publicdomain/zero/1\.0(?:/.*)?|cc0(?:[- ]1\.0)?", re.I
)
_NAMED = re.compile(r"cc[- ](by(?:-nc)?(?:-sa|-nd)?)[- ]([1-4]\.\d)", re.I)
# Those that the Hugging Face Hub knows by a name of their own; it takes others as `other`.
_ON_HUB = {
    f"cc-{kind}-{version}"
    for kind, versions in {
        "by": ("2.0", "2.5", "3.0", "4.0"),
        "by-sa": ("3.0", "4.0"),
        "by-nc": ("2.0", "3.0", "4.0"),
        "by-nd": ("4.0",),
        "by-nc-nd": ("3.0", "4.0"),
        "by-nc-sa": ("2.0", "3.0", "4.0"),
    }.items()
    for version in versions
} | {"cc0-1.0"}


def size_category(images: int) -> str:
    """As the Hugging Face Hub calls it."""
    return next((name for limit, name in _SIZES if images < limit), "n>1T")


def sentence(facts: Facts) -> str:
    pool = facts.pool
    of = f", selected from a pool of {pool.taken:,} files" if pool is not None else ""
    return f"{facts.images:,} images{of} by lodeset {facts.run.versions.get('lodeset', '')}".rstrip()


def licence_ids(licences: Licences) -> dict[str, str]:
    """The licences by the Hub's name -> by SPDX's; empty unless every image has one, and each is known."""
    if licences.silent or licences.others[0]:
        return {}
    found = {}
    for text, _ in licences.counts:
        spdx = _spdx(text)
        if spdx is None or spdx.lower() not in _ON_HUB:
            return {}
        found[spdx.lower()] = spdx
    return found


def _spdx(text: str) -> str | None:
    if _ZERO.fullmatch(text):
        return "CC0-1.0"
    match = _CREATIVE.fullmatch(text) or _NAMED.fullmatch(text)
    return None if match is None else f"CC-{match[1].upper()}-{match[2]}"
