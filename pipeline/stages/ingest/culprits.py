"""Which image of a slice ended the worker that read it.

A worker says which sample it is at, so its death names a suspect. The suspect is read again alone: only what ends a fresh
worker by itself is recorded as a fact about these bytes. Everything else (a worker killed from outside, a machine without
memory) is trouble that passes, and the slice is tried again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil

from lodeset.pipeline.algorithms.images.decoding import Limits, Unreadable
from lodeset.pipeline.config import Ingest
from lodeset.pipeline.engines.failures import Failed
from lodeset.pipeline.engines.processes import TRIES, Again, Died, step
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.reading import read_slice
from lodeset.pipeline.sources.slices import Slice

if TYPE_CHECKING:
    from lodeset.pipeline.stages.ingest.run import Work

# A file system that gives nothing for so long will not give it.
_READ_S = 300.0
# Seconds by the clock for each second of processor time: other work may hold the cores.
_CLOCK = 3.0
# How often a suspect must end a worker alone. Nobody but the system can tell who sent a signal; the other causes are measured.
_CONFIRMED = {"killed": 2, "too_slow": 1, "stalled": 1, "too_much_memory": 1, "out_of_memory": 1}
_REASONS = {
    "killed": "killed_decoder",
    "too_slow": "too_slow",
    "stalled": "too_slow",
    "too_much_memory": "too_much_memory",
    "out_of_memory": "too_much_memory",
}


def samples_of(piece: Slice, limits: Ingest, only: int | None = None) -> Iterator[tuple[int, Sample]]:
    """The samples of a slice with their numbers; of `only` that one, if it is given. The worker says which one it is at.

    Step 2n is reading sample n, step 2n + 1 what is done with it.
    """
    number = 0

    def reading() -> None:
        step(2 * number, 10 * limits.max_seconds, _READ_S)

    samples = read_slice(piece, limits.max_bytes, reading)
    for number in itertools.count():
        reading()
        sample = next(samples, None)
        if sample is None:
            return
        if only is None or number == only:
            step(2 * number + 1, limits.max_seconds, _CLOCK * limits.max_seconds)
            yield number, sample
        if number == only:
            return


def rescued(
    numbered: tuple[tuple[int, int], str, Slice],
    died: Died,
    again: Again,
    read: Callable[..., Any],
    work: Work,
    *rest: Any,
) -> list[Any]:
    """What `read` gives for a slice whose worker died, without the samples that end a worker by themselves.

    Raises:
        LodesetError: workers went on dying, and no sample is to blame.
    """
    order, key, piece = numbered
    condemned: dict[int, Unreadable] = {}
    unexplained = 0
    while True:
        number, decoding = divmod(died.step, 2)
        if died.step >= 0 and decoding:
            reason = _alone(again, died, _examine, piece, work, number)
            if reason is not None:
                condemned[number] = reason
        else:
            _raise_if_stalled(died, piece)
            refused = _unreadable_members(again, piece, work)
            reason = next(iter(refused.values()), None)
            members = (_refused(m, refused[m]) if m in refused else m for m in piece.members)
            piece = replace(piece, members=tuple(members))
            condemned.clear()  # their numbers may be others now
        unexplained += reason is None
        if unexplained == TRIES:
            raise LodesetError(
                f"the worker that reads {piece.uri} died {TRIES} times ({died.detail}), and no image in it is to blame: look at the "
                "memory of this machine (resources.cpus, ingest.worker_memory_gb), and run again"
            )
        result = again(read, (order, key, piece), work, *rest, condemned)
        if isinstance(result, Failed):
            raise LodesetError(result.message)
        if not isinstance(result, Died):
            return result
        died = result


def _alone(again: Again, died: Died, function: Callable[..., Any], *arguments: Any) -> Unreadable | None:
    """Why a suspect is rejected; None if it ends no worker by itself."""
    limits: Ingest = arguments[1].limits
    for _ in range(_CONFIRMED[died.cause]):
        result = again(function, *arguments)
        if not isinstance(result, Died):
            return None
        died = result
    if died.cause == "out_of_memory" and psutil.virtual_memory().available < limits.worker_memory_gb * 2**30:
        free = psutil.virtual_memory().available / 2**30
        raise LodesetError(
            f"this machine has {free:.1f} GiB of memory left, and a worker may take {limits.worker_memory_gb:g} "
            "(ingest.worker_memory_gb): free some, give it fewer workers (resources.cpus), or lower the limit, and run again"
        )
    reason = _REASONS[died.cause]
    knob = {
        "too_slow": f" (ingest.max_seconds: {limits.max_seconds:g})",
        "too_much_memory": f" (ingest.worker_memory_gb: {limits.worker_memory_gb:g})",
    }.get(reason, "")
    return Unreadable(reason, f"{died.detail}{knob}")


def limits_of(settings: Ingest) -> Limits:
    return Limits(settings.max_pixels, settings.max_side, settings.max_decoded_mb, settings.max_frames)


def _examine(piece: Slice, work: Work, number: int) -> None:
    for _, sample in samples_of(piece, work.limits, number):
        with contextlib.suppress(Unreadable):
            work.examine(sample.data, limits_of(work.limits))


def _read_only(piece: Slice, work: Work) -> None:
    for _ in samples_of(piece, work.limits, -1):
        pass


def _unreadable_members(again: Again, piece: Slice, work: Work) -> dict[Member, Unreadable]:
    """The members that end a worker that reads nothing else, by halving."""
    died = again(_read_only, piece, work)
    if not isinstance(died, Died):
        return {}
    _raise_if_stalled(died, piece)
    if len(piece.members) == 1:
        reason = _alone(again, died, _read_only, piece, work)
        return {} if reason is None else {piece.members[0]: reason}
    half = len(piece.members) // 2
    halves = (replace(piece, members=part) for part in (piece.members[:half], piece.members[half:]))
    return {member: why for part in halves for member, why in _unreadable_members(again, part, work).items()}


def _refused(member: Member, why: Unreadable) -> Member:
    return replace(member, reason=why.reason, detail=f"reading it: {why.detail}", sidecars=())


def _raise_if_stalled(died: Died, piece: Slice) -> None:
    """A source that does not answer is no property of its bytes."""
    if died.cause == "stalled":
        raise LodesetError(
            f"{piece.uri} gave nothing for {_READ_S:.0f} s: nothing was recorded about it; run again once its file system answers"
        )
