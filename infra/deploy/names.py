"""Names that Kubernetes and KubeRay accept."""

from __future__ import annotations

import re

# Lengths: KubeRay 1.7 makes longer names of these, and CronJobs and their Jobs add up to 11 characters.
LONGEST = {"RayCluster": 53, "CronJob": 52, "RayJob": 47, "RayCronJob": 36}
APPENDED = 11

_LABEL_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){_LABEL.pattern}(\.{_LABEL.pattern})*")


def problem(name: str, longest: int) -> str | None:
    """What is wrong with a name of an object that gives its name to services (RFC 1035), or None."""
    if len(name) > longest:
        return f"has {len(name)} characters, and at most {longest} are allowed"
    if not _LABEL_1035.fullmatch(name):
        return "must hold lower-case letters, digits and `-`, start with a letter, and not end with `-` (DNS-1035)"
    return None


def label(value: str) -> str:
    """A name of a volume, container or namespace (RFC 1123).

    Raises:
        ValueError: it is none.
    """
    if not _LABEL.fullmatch(value):
        raise ValueError("expected lower-case letters, digits and `-`, at most 63, no `-` at the ends (DNS-1123 label)")
    return value


def subdomain(value: str) -> str:
    """A name of a Secret or a claim (RFC 1123).

    Raises:
        ValueError: it is none.
    """
    if not _SUBDOMAIN.fullmatch(value):
        raise ValueError("expected lower-case letters, digits, `-` and `.`, at most 253 (DNS-1123 subdomain)")
    return value


def suggested(name: str, longest: int) -> str:
    """A name that is accepted, close to this one."""
    near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    near = near if near[:1].isalpha() else f"lodeset-{near}"
    return near[:longest].strip("-")
