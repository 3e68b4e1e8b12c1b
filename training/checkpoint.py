"""Checkpoints that are either complete or absent, and resuming from the newest complete one.

A folder `step-0001000/` holds safetensors files, at most one per worker, and `manifest.json`, its marker: written last,
with the size and SHA-256 of each file. All files are written under a temporary name, and the folder is renamed once
they are on disk.

PyTorch's distributed checkpoint reads and writes them (in Hugging Face's format, which contains no pickled objects):
each tensor is stored once, whole or in shards, and any number of workers can read it, whole or sharded differently. A
checkpoint contains only tensors: all randomness derives from seed and step, so there is no generator state, and
schedules are functions of the step.
"""

import contextlib
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from lodeset.training.away import Away

MARKER = "manifest.json"
NAME = re.compile(r"step-(\d{7,})")


class StoredFile(Strict):
    size_bytes: int
    sha256: str


class Marker(Strict):
    """Content of `manifest.json`: all tensor files, and the settings that a run must share to continue from them."""

    step: int
    files: dict[str, StoredFile]
    identity: dict[str, Any]
    config: dict[str, Any] | None = (
        None  # the complete configuration of the run, including settings that only change its speed
    )


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
    config: Mapping[str, Any] | None = None,
    away: "Away | None" = None,
) -> Path:
    """Commit `tensors` as `folder/step-<step>`, then remove all but the newest `keep` checkpoints; all of `group` call
    this.

    Tensors share no memory. Sharded tensors are written by the workers that hold the shards, others by one worker.
    `identity` is what a run must share to continue from here (see `newest_checkpoint`). It must survive JSON unchanged,
    and so must `config`. With `away`, checkpoints are kept there, `folder` is one of this machine, and what stays in it
    is what this worker wrote.
    """
    if away is not None:
        marker = Marker(step=step, files={}, identity=dict(identity), config=config and dict(config))
        return _save_away(folder, marker, tensors, keep, group, away)
    final = folder / f"step-{step:07d}"
    temporary = folder / f".{final.name}.tmp"
    first = group is None or dist.get_rank(group) == 0
    if first:
        for unfinished in folder.glob(".step-*.tmp"):  # left by a killed run
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    if group is not None:
        dist.barrier(group)
    _write(temporary, tensors, group)
    if first:
        _commit(
            folder,
            temporary,
            Marker(step=step, files={}, identity=dict(identity), config=config and dict(config)),
            keep,
        )
    return final


def _write(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_or_not():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def _save_away(
    folder: Path,
    marker: Marker,
    tensors: Mapping[str, Tensor],
    keep: int,
    group: dist.ProcessGroup | None,
    away: "Away",
) -> Path:
    """Each worker writes and sends its own files: workers of several machines see only these."""
    final, rank = folder / f"step-{marker.step:07d}", 0 if group is None else dist.get_rank(group)
    temporary = folder / f".{final.name}.{rank}.tmp"
    temporary.mkdir(parents=True)
    if rank == 0:
        away.withdraw(marker.step)
    _write(temporary, tensors, group)  # all wait for one another here, so nothing is sent before the above
    sent = [away.send(marker.step, temporary)]
    if group is not None:
        every: list[dict[str, StoredFile]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(every, sent[0], group=group)
        sent = every
    if rank == 0:
        files = {name: stored for one in sent for name, stored in one.items()}
        away.commit(marker.model_copy(update={"files": dict(sorted(files.items()))}), keep)
        for _, older in _checkpoints(folder):
            shutil.rmtree(older)
        os.rename(temporary, final)
    else:
        shutil.rmtree(temporary)
    return final


def described(folder: Path) -> dict[str, StoredFile]:
    """Size and digest of each file in a folder."""
    return {
        path.name: StoredFile(size_bytes=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _commit(folder: Path, temporary: Path, marker: Marker, keep: int) -> None:
    final = folder / f"step-{marker.step:07d}"
    files = described(temporary)
    with open(temporary / MARKER, "w") as file_text:
        file_text.write(marker.model_copy(update={"files": files}).model_dump_json(indent=2))
        file_text.flush()
        os.fsync(file_text.fileno())
    # The run resumed from an earlier step, so existing checkpoints of this step or later are damaged.
    for other, path in _checkpoints(folder):
        if other >= marker.step:
            shutil.rmtree(path)
    _sync(temporary)
    os.rename(temporary, final)
    _sync(folder)
    for _, older in _checkpoints(folder)[:-keep]:
        shutil.rmtree(older)


def newest_checkpoint(folder: Path, identity: Mapping[str, Any]) -> tuple[int, Path] | None:
    """Step and folder of the newest complete checkpoint in `folder`, or None.

    Incomplete checkpoints, and those whose bytes differ from the marker's digests, are skipped.

    Raises:
        LodesetError: the newest complete checkpoint belongs to another configuration or to other images.
    """
    for step, path in reversed(_checkpoints(folder)):
        marker = _whole(path)
        if marker is None:
            continue
        same_run(str(folder), str(path), marker.identity, identity)
        return step, path
    return None


def check_settings(folder: Path, training: Mapping[str, Any]) -> None:
    """Raise what `newest_checkpoint` would raise about a run's settings (see `identity_of`), whatever its images
    are.
    """
    for _, path in reversed(_checkpoints(folder)):
        try:
            marker = Marker.model_validate_json((path / MARKER).read_bytes())
        except (OSError, ValidationError):
            continue
        same_run(str(folder), str(path), {"training": marker.identity.get("training")}, {"training": training})
        return


def same_run(folder: str, path: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise LodesetError if the checkpoint at `path` does not belong to this run."""
    differences = _differences(before, now)
    if not differences:
        return
    keys = ", ".join(differences)
    if all(difference.startswith("training.steps:") for difference in differences):
        raise LodesetError(
            f"{path} belongs to a run of another length ({keys}); the learning rate and the momentum follow the "
            "length from the first step on, so the run cannot be extended: continue from its weights in another "
            f"folder with `weights: {{path: {folder}}}` (after it has ended), or remove this checkpoint"
        )
    raise LodesetError(
        f"{path} was trained with other settings ({keys}): train into another folder, or remove this checkpoint"
    )


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors`, sharded or whole, with a checkpoint's values of the same names; all of `group` call this.

    Raises:
        LodesetError: tensors are missing in the checkpoint or do not match.
    """
    reader = HuggingFaceStorageReader(str(path))
    try:
        with _alone_or_not():
            load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise LodesetError(f"{path} cannot be read: {failure}") from error


def check_checkpoint(path: Path) -> None:
    """Raise LodesetError if there is no checkpoint at `path`, or if its files do not match its manifest."""
    if not (path / MARKER).is_file():
        raise LodesetError(f"{path}, which this run starts from, no longer exists: make it again")
    if _whole(path) is None:
        raise LodesetError(f"{path} is damaged: its files do not match {MARKER}; make it again")


def read_checkpoint(path: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names start with `prefix`, on the CPU, by the rest of their names.

    The bytes are not verified here: `newest_checkpoint` or `check_checkpoint` compares them with their digests once.

    Raises:
        LodesetError: the checkpoint cannot be read.
    """
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise LodesetError(f"{path} cannot be read: {error}") from error
    tensors = {
        name: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in stored.items()
        if name.startswith(prefix) and isinstance(metadata, TensorStorageMetadata)
    }
    load_checkpoint(path, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def _alone_or_not() -> Iterator[None]:
    """Silence PyTorch's warning about a missing process group, which it repeats in every run of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, complete or not; 0 if there is none."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1][0] if checkpoints else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def _whole(path: Path) -> Marker | None:
    """The marker of a checkpoint if its files are exactly those that the marker lists."""
    try:
        marker = Marker.model_validate_json((path / MARKER).read_bytes())
        if {file.name for file in path.glob("*.safetensors")} != set(marker.files):
            return None
        for name, stored in marker.files.items():
            if (path / name).stat().st_size != stored.size_bytes or _sha256(path / name) != stored.sha256:
                return None
    except (FileNotFoundError, ValidationError):
        return None
    return marker


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk: otherwise a power failure may lose a checkpoint after its predecessor was
    removed.
    """
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
    differences = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            differences.append(f"{prefix}{key}: {old} -> {new}")
    return differences
