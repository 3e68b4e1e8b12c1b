"""Training without the DAG: shards that are there already, a folder, and nothing else."""

from pathlib import Path
from typing import Any

from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.dag.store import Store
from lodeset.training.checkpoint import MARKER
from lodeset.training.config import TrainingConfig, distilling, finishing
from lodeset.training.index import Shards
from lodeset.training.launch import launch
from lodeset.training.origin import Origin
from lodeset.training.weights import identity


def train(config: TrainingConfig, shards: Shards, folder: Path, cpus: int) -> dict[str, dict[str, Any]]:
    """Trains into `folder/train`, `finish` and `distill`, as far as configured.

    Ray must be initialised. A folder that holds an unfinished run goes on from it. Returns each run's summary (see `train_loop`).

    Raises:
        HeldError: another run trains into this folder.
        LodesetError: as `launch`.
    """
    with claim(Store(str(folder)), "train", f"a training run in {folder}"):
        return _train(config, shards, folder, cpus)


def _train(config: TrainingConfig, shards: Shards, folder: Path, cpus: int) -> dict[str, dict[str, Any]]:
    origin = None
    if config.weights is not None:
        origin = Origin(path=config.weights.path, digest=identity(config.weights.path))
    told = {"train": _run(config, shards, folder / "train", cpus, origin)}
    last, of = folder / "train", config
    if config.finish is not None:
        before = _origin(last, of, distil=False)
        last, of = folder / "finish", finishing(config)
        told["finish"] = _run(of, shards, last, cpus, before)
    if config.distill is not None:
        told["distill"] = _run(distilling(config), shards, folder / "distill", cpus, _origin(last, of, distil=True))
    return told


def _run(config: TrainingConfig, shards: Shards, folder: Path, cpus: int, origin: Origin | None) -> dict[str, Any]:
    return launch(config, shards, folder, cpus, origin) | {"folder": str(folder)}


def _origin(folder: Path, of: TrainingConfig, distil: bool) -> Origin:
    checkpoint = folder / f"step-{of.steps:07d}"
    return Origin(path=str(checkpoint), digest=file_digest(str(checkpoint / MARKER)), of=of, distil=distil)
