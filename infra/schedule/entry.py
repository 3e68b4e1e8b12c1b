"""What a schedule runs, and as what it is known to the schedulers of a machine."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown, without_secrets

HELD = 4  # the exit status of a run that found another at work: a skipped tick, not a failure


@dataclass(frozen=True)
class Entry:
    """A command that runs at fixed times for one configuration file."""

    config: Path  # absolute
    command: tuple[str, ...]
    unit: str  # a name that is this file's alone


def entry(config: Path, *, address: str | None = None, overrides: Sequence[str] = ()) -> Entry:
    """The command that runs a configuration, or submits it to the cluster at `address`. All paths are absolute.

    Raises:
        ConfigError: a path or an override holds a control character or a credential.
    """
    path = config.absolute()
    # -P: a folder named `lodeset` where the scheduler starts is not what is meant. The interpreter of a virtual
    # environment is a link, which must not be followed.
    command = [str(Path(sys.executable).absolute()), "-P", "-m", "lodeset"]
    command += ["run", str(path)] if address is None else ["submit", str(path), "--address", address]
    for override in overrides:
        command += ["--set", override]
    for word in command:
        if not word.isprintable():
            raise ConfigError(f"{word!r}: a schedule cannot hold control characters: rename it")
        if without_secrets(word) != word:
            raise ConfigError(
                f"{shown(word)}: a schedule is kept in plain text, and this holds a credential: keep it where the drivers "
                "of file systems look for it, such as ~/.aws/credentials"
            )
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-")[:64]
    return Entry(path, tuple(command), f"lodeset-{stem}-{digest}")
