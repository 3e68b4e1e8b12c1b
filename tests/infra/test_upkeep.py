"""Which shards new ones replace, on artifacts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lodeset.infra.upkeep.compact import superseded, sweep
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import HeldError


class Shards:
    """A store with runs of write_shards."""

    def __init__(self, folder: Path) -> None:
        self.store, self.runs = Store(str(folder)), 0

    def run(self, *paths: str, sets: tuple[str, ...] = ("pool",), **config: Any) -> Artifact:
        """Shards at these paths, made from a selection of these sets; the later, the newer."""
        self.runs += 1
        files = []
        for path in paths:
            if self.store.read(path) is None:
                self.store.put_absent(path, path.encode())
                self.store.commit_part("write_shards", path.replace("/", "-"), {}, files={"shard": self.file(path)})
            files.append(self.file(path))
        chosen = Artifact("retrieve", "all", 1, f"r{self.runs}", {"sets": list(sets)}, {}, {}, Rows(1, 1))
        self.store.commit_artifact(chosen)
        inputs = {
            "selected": {"stage": "retrieve/all", "identity": chosen.fingerprint, "fingerprint": chosen.fingerprint}
        }
        config = {"name": "lodeset", "limit": None, **config}
        tables = {"shards": tuple(files)}
        return self.store.commit_artifact(
            Artifact(
                "write_shards", "all", 1, f"w{self.runs}", config, inputs, tables, Rows(1, 1), created=float(self.runs)
            )
        )

    def file(self, path: str) -> File:
        return File(path, 1, len(path), "")

    def left(self) -> set[str]:
        return {f"shards/{f}/{name}" for f in self.store.names("shards") for name in self.store.names(f"shards/{f}")}


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path)


def test_what_nothing_else_lists_is_superseded(shards: Shards) -> None:
    shards.run("shards/a/0.tar", "shards/a/1.tar")
    shards.run("shards/a/1.tar", "shards/b/2.tar")
    new = shards.run("shards/c/0.tar")
    found = superseded(shards.store, new, delete=False)
    assert [file.path for file in found] == ["shards/a/0.tar", "shards/a/1.tar", "shards/b/2.tar"]
    assert len(shards.left()) == 4 and len(shards.store.history("write_shards", "all")) == 3
    # Asked again, and now to delete: the same shards, though nothing was written in between.
    assert superseded(shards.store, new, delete=True) == found
    assert shards.left() == {"shards/c/0.tar"}
    assert [one.fingerprint for one in shards.store.history("write_shards", "all")] == [new.fingerprint]
    parts = (shards.store.part("write_shards", key) for key in shards.store.names("parts/write_shards"))
    assert [part.files["shard"].path for part in parts if part] == ["shards/c/0.tar"]
    assert superseded(shards.store, new, delete=True) == []


@pytest.mark.parametrize("other", [{"name": "another"}, {"limit": 100}, {"sets": ("pool", "flowers")}])
def test_shards_of_another_configuration_stay(shards: Shards, other: dict[str, Any]) -> None:
    shards.run("shards/a/0.tar", "shards/a/1.tar")
    shards.run("shards/a/1.tar", "shards/b/2.tar", **other)
    new = shards.run("shards/c/0.tar")
    assert [file.path for file in superseded(shards.store, new, delete=True)] == ["shards/a/0.tar"]
    assert shards.left() == {"shards/a/1.tar", "shards/b/2.tar", "shards/c/0.tar"}


def test_newer_shards_are_not_those_that_were_replaced(shards: Shards) -> None:
    new = shards.run("shards/c/0.tar")
    shards.run("shards/c/0.tar", "shards/d/1.tar")
    assert superseded(shards.store, new, delete=True) == []
    assert shards.left() == {"shards/c/0.tar", "shards/d/1.tar"}


def test_nothing_is_deleted_under_a_run(shards: Shards) -> None:
    shards.run("shards/a/0.tar")
    new = shards.run("shards/c/0.tar")
    with claim(shards.store, "run-1", "a run"), pytest.raises(HeldError, match="run-1"):
        superseded(shards.store, new, delete=True)
    assert len(shards.left()) == 2
    assert len(superseded(shards.store, new, delete=False)) == 1


def test_what_a_killed_run_left_goes_and_nothing_else(shards: Shards) -> None:
    shards.run("shards/a/0.tar")
    kept = "parts/prune_tickets/key/0123456789ab-state.safetensors"
    shards.store.put_absent(kept, b"of a part")
    shards.store.commit_part("prune_tickets", "key", {}, files={"state": File(kept, 1, 9, "")})
    stay = ("parts/prune_tickets/key/notes.txt", "shards/a/0123456789ab-notes.txt")
    go = (
        "parts/prune_tickets/key/ba9876543210-state.safetensors",
        "parts/prune_tickets/other/ba9876543210-path.png",
        "shards/a/1.tar",
    )
    for path in (*stay, *go):
        shards.store.put_absent(path, b"somebody's")
    sweep(shards.store)
    assert all(shards.store.read(path) is not None for path in (kept, "shards/a/0.tar", *stay))
    assert all(shards.store.read(path) is None for path in go)
    assert shards.store.part("prune_tickets", "key") is not None
