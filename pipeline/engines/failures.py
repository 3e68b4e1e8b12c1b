"""Return a worker's errors as values, whatever the engine does with exceptions."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lodeset.pipeline.errors import LodesetError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failed:
    """An error of a worker."""

    message: str


def failed(error: Exception) -> Failed:
    """An error as a value: the message of a LodesetError; for a defect its type, text and place, with the traceback in
    the log.
    """
    if isinstance(error, LodesetError):
        return Failed(str(error))
    traceback.print_exception(error, file=sys.stderr)
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return Failed(
        f"{type(error).__name__}: {text} (at {Path(place.filename).name}:{place.lineno}, in {place.name}): this is a "
        "defect; its traceback is in the stage's log"
    )


def caught(function: Callable[[Item], Result], item: Item) -> Result | Failed:
    """The function's result, or its LodesetError as a value; anything else is a defect and is raised."""
    try:
        return function(item)
    except LodesetError as error:
        return Failed(str(error))


def unwrapped(result: Result | Failed) -> Result:
    """The result; a worker's LodesetError is raised here."""
    if isinstance(result, Failed):
        raise LodesetError(result.message)
    return result
