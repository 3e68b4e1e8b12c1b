"""What every stage does with its parts: keep those that are committed, have the others made, report progress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Progress
from lodeset.pipeline.dag.store import Part

Item = TypeVar("Item")


@dataclass(frozen=True)
class Block:
    """Rows start..stop of what a stage compares, and the key of the part that they make."""

    key: str
    start: int
    stop: int


def blocks(count: int, size: int, *basis: Any) -> list[tuple[str, Block, int]]:
    """The work of `made` for `count` rows in blocks of `size`; `basis` is all that a part depends on besides."""
    work = []
    for start in range(0, count, size):
        key, stop = digest(*basis, start, size), min(start + size, count)
        work.append((key, Block(key, start, stop), stop - start))
    return work


def made(
    context: Context,
    stage: str,
    work: Sequence[tuple[str, Item, int]],
    make: Callable[[Iterable[Item]], Iterator[Part]],
    unit: str = "images",
) -> tuple[list[Part], set[str]]:
    """The parts of `work` = (key, item, size) in that order, and the keys of those that this run made.

    `make` turns the items that are left into committed parts, in any order. What it does is told as the phase that `stage` names.
    """
    keys = [key for key, _, _ in work]
    parts = context.store.committed(stage, keys)
    sizes = {key: size for key, _, size in work}
    total = sum(sizes.values()) or 1
    done = sum(sizes[key] for key in parts)
    already, before = done, set(parts)
    phase = "" if stage == context.stage.name else stage.removeprefix(f"{context.stage.name}_").replace("_", " ")
    context.report(Progress(done / total, 0, unit, phase, len(parts), len(keys)))
    left = {key: item for key, item, _ in work if key not in parts}
    if left:
        for part in make(left.values()):
            parts[part.key] = part
            done += sizes[part.key]
            context.report(Progress(done / total, done - already, unit, phase, len(parts), len(keys)))
    return [parts[key] for key in keys], set(keys) - before


@contextlib.contextmanager
def watching(
    context: Context, stage: str, before: set[str], total: int, counted: str, parts: int | None = None
) -> Iterator[None]:
    """Reports progress by the parts that appear in the store, which works wherever Beam runs its workers.

    `counted` is the count of a part that adds up to `total`; `parts` is the number of parts to come, where it is known.
    """
    seen, size, images = set(before), 0, 0

    def look() -> float:
        nonlocal size, images
        started = time.monotonic()
        for key in set(context.store.names(f"parts/{stage}")) - seen:
            part = context.store.part(stage, key)
            if part is not None and counted in part.counts:
                seen.add(key)
                size += part.counts[counted]
                images += part.counts["images"]
        made = len(seen) - len(before)
        context.report(Progress(min(1.0, size / max(1, total)), images, parts_done=made, parts=parts))
        return max(1.0, 20 * (time.monotonic() - started))  # listing never takes more than a twentieth

    with repeating(look, 1.0):
        yield
