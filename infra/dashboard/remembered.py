"""Remember what was computed of a run's data as long as these data are open, and no longer."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

Owner = TypeVar("Owner")
Asked = ParamSpec("Asked")
Made = TypeVar("Made")


def remembered(
    most: int,
) -> Callable[[Callable[Concatenate[Owner, Asked], Made]], Callable[Concatenate[Owner, Asked], Made]]:
    """For each first argument, the last `most` answers of a function or method are kept, as long as that argument lives.

    Answers must not refer to it. Threads that ask at once may both compute one.
    """

    def around(function: Callable[Concatenate[Owner, Asked], Made]) -> Callable[Concatenate[Owner, Asked], Made]:
        kept: WeakKeyDictionary[Owner, OrderedDict[Any, Made]] = WeakKeyDictionary()
        lock = threading.Lock()

        def asked(owner: Owner, /, *arguments: Asked.args, **named: Asked.kwargs) -> Made:
            key = (arguments, tuple(sorted(named.items())))
            with lock:
                answers = kept.setdefault(owner, OrderedDict())
                if key in answers:
                    answers.move_to_end(key)
                    return answers[key]
            made = function(owner, *arguments, **named)
            with lock:
                answers[key] = made
                while len(answers) > most:
                    answers.popitem(last=False)
            return made

        functools.update_wrapper(asked, function)
        return asked

    return around
