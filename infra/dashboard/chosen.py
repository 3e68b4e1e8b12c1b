"""The run that a page is about: the one that its address names, or else that of the dashboard."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Query, Request

from lodeset.infra import session
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.making import INSPECT, THUMBNAILS, found
from lodeset.infra.dashboard.site import number_of
from lodeset.infra.looking import looking
from lodeset.pipeline.errors import DamagedError, LodesetError

OPEN = 3  # runs besides the dashboard's own whose files stay open
CHECK_S = 1.0  # between two looks whether the store still has them


class NotInspectedError(LodesetError):
    """What pages read of a run was not made yet."""

    def __init__(self, run: int | None) -> None:
        super().__init__(f"run {run} was not made ready for the dashboard" if run else "no run has finished yet")
        self.run = run


class GoneError(LodesetError):
    """What was made of a run is no longer in the store: `forget` and `gc` delete it."""

    def __init__(self, run: int | None) -> None:
        super().__init__(f"what pages show of {f'run {run}' if run else 'this run'} is no longer in the store")
        self.run = run


@dataclass
class _Known:
    """What is known of one run; `checked` is when the store was last asked whether `data` are still its own."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    data: Data | None = None
    checked: float = -CHECK_S
    gone: bool = False


class Opened:
    """The runs that are open in one dashboard; threads may share it.

    Only the last few stay open. The data of the others close once no request reads them.
    """

    def __init__(self, own: Data | None) -> None:
        """`own`: the data that the dashboard was started with, which stay open."""
        self._own = number_of(own) if own is not None else 0
        self._lock = threading.Lock()
        self._known: OrderedDict[int | None, _Known] = OrderedDict()
        if own is not None:
            self._known[self._own] = _Known(data=own)

    def get(self, opened: session.Opened, number: int | None) -> Data:
        """The data of a run, opened again where they were made again.

        Raises:
            NotInspectedError: nothing was made of it.
            GoneError: what was made is gone.
        """
        with self._lock:
            known = self._known.setdefault(number, _Known())
            self._known.move_to_end(number)
            others = [one for one in self._known if one != self._own]
            for one in others[:-OPEN]:
                del self._known[one]
        with known.lock:  # of this run alone: opening it may download files
            settled = known.data is not None or known.gone
            if not settled or time.monotonic() - known.checked >= CHECK_S:
                known.checked = time.monotonic()
                if known.data is None or not _is_there(known.data):
                    known.gone = known.gone or known.data is not None
                    known.data = None
                    known.data = _open(opened, number, known.gone)
            if known.data is None:
                raise GoneError(number) if known.gone else NotInspectedError(number)
            return known.data


def _open(opened: session.Opened, number: int | None, gone: bool) -> Data | None:
    try:
        made = found(opened, number)
    except LodesetError:
        if not gone:
            raise
        return None  # with the whole run
    return Data(opened.store, made) if made is not None else None


def _is_there(data: Data) -> bool:
    """Whether the store still has what these data were opened from."""
    try:
        for artifact in (data.inspected.made[id_] for id_ in (INSPECT, THUMBNAILS) if id_ in data.inspected.made):
            there = data.store.artifact(artifact.stage, artifact.set, artifact.fingerprint)
            if there is None or there.created != artifact.created:
                return False
    except DamagedError:
        return False
    except (LodesetError, OSError):  # a store that cannot be reached now has lost nothing
        return True
    return True


def data_of(request: Request, run: int | None) -> Data:
    """What was made of a run to be looked at.

    Raises:
        NotInspectedError: nothing was.
        GoneError: it is no longer there.
        LodesetError: there is no such run.
    """
    site = request.app.state.site
    own: Data | None = site.data
    opened: Opened = request.app.state.runs
    wanted = run or site.number
    if wanted is None and own is None:
        last = looking.held(site.opened).run
        if last is None:
            raise NotInspectedError(None)
        wanted = last.number
    request.state.run = wanted  # the head of the page names it
    return opened.get(site.opened, wanted)


def _named(request: Request, run: Annotated[int | None, Query(ge=1)] = None) -> Data:
    return data_of(request, run)


# The type of a parameter of a route that shows images: what was made of the run that the address names.
TheData = Annotated[Data, Depends(_named)]
