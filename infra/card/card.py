"""Write the card of a run: into the store, or into the folder of a copy of its shards."""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from lodeset.infra.card.croissant import croissant
from lodeset.infra.card.facts import facts
from lodeset.infra.card.readme import readme
from lodeset.infra.looking.held import Held
from lodeset.infra.looking.looking import held
from lodeset.infra.looking.summary import CARDS, CROISSANT, README, card_folder
from lodeset.infra.session import Opened
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.forgotten import refuse_during_take_down

# From the folder of a card in the store to that of the store.
_UP = "../../"


@dataclass(frozen=True)
class Card:
    """The files of a run's card, and the folders of the store with the shards and the index that these describe."""

    run: int
    readme: str
    croissant: str
    shards: tuple[str, ...]


def card(opened: Opened, out: str | Path | None = None, run: int | None = None) -> Card:
    """See `infra.api.card`."""
    refuse_during_take_down(opened.store)
    shown_run = held(opened, run)
    if out is None:
        return _stored(opened.store, shown_run)
    if opened.store.local and Path(out).resolve().is_relative_to(Path(opened.store.root).resolve()):
        raise ConfigError(f"--out {out}: it is in the store, which takes no other files: choose a folder outside of it")
    found = facts(opened.store, shown_run)
    for name, data in ((README, readme(found, "")), (CROISSANT, croissant(found, ""))):
        _save(Path(out) / name, data)
    folders = sorted({path.path.rpartition("/")[0] for path in (*found.shards, found.index)})
    return Card(found.run.number, str(Path(out) / README), str(Path(out) / CROISSANT), tuple(folders))


def keep_card(opened: Opened, run: Run) -> None:
    """Puts the run's card into the store, if it wrote shards. The run is done: what goes wrong here must not fail it."""
    if run.stages.get("write_shards/all") is None or opened.store.names(card_folder(run.number)):
        return
    try:
        refuse_during_take_down(opened.store)
        _stored(opened.store, held(opened, run.number))
    except Exception as error:
        logging.getLogger("lodeset").warning(
            "the run is done, but the card of its shards could not be written (%s: %s); `lodeset card` tries again",
            type(error).__name__,
            shown(error),
        )


def drop_cards(store: Store) -> None:
    """Takes every card out of the store: each is made again from what the store holds then."""
    store.delete_folder(CARDS)


def _stored(store: Store, of: Held) -> Card:
    found = facts(store, of)
    folder = card_folder(found.run.number)
    # The card last: who finds one finds both files.
    for name, data in ((CROISSANT, croissant(found, _UP)), (README, readme(found, _UP))):
        if store.read(f"{folder}/{name}") != data:
            store.overwrite(f"{folder}/{name}", data)
    folders = sorted({file.path.rpartition("/")[0] for file in (*found.shards, found.index)})
    return Card(
        found.run.number,
        store.full_url(f"{folder}/{README}"),
        store.full_url(f"{folder}/{CROISSANT}"),
        tuple(folders),
    )


def _save(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LodesetError(f"cannot write {shown(str(path))}: {error.strerror or error}") from error
