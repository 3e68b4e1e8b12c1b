"""The command line with the stages of a run in its own process, for scripts that call it."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from inline import in_one_process

from lodeset.infra.cli.command import perform
from lodeset.infra.cli.main import app

if __name__ == "__main__":
    with in_one_process() if sys.argv[1] == "run" else nullcontext():
        sys.exit(perform(app))
