"""Runs whose checkpoints are kept in an object store: the same bits as on a local disk, resumed on any machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as multiprocessing
from buckets import environment, s3_server
from fault_proxy import FaultProxy

from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.dag.stored import stored
from lodeset.pipeline.errors import LodesetError
from lodeset.training.away import Away, workplace
from lodeset.training.checkpoint import MARKER
from lodeset.training.config import TrainingConfig
from lodeset.training.index import Shards
from lodeset.training.launch import train_inline
from lodeset.training.loop import train_loop
from lodeset.training.origin import Origin, networks

Interruption = Callable[[int], AbstractContextManager[None]]
RATES = {"slow_down": 0.05, "cut": 0.05, "short": 0.03, "reset": 0.03, "lost": 0.03}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server("bucket") as address:
        yield address


@pytest.fixture
def away(server: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Away:
    monkeypatch.setenv("LODESET_CACHE_DIR", str(tmp_path / "cache"))
    return Away(f"s3://bucket/{tmp_path.name}", "training/run")


def train(config: TrainingConfig, shards: Shards, away: Away, attempt: str, origin: Origin | None = None) -> None:
    with workplace(attempt) as folder:
        cpu = torch.device("cpu")
        train_loop(
            config=config, shards=shards, folder=folder, rank=0, world_size=1, device=cpu, origin=origin, away=away
        )


def names(store: Store, folder: str) -> set[str]:
    return {path.removeprefix(f"{store.root}/") for path in store.fs.find(store.path(folder))}


def contents(away: Away) -> dict[str, bytes]:
    return {name.removeprefix("training/run/"): away.store.read(name) or b"" for name in names(away.store, "training")}


def test_a_run_resumes_elsewhere_with_the_same_bits(
    tmp_path: Path,
    server: tuple[str, int],
    away: Away,
    shards: Shards,
    small: TrainingConfig,
    interrupted: Interruption,
) -> None:
    train_inline(small, shards, tmp_path / "local")
    with FaultProxy(server, RATES, seed=3) as proxy, environment(AWS_ENDPOINT_URL=proxy.url):
        spoiled = Away(away.url, away.folder)
        with interrupted(5):
            train(small, shards, spoiled, "first")
        assert spoiled.steps() == [3] and spoiled.newest_step() == 3
        train(small, shards, spoiled, "second")
        assert sum(proxy.faults.values()) > 5
    there = contents(away)
    here = {path.relative_to(tmp_path / "local").as_posix(): path for path in (tmp_path / "local").rglob("*")}
    # The order of a checkpoint's metadata is drawn by safetensors each time.
    for step in (3, 6):
        (name,) = (name for name in here if name.startswith(f"step-000000{step}/") and name.endswith(".safetensors"))
        one, other = safetensors.torch.load(there[name]), safetensors.torch.load(here[name].read_bytes())
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert there[name] == here[name].read_bytes()
    lines = [json.loads(line) for line in there["metrics.jsonl"].decode().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    left = away.left()
    assert away.store.bytes_of(left["model.safetensors"]) == there["model.safetensors"]
    assert not list((tmp_path / "cache").glob("training-*")), "no attempt leaves anything on this machine"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    away: Away, shards: Shards, small: TrainingConfig, interrupted: Interruption
) -> None:
    with interrupted(6):
        train(small.model_copy(update={"steps": 9, "checkpoint_every": 2}), shards, away, "first")
    (damaged,) = (name for name in names(away.store, "training/run/step-0000004") if name.endswith(".safetensors"))
    data = bytearray(away.store.read(damaged) or b"")
    data[-1] ^= 1
    away.store.overwrite(damaged, bytes(data))
    train(small.model_copy(update={"steps": 9, "checkpoint_every": 2}), shards, away, "second")
    assert json.loads(contents(away)["summary.json"])["resumed_step"] == 2
    with pytest.raises(LodesetError, match="was trained with other settings"):
        train(small.model_copy(update={"steps": 9, "batch": 4}), shards, away, "third")


def test_what_another_run_committed_is_not_replaced(
    away: Away, shards: Shards, small: TrainingConfig, interrupted: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Away, "withdraw", lambda *_: None)  # the other run commits after that
    away.store.put_absent("training/run/step-0000003/manifest.json", b'{"step": 3, "files": {}, "identity": {}}')
    monkeypatch.setattr(Away, "newest", lambda *_: None)
    with pytest.raises(LodesetError, match="was written by another run while this one trained into the same folder"):
        train(small, shards, away, "mine")


def test_another_run_starts_from_a_checkpoint_there(
    tmp_path: Path, away: Away, shards: Shards, small: TrainingConfig
) -> None:
    train(small, shards, away, "first")
    files = away.store.names("training/run/step-0000006")
    local = train_inline(small, shards, tmp_path / "local") and tmp_path / "local" / "step-0000006"
    marker = json.loads(contents(away)[f"step-0000006/{MARKER}"])["files"]
    assert set(files) == {MARKER, *marker}
    listed = [away._file(6, name, stored_file) for name, stored_file in away._marker(6).files.items()]  # type: ignore[union-attr]
    marker_bytes = contents(away)[f"step-0000006/{MARKER}"]
    (tmp_path / "marker").write_bytes(marker_bytes)
    whole = File(f"training/run/step-0000006/{MARKER}", 0, len(marker_bytes), file_digest(str(tmp_path / "marker")))
    checkpoint = stored(away.store, [whole, *listed])
    remote = networks(small, Origin(path=checkpoint.folder, digest="x", of=small, checkpoint=checkpoint))
    nearby = networks(small, Origin(path=str(local), digest="x", of=small))
    for name, tensor in nearby.student.state_dict().items():
        assert torch.equal(tensor, remote.student.state_dict()[name]), name


def worker(rank: int, rendezvous: str, config: TrainingConfig, shards: Shards, away: Away, folders: list[str]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    train_loop(
        config=config,
        shards=shards,
        folder=Path(folders[rank]),
        rank=rank,
        world_size=2,
        device=torch.device("cpu"),
        away=away,
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_without_a_common_folder(tmp_path: Path, away: Away, shards: Shards, small: TrainingConfig) -> None:
    """As on two machines: each has a folder of its own, and the checkpoint's tensors are sharded over both."""
    config = small.model_copy(update={"fsdp": True})
    longer = config.model_copy(update={"checkpoint_every": 2})
    for attempt in range(2):
        folders = [str(tmp_path / f"{attempt}-{rank}") for rank in range(2)]
        for folder in folders:
            Path(folder).mkdir()
        multiprocessing.spawn(
            worker, (str(tmp_path / f"meet-{attempt}"), longer, shards, away, folders), nprocs=2, join=True
        )
        if attempt == 0:
            first = contents(away)
            away._remove(6)
    marker = json.loads(first[f"step-0000006/{MARKER}"])
    assert len(marker["files"]) == 2, "each worker sent what it wrote"
    again = contents(away)
    assert json.loads(again["summary.json"])["resumed_step"] == 4
    assert again["model.safetensors"] == first["model.safetensors"]
