"""Checkpoints that are whole or not there, and resuming from the newest whole one.

A folder `step-0001000/` holds safetensors files, one or none of each worker, and `manifest.json`, its marker: written last, with
the size and SHA-256 of each file. All are written under a temporary name first, and the folder is renamed when they lie on disk.

PyTorch's distributed checkpoint reads and writes them (Hugging Face's form of it, which holds no pickled objects): a tensor lies
there once, whole or in shards, and can be read by any number of workers, whole or in other shards. What goes on from here are tensors
alone: all randomness derives from seed and step, so there is no generator state, and schedules are functions of the step.
"""

import contextlib
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lodeset.pipeline.config import Strict
from lodeset.pipeline.errors import LodesetError

MARKER = "manifest.json"
NAME = re.compile(r"step-(\d{7,})")


class StoredFile(Strict):
    size_bytes: int
    sha256: str


class Marker(Strict):
    """What `manifest.json` says: all files of tensors, and what a run must share to go on from them."""

    step: int
    files: dict[str, StoredFile]
    identity: dict[str, Any]
    config: dict[str, Any] | None = None  # the whole configuration of the run, what only changes its speed included


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Commits `tensors` as `folder/step-<step>`, then removes all but the newest `keep` checkpoints; all of `group` call this.

    Tensors share no memory; those that are sharded over the group are written by whoever holds a shard, others by one of it.
    `identity` is what a run must share to go on from here (see `newest_checkpoint`); it must survive JSON unchanged, as must `config`.
    """
    final = folder / f"step-{step:07d}"
    temporary = folder / f".{final.name}.tmp"
    first = group is None or dist.get_rank(group) == 0
    if first:
        for unfinished in folder.glob(".step-*.tmp"):  # left by a run that was killed
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    if group is not None:
        dist.barrier(group)
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    with _alone_or_not():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    if first:
        _commit(
            folder,
            temporary,
            Marker(step=step, files={}, identity=dict(identity), config=config and dict(config)),
            keep,
        )
    return final


def _commit(folder: Path, temporary: Path, marker: Marker, keep: int) -> None:
    final = folder / f"step-{marker.step:07d}"
    files = {
        path.name: StoredFile(size_bytes=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(temporary.iterdir())
    }
    with open(temporary / MARKER, "w") as file_text:
        file_text.write(marker.model_copy(update={"files": files}).model_dump_json(indent=2))
        file_text.flush()
        os.fsync(file_text.fileno())
    # The run went on from before them, so checkpoints of this step or a later one are damaged.
    for other, path in _checkpoints(folder):
        if other >= marker.step:
            shutil.rmtree(path)
    _sync(temporary)
    os.rename(temporary, final)
    _sync(folder)
    for _, older in _checkpoints(folder)[:-keep]:
        shutil.rmtree(older)


def newest_checkpoint(folder: Path, identity: Mapping[str, Any]) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint in `folder`; None where there is none.

    Checkpoints that are half-written, or whose bytes differ from the marker's, are passed over.

    Raises:
        LodesetError: the newest whole checkpoint belongs to another configuration or other images.
    """
    for step, path in reversed(_checkpoints(folder)):
        marker = _whole(path)
        if marker is None:
            continue
        _same_run(folder, path, marker.identity, identity)
        return step, path
    return None


def check_settings(folder: Path, training: Mapping[str, Any]) -> None:
    """Raises what `newest_checkpoint` would raise of a run's settings (see `identity_of`), whatever images it is of."""
    for _, path in reversed(_checkpoints(folder)):
        try:
            marker = Marker.model_validate_json((path / MARKER).read_bytes())
        except (OSError, ValidationError):
            continue
        _same_run(folder, path, {"training": marker.identity.get("training")}, {"training": training})
        return


def _same_run(folder: Path, path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = _differences(before, now)
    if not differences:
        return
    keys = ", ".join(differences)
    if all(one.startswith("training.steps:") for one in differences):
        raise LodesetError(
            f"{path} is of a run of other length ({keys}), and rates and momentum follow the length from the first step on, so "
            f"it cannot be prolonged: go on from what it learned in another folder, with `weights: {{path: {folder}}}` (once it "
            "has ended), or remove this one"
        )
    raise LodesetError(
        f"{path} was trained with other settings ({keys}): train into another folder, or remove this one"
    )


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fills `tensors`, sharded or whole, with what a checkpoint holds under their names; all of `group` call this.

    Raises:
        LodesetError: it does not hold them, or others of these names.
    """
    reader = HuggingFaceStorageReader(str(path))
    try:
        with _alone_or_not():
            load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        told, _ = next(iter(error.failures.values()))
        raise LodesetError(f"{path} cannot be read: {told}") from error


def check_checkpoint(path: Path) -> None:
    """Raises LodesetError: no checkpoint is at `path`, or its files are not those that its manifest tells of."""
    if not (path / MARKER).is_file():
        raise LodesetError(f"{path}, which this run starts from, is gone: make it again")
    if _whole(path) is None:
        raise LodesetError(f"{path} is damaged: its files are not those of {MARKER}; make it again")


def read_checkpoint(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under names that start with `prefix`, whole, on the CPU, by the rest of their names.

    Bytes are taken as they are: `newest_checkpoint` or `check_checkpoint` compares them with their digests, once.

    Raises:
        LodesetError: it cannot be read.
    """
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise LodesetError(f"{path} cannot be read: {error}") from error
    tensors = {
        name: torch.empty(told.size, dtype=told.properties.dtype)
        for name, told in stored.items()
        if name.startswith(prefix) and isinstance(told, TensorStorageMetadata)
    }
    load_checkpoint(path, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def _alone_or_not() -> Iterator[None]:
    """A run of one process has no process group, and PyTorch warns each time that it takes it for one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, whole or not; 0 where there is none."""
    found = _checkpoints(folder)
    return found[-1][0] if found else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _whole(path: Path) -> Marker | None:
    """The marker of a checkpoint whose files are those that it tells of, no more and no others."""
    try:
        marker = Marker.model_validate_json((path / MARKER).read_bytes())
        if {file.name for file in path.glob("*.safetensors")} != set(marker.files):
            return None
        for name, told in marker.files.items():
            if (path / name).stat().st_size != told.size_bytes or _sha256(path / name) != told.sha256:
                return None
    except (FileNotFoundError, ValidationError):
        return None
    return marker


def _sync(folder: Path) -> None:
    """Puts a folder's entries on disk: without it a power cut may lose a checkpoint after its predecessor was removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: before -> after` for every leaf that differs."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
