"""Carries a user's error out of a worker, whatever the engine does with exceptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import LodesetError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failed:
    """A LodesetError that was raised in a worker."""

    message: str


def caught(function: Callable[[Item], Result], item: Item) -> Result | Failed:
    """The function's result, or its LodesetError as a value; anything else is a defect and raises."""
    try:
        return function(item)
    except LodesetError as error:
        return Failed(str(error))


def unwrapped(result: Result | Failed) -> Result:
    """The result, or the worker's LodesetError raised here."""
    if isinstance(result, Failed):
        raise LodesetError(result.message)
    return result
