"""The first step of a job on the cluster: is this the store that the submitting machine meant, and are these its versions?"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping

from lodeset.infra.config import read
from lodeset.infra.jobs.submissions import recorded
from lodeset.infra.versions import LOCK, PACKAGES, versions
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown

_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#]+)")


def check(config: str, job: str) -> None:
    """Raises ConfigError if the store here is not the one that the job was recorded in."""
    store = Store(read(config).store)
    if not recorded(store, job):
        raise ConfigError(
            f"the store {shown(store.url)} that this node sees is not the one of the machine that submitted {job}: "
            "use a URL (s3://bucket/folder), or a path on a file system that all of them share"
        )


def differing(lock: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """What is installed in other versions than the lock file names, of the packages that results can depend on."""
    pins = {match[1].lower(): match[2] for line in lock if (match := _PIN.match(line.strip()))}
    return [
        f"{name} {installed[name]} (lock file: {pins[name]})"
        for name in PACKAGES
        if name in installed and name in pins and installed[name].partition("+")[0] != pins[name].partition("+")[0]
    ]


def main() -> int:
    try:
        if len(sys.argv) > 2:
            check(sys.argv[1], sys.argv[2])
    except LodesetError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return error.exit_code
    with open(LOCK, encoding="utf-8") as lock:
        others = differing(lock, versions())
    if others:
        print(f"warning: other versions than where this was submitted: {', '.join(others)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
