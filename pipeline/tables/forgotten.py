"""Images that a store was told to forget: a file each, so that two take-downs never lose one another's."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Sequence

from lodeset.pipeline.dag.claims import live
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import HeldError

FOLDER = "forgotten"
CLAIM = "forget"
# Of a take-down that is under way: which images go, and which clean copy replaces what.
JOURNAL, PLANNED = "forgetting.json", "forgetting-files.json"


def remember(store: Store, ids: Collection[str], asked: Sequence[str]) -> None:
    """Puts image_ids on the list, with the time. Of the URLs that were asked for it keeps digests alone, by which they are found
    again: the URL itself is to leave the store with its image.
    """
    digests = [asked_digest(one) for one in asked if one.lower() not in ids]
    for image_id in sorted(ids):
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"image_id": image_id, "asked_sha256": digests, "when": when}
        store.put_absent(f"{FOLDER}/{image_id}.json", json.dumps(entry, indent=1).encode())


def asked_digest(asked: str) -> str:
    return hashlib.sha256(asked.encode()).hexdigest()


def forgotten(store: Store) -> frozenset[str]:
    """The image_ids on the list."""
    return frozenset(name.removesuffix(".json") for name in store.names(FOLDER) if name.endswith(".json"))


def refuse_during_take_down(store: Store) -> None:
    """Raises HeldError while a take-down rewrites the store, or where one was cut short."""
    if CLAIM in live(store):
        raise HeldError(f"images or shards are being deleted from {store.url}: wait until that has ended")
    if store.read(JOURNAL) is not None:
        raise HeldError(
            f"a take-down in {store.url} was cut short: give the same `lodeset forget` again to complete it"
        )
