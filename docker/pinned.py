"""Fail unless every installed package has the version of the lock file: python pinned.py LOCK [PATTERN...]

A package whose name matches one of the patterns need not be in the lock file, e.g. 'nvidia-*'.
"""

import sys
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path


def plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


lines = (line.partition("#")[0].strip() for line in Path(sys.argv[1]).read_text().splitlines())
locked = {plain(name): version for name, _, version in (line.partition("==") for line in lines if line)}
wrong = []
for about in distributions():
    name, version = plain(about.metadata["Name"]), about.version
    # A local part says only how a wheel was built: 2.13.0+cpu is 2.13.0.
    if version.partition("+")[0] != locked.get(name) and not any(fnmatch(name, free) for free in sys.argv[2:]):
        wrong.append(f"{name} {version}: {locked.get(name, 'none')} in {sys.argv[1]}")
sys.exit("\n".join(wrong) or 0)
