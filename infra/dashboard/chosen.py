"""The run that a page is about: the one that its address names, or else that of the dashboard."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Annotated

from fastapi import Depends, Query, Request

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.making import found
from lodeset.infra.looking import looking
from lodeset.pipeline.errors import LodesetError

OPEN = 3  # runs besides the dashboard's own whose files stay open


class NotInspectedError(LodesetError):
    """What pages read of a run was not made yet."""

    def __init__(self, run: int | None) -> None:
        super().__init__(f"run {run} was not made ready for the dashboard" if run else "no run has finished yet")
        self.run = run


class Opened:
    """The runs that are open in one dashboard; threads may share it. What is forgotten is closed once nobody reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data: OrderedDict[int, Data] = OrderedDict()

    def get(self, request: Request, number: int) -> Data:
        with self._lock:
            if number not in self._data:
                opened = request.app.state.site.opened
                made = found(opened, number)
                if made is None:
                    raise NotInspectedError(number)
                self._data[number] = Data(opened.store, made)
            self._data.move_to_end(number)
            while len(self._data) > OPEN:
                self._data.popitem(last=False)
            return self._data[number]


def data_of(request: Request, run: int | None) -> Data:
    """What was made of a run to be looked at.

    Raises:
        NotInspectedError: nothing was.
        LodesetError: there is no such run.
    """
    site = request.app.state.site
    own: Data | None = site.data
    if own is not None and (run is None or run == number_of(own)):
        return own
    wanted = run or site.run
    if wanted is None:
        last = looking.held(site.opened).run
        if last is None:
            raise NotInspectedError(None)
        wanted = last.number
    opened: Opened = request.app.state.runs
    return opened.get(request, wanted)


def _named(request: Request, run: Annotated[int | None, Query(ge=1)] = None) -> Data:
    return data_of(request, run)


# The type of a parameter of a route that shows images: what was made of the run that the address names.
TheData = Annotated[Data, Depends(_named)]


def number_of(data: Data) -> int | None:
    """The number of its run."""
    run = data.inspected.held.run
    return run.number if run is not None else None
