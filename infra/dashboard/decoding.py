"""Images decoded where they can do no harm: in a process of its own, one at a time, with limits on time and memory."""

from __future__ import annotations

import functools
import io
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode
from lodeset.pipeline.engines.failures import Failed
from lodeset.pipeline.engines.processes import Died, Pool, step, task
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.inspect.thumbnails import thumbnail

CPU_S, CLOCK_S = 10.0, 20.0  # for one image
MEMORY_BYTES = 2 * 2**30  # an image of 100 million pixels takes about 1 GiB while it is decoded
WAIT_S = 20.0  # for the images that were asked for before
QUALITY = 85


class PictureError(LodesetError):
    """An image cannot be shown; the message says why."""


class Worker:
    """A process that is started when it is first needed, and again after it was ended. Threads may share it."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._pool, self._lock, self._memory = Pool(1), threading.Lock(), memory_bytes

    def run(self, function: Callable[..., Iterable[Any]], *arguments: Any) -> list[Any]:
        """What the function yields in the worker.

        Raises:
            PictureError: it failed, or passed a limit, or the images before it took too long.
        """
        if not self._lock.acquire(timeout=WAIT_S):
            raise PictureError("other images take long to decode: try again")
        try:
            found = self._pool.run(task(function, *arguments, memory_bytes=self._memory))
        finally:
            self._lock.release()
        if isinstance(found, Failed):
            raise PictureError(found.message)
        if isinstance(found, Died):
            raise PictureError(f"decoding this image was given up: {found.detail}")
        return found


@functools.cache
def worker() -> Worker:
    """The worker of this server."""
    return Worker()


def small(data: bytes, side: int, max_pixels: int) -> bytes:
    """The image as a WebP of at most `side` pixels a side, whatever it was encoded as.

    Raises:
        PictureError: it is no image, or passes a limit.
    """
    found: bytes = worker().run(_small, data, side, max_pixels)[0]
    return found


def _small(data: bytes, side: int, max_pixels: int) -> Iterator[bytes]:
    yield thumbnail(opened(data, max_pixels), side, QUALITY)


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """The pixels of an image, in a worker and with its limits.

    Raises:
        LodesetError: the bytes are no image, or it has more pixels.
    """
    step(0, CPU_S, CLOCK_S)
    try:
        return decode(data, max_pixels)
    except Unreadable as error:
        raise LodesetError(f"this is no image that can be decoded ({error.reason}: {error.detail})") from None


@functools.lru_cache(maxsize=64)
def placeholder(told: str, side: int) -> bytes:
    """A gray picture that says why there is no other."""
    image = Image.new("RGB", (side, side), (128, 134, 142))
    draw, size = ImageDraw.Draw(image), max(11, side // 24)
    font = ImageFont.load_default(size)
    draw.multiline_text(
        (side / 2, side / 2), _wrapped(told, max(8, int(side / size * 1.7))), "white", font, "mm", align="center"
    )
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def _wrapped(text: str, letters: int) -> str:
    return "\n".join(textwrap.wrap(text.encode("ascii", "replace").decode(), letters)[:6])
