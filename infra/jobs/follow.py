"""Follow a job until it has ended: its log without gaps or repetitions, and the exit code of its driver.

Streams of logs close under healthy jobs, heads are restarted, and networks fail. So only the job's status, as the head
tells it, says that a job has ended. What cannot be seen for a while is neither failed nor finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lodeset.infra.jobs.errors import Unknown, Unreachable
from lodeset.infra.jobs.names import CPUS, MEMORY
from lodeset.infra.jobs.pending import Asked, lacking
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_CODE = 143  # that of `lodeset run` after SIGTERM, by which a job is stopped


class Seen(Protocol):
    """A job as the head describes it (`ray.job_submission.JobDetails`)."""

    @property
    def status(self) -> Any: ...
    @property
    def message(self) -> str | None: ...
    @property
    def error_type(self) -> str | None: ...
    @property
    def driver_exit_code(self) -> int | None: ...
    @property
    def metadata(self) -> dict[str, str] | None: ...


class Watched(Protocol):
    """What following needs of a head."""

    url: str

    def get_job_info(self, job: str) -> Any: ...
    def get_job_logs(self, job: str) -> str: ...
    def tail_job_logs(self, job: str) -> AsyncIterator[str]: ...
    def cluster_status(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Waits:
    """Seconds."""

    poll: float = 2.0
    pending: float = 60.0  # after which it is said what a pending job lacks
    again: float = 30.0  # until that is looked at again
    unseen: float = 600.0  # for which a head may be out of sight
    unknown: float = 10.0  # for which a head that answers may not know the job
    reopen: float = 1.0  # before a stream that ended is opened again; doubled while nothing comes of it
    longest: float = 30.0
    end: float = 5.0  # for the end of the stream, once the job has ended


@dataclass(frozen=True)
class Ended:
    """How a job ended. `exit_code` is that of its driver, and never 0 unless the job succeeded."""

    job: str
    status: str
    exit_code: int
    message: str


def follow(
    head: Watched,
    job: str,
    show: Callable[[str], None],
    tell: Callable[[str], None],
    waits: Waits = Waits(),
) -> Ended:
    """Shows each line of the job's log once, and returns when the job has ended.

    Args:
        show: is called with whole lines of the log.
        tell: is called with what there is to say about the head and the job.

    Raises:
        Unreachable: the head has been out of sight for too long.
        LodesetError: the head does not know the job, or not any more.
    """
    sight = _Sight(head, job, tell, waits)
    with contextlib.closing(_Log(head, job, show, tell, waits)) as log:
        while True:
            seen = sight.look()
            if seen is not None and status_of(seen) in FINAL:
                log.finish()
                return ended(job, seen)
            log.show_for(waits.poll)


def status_of(seen: Seen) -> str:
    return str(getattr(seen.status, "value", seen.status))


def ended(job: str, seen: Seen) -> Ended:
    """What a final status means."""
    status, code = status_of(seen), seen.driver_exit_code
    if status == "SUCCEEDED":
        exit_code = 0
    elif status == "STOPPED":
        exit_code = STOPPED_CODE
    elif not code:
        exit_code = 1  # the driver did not end by itself: Ray or the machine ended it, or it never began
    else:
        exit_code = code if code > 0 else 128 - code  # killed by a signal
    if status != "FAILED":
        message = ""
    elif code == 127:
        message = "its node has no such interpreter: give the path of the right one with --python"
    elif seen.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        message = ""  # Ray's is the end of the log
    else:
        message = shown(seen.message or "")[:2_000]
    return Ended(job, status, exit_code, message)


class _Sight:
    """The job's status, and since when it could not be seen or has not begun."""

    def __init__(self, head: Watched, job: str, tell: Callable[[str], None], waits: Waits) -> None:
        self._head, self._job, self._tell, self._waits = head, job, tell, waits
        self._unseen: float | None = None
        self._unknown: float | None = None
        self._pending: float | None = None
        self._looked, self._lacks, self._known = 0.0, "", False

    def look(self) -> Seen | None:
        """The job, or None where it cannot be seen now."""
        try:
            seen: Seen = self._head.get_job_info(self._job)
        except Unreachable as error:
            self._out_of_sight(error)
            return None
        except Unknown:
            self._not_known()
            return None
        if self._unseen is not None:
            self._tell(f"{self._head.url} answers again, after {time.monotonic() - self._unseen:.0f} s")
        self._unseen = self._unknown = None
        self._known = True
        self._begun(seen)
        return seen

    def _out_of_sight(self, error: Unreachable) -> None:
        now = time.monotonic()
        if self._unseen is None:
            self._unseen = now
            self._tell(
                f"{error}. This says nothing about the job, which may be running; trying again for "
                f"{self._waits.unseen:.0f} s"
            )
        if now - self._unseen > self._waits.unseen:
            raise Unreachable(
                f"{self._head.url} has not answered for {now - self._unseen:.0f} s, so nobody here knows how "
                f"{self._job} is: it may be running. Follow it again with `lodeset jobs logs {self._job} --follow "
                f"--address {self._head.url}`; `lodeset status CONFIG` tells what its store knows"
            )

    def _not_known(self) -> None:
        if not self._known:
            raise Unknown(f"{self._head.url} has no job {self._job}: `lodeset jobs list` shows those that it has")
        now = time.monotonic()
        self._unseen = None
        self._unknown = now if self._unknown is None else self._unknown
        if now - self._unknown > self._waits.unknown:
            raise LodesetError(
                f"{self._head.url} no longer knows {self._job}: the head was restarted, and jobs end with their head. "
                "What the job finished is in its store: submit again, and the next attempt goes on from there"
            )

    def _begun(self, seen: Seen) -> None:
        if status_of(seen) != "PENDING":
            self._pending = None
            return
        now = time.monotonic()
        self._pending = now if self._pending is None else self._pending
        if now - self._pending < self._waits.pending or now - self._looked < self._waits.again:
            return
        self._looked = now
        try:
            lacks = lacking(asked_in(seen.metadata or {}), self._head.cluster_status())
        except LodesetError as error:
            lacks = f"what the cluster lacks cannot be seen: {error}"
        if lacks != self._lacks:
            self._lacks = lacks
            self._tell(f"{self._job} has not begun for {now - self._pending:.0f} s: {lacks}")


def asked_in(metadata: dict[str, str]) -> Asked:
    try:
        return Asked(float(metadata.get(CPUS, 0)), float(metadata.get(MEMORY, 0)))
    except ValueError:
        return Asked()


class _Log:
    """The log of a job, through as many streams as it takes. Every stream begins with the log's first character."""

    def __init__(
        self, head: Watched, job: str, show: Callable[[str], None], tell: Callable[[str], None], waits: Waits
    ) -> None:
        self._head, self._job, self._show, self._tell, self._waits = head, job, show, tell, waits
        self._read = 0  # characters
        self._line = ""  # the last one, which is not complete yet
        self._pause, self._next = waits.reopen, 0.0
        self._stream: _Stream | None = None

    def show_for(self, seconds: float) -> None:
        """Shows what comes in this time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._stream is None:
                if (wait := self._next - time.monotonic()) > 0:
                    time.sleep(min(wait, left))
                    continue
                self._stream = _Stream(self._head, self._job, self._read)
            if not self._more(left):
                self._stream = None
                self._next = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, self._waits.longest)

    def finish(self) -> None:
        """Shows the rest of the log of a job that has ended."""
        end = time.monotonic() + self._waits.end
        while self._stream is not None and (left := end - time.monotonic()) > 0:
            if not self._more(left):
                self._stream = None
        self.close()
        try:
            self._take(self._head.get_job_logs(self._job)[self._read :])
        except LodesetError as error:
            self._tell(f"the end of the log cannot be read: {error}")
        if self._line:
            self._show(self._line)
            self._line = ""

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _more(self, seconds: float) -> bool:
        """Shows the stream's next piece if it comes in this time; False if the stream has ended."""
        assert self._stream is not None
        with contextlib.suppress(queue.Empty):
            piece = self._stream.pieces.get(timeout=seconds)
            if piece is None:
                return False
            self._take(piece)
        return True

    def _take(self, text: str) -> None:
        if not text:
            return
        self._read += len(text)
        self._pause = self._waits.reopen
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._show(line)


class _Stream:
    """One stream of a log from a character on, read by a thread. Its last piece is None, however it ends."""

    def __init__(self, head: Watched, job: str, skip: int) -> None:
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._reading = self._loop.create_task(self._read(head, job, skip))
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._reading.cancel)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._reading)
        except (Exception, asyncio.CancelledError):
            pass  # the status of the job says what there is to say
        finally:
            self.pieces.put(None)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _read(self, head: Watched, job: str, skip: int) -> None:
        async for text in head.tail_job_logs(job):
            self.pieces.put(text[skip:])
            skip = max(0, skip - len(text))
