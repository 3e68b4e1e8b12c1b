"""The configuration file as it is now, which may differ from what the dashboard was started with."""

from __future__ import annotations

from dataclasses import dataclass

from lodeset.infra.config import Config, read
from lodeset.infra.dashboard.data import Data
from lodeset.infra.looking.held import configuration
from lodeset.infra.session import Opened
from lodeset.pipeline.errors import LodesetError


@dataclass(frozen=True, kw_only=True)
class FileNow:
    """The text of the file, and the configuration that it gives with the overrides of the dashboard; both None where it cannot be
    read, and `config` None where it is no configuration, because of `problem`.
    """

    name: str
    text: str | None
    config: Config | None
    problem: str = ""

    def differs_from_run(self, data: Data) -> bool:
        """Whether the run was made with another configuration."""
        run = data.inspected.held.run
        return self.config is not None and run is not None and run.config != configuration(self.config)


def reread(opened: Opened) -> FileNow:
    """Reads the configuration file again."""
    name = opened.path.name
    try:
        text = opened.path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        return FileNow(name=name, text=None, config=None, problem=f"{name} cannot be read: {why}")
    try:
        return FileNow(name=name, text=text, config=read(opened.path, opened.overrides))
    except LodesetError as error:
        return FileNow(name=name, text=text, config=None, problem=f"{name} is no valid configuration now: {error}")
