"""Checkpoints that are whole or not there, and resuming from the newest whole one.

A folder `step-0001000/` holds `state.pt` (everything needed to go on; all randomness derives from seed and step, so no
generator state) and `manifest.json`, its marker: written last, with the size and SHA-256 of the state. Both are written
under a temporary name first, and the folder is renamed when they lie on disk.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import LodesetError

STATE = "state.pt"
MARKER = "manifest.json"
NAME = re.compile(r"step-(\d{7,})")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], identity: dict[str, Any], keep: int) -> Path:
    """Commits `state` as `folder/step-<step>`, then removes all but the newest `keep` checkpoints.

    `identity` is what a run must share to go on from here (see `newest_checkpoint`); it must survive JSON unchanged.
    """
    final = folder / f"step-{step:07d}"
    temporary = folder / f".{final.name}.tmp"
    for unfinished in folder.glob(".step-*.tmp"):  # left by a run that was killed
        shutil.rmtree(unfinished)
    temporary.mkdir(parents=True)
    with open(temporary / STATE, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    marker = {
        "step": step,
        "state": {"size_bytes": (temporary / STATE).stat().st_size, "sha256": _sha256(temporary / STATE)},
        "identity": identity,
    }
    with open(temporary / MARKER, "w") as file_text:
        json.dump(marker, file_text, indent=2)
        file_text.flush()
        os.fsync(file_text.fileno())
    # The run went on from before them, so checkpoints of this step or a later one are damaged.
    for other, path in _checkpoints(folder):
        if other >= step:
            shutil.rmtree(path)
    os.rename(temporary, final)
    for _, older in _checkpoints(folder)[:-keep]:
        shutil.rmtree(older)
    return final


def newest_checkpoint(folder: Path, identity: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Step and state (on the CPU) of the newest whole checkpoint in `folder`; None where there is none.

    Checkpoints that are half-written, or whose bytes differ from the marker's, are passed over.

    Raises:
        LodesetError: the newest whole checkpoint belongs to another configuration or other images.
    """
    for step, path in reversed(_checkpoints(folder)):
        marker = _whole(path)
        if marker is None:
            continue
        if marker["identity"] != identity:
            keys = ", ".join(_differences(marker["identity"], identity))
            raise LodesetError(
                f"{path} was trained with other settings ({keys}): train into another folder, or remove this one"
            )
        try:
            return step, torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise LodesetError(f"{path / STATE} cannot be read by this version of torch: {error}") from error
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, whole or not; 0 where there is none."""
    found = _checkpoints(folder)
    return found[-1][0] if found else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text())
        stated = marker["state"]
        if (path / STATE).stat().st_size != stated["size_bytes"] or _sha256(path / STATE) != stated["sha256"]:
            return None
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    return marker


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: before -> after` for every leaf that differs."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
