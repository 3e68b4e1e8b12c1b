"""Remember what was computed of a run's data as long as these data are open, and no longer."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from lodeset.infra.dashboard.data import Data

Asked = ParamSpec("Asked")
Made = TypeVar("Made")


def remembered(
    most: int,
) -> Callable[[Callable[Concatenate[Data, Asked], Made]], Callable[Concatenate[Data, Asked], Made]]:
    """Of each `Data`, the last `most` answers of a function are kept. Threads that ask at once may both compute one."""

    def around(function: Callable[Concatenate[Data, Asked], Made]) -> Callable[Concatenate[Data, Asked], Made]:
        kept: WeakKeyDictionary[Data, OrderedDict[Any, Made]] = WeakKeyDictionary()
        lock = threading.Lock()

        def asked(data: Data, /, *arguments: Asked.args, **named: Asked.kwargs) -> Made:
            key = (arguments, tuple(sorted(named.items())))
            with lock:
                answers = kept.setdefault(data, OrderedDict())
                if key in answers:
                    answers.move_to_end(key)
                    return answers[key]
            made = function(data, *arguments, **named)
            with lock:
                answers[key] = made
                while len(answers) > most:
                    answers.popitem(last=False)
            return made

        functools.update_wrapper(asked, function)
        return asked

    return around
