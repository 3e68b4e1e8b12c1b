"""A proxy on the loopback interface that spoils some of the answers of an HTTP server: an object store on a bad day."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
# slow_down: 503. cut: half of the answer, then nothing. short: half of the answer, said to be all of it. reset: the
# connection ends before the answer, lost: after the server did what it was asked. silence: nothing comes, for
# `silence_s`. late: the first byte comes after `late_s`.
MODES = ("slow_down", "cut", "short", "reset", "lost", "silence", "late")


class FaultProxy:
    """Spoils each request with the probability `rates[mode]`, drawn with a seed; `faults` counts what it did."""

    def __init__(
        self,
        upstream: tuple[str, int],
        rates: Mapping[str, float],
        seed: int = 0,
        silence_s: float = 2.0,
        late_s: float = 0.5,
    ) -> None:
        assert set(rates) <= set(MODES), rates
        self.upstream, self.rates, self.silence_s, self.late_s = upstream, dict(rates), silence_s, late_s
        self.faults: Counter[str] = Counter()
        self.requests = self.bytes_sent = 0
        self.sent: Counter[str] = Counter()  # bytes, by the first two folders of a path
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="fault proxy")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _fault(self) -> str:
        drawn = self._random.random()
        for mode, rate in self.rates.items():
            drawn -= rate
            if drawn < 0:
                self.faults[mode] += 1
                return mode
        return ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        fields = _fields(head)
        if "expect" in fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        self.requests += 1
        fault = self._fault()
        if fault == "slow_down":
            said = b"" if head.startswith(b"HEAD ") else SLOW_DOWN
            writer.write(_answer(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml", said))
            return True
        if fault == "reset":
            return False
        if fault == "silence":
            await asyncio.sleep(self.silence_s)
            return False
        status, answer = await self._asked(head, body)
        if fault == "lost":
            return False
        if fault == "late":
            await asyncio.sleep(self.late_s)
        size = int(_fields(status).get("content-length", 0))
        self.bytes_sent += len(answer)
        self.sent["/".join(head.split(b" ", 2)[1].decode("latin-1").split("?")[0].split("/")[1:3])] += len(answer)
        if head.startswith(b"HEAD ") or fault not in ("cut", "short") or not answer:
            writer.write(status + answer)
            return size == len(answer) or head.startswith(b"HEAD ")
        half = answer[: len(answer) // 2]
        if fault == "cut":
            writer.write(status + half)
            await writer.drain()
            return False
        lines = [line for line in status[:-4].split(b"\r\n") if not line.lower().startswith(b"content-length:")]
        writer.write(_answer(b"\r\n".join(lines), half))
        return True

    async def _asked(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """The head and the body of the server's answer."""
        reader, writer = await asyncio.open_connection(*self.upstream, limit=2**20)
        try:
            writer.write(head + body)
            await writer.drain()
            status = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"HEAD "):
                return status, b""
            size = _fields(status).get("content-length")
            return status, await (reader.read() if size is None else reader.readexactly(int(size)))
        finally:
            writer.close()


def _fields(head: bytes) -> dict[str, str]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.decode("latin-1").lower(): value.strip().decode("latin-1") for name, _, value in lines if name}


def _answer(head: bytes, body: bytes) -> bytes:
    return head + b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
