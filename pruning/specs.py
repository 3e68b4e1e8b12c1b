"""The definition of the stage of pruning, and how it runs (see `lodeset.pipeline.specs`); and what its jobs make, for
plans that load no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lodeset.pipeline.config import TargetSet
from lodeset.pruning.choosing.criteria import CRITERIA
from lodeset.pruning.config import Job, Learned, LotteryJob, PruneJob, SelfMaskingJob
from lodeset.training.config import CropsConfig
from lodeset.training.specs import TrainSpec

if TYPE_CHECKING:
    from lodeset.training.origin import Origin

FIRST_CRITERIA = {"entropic", "magnitude", "random"}  # fingerprints only name criteria that were added later
PROBED = 128  # calibration images on which the effect of pruning a single group is measured


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    VERSION: ClassVar[int] = 10  # of everything that jobs make
    jobs: Sequence[Job]
    targets: Sequence[TargetSet]

    def identity(self) -> Mapping[str, Any]:
        chosen = {"name", "label", "split"}
        added = [criterion.name for criterion in CRITERIA if criterion.name not in FIRST_CRITERIA]
        return {
            "jobs": list(self.jobs),
            "targets": [target.model_dump(include=chosen) for target in self.targets],
            **({"criteria": added} if added and any(isinstance(job, PruneJob) for job in self.jobs) else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A model that no stage of the store trained, and what jobs need to know about it.

    Attributes:
        folder: its location.
        index: the index files of the shards that calibration images are in.
        size: the side of its images, pixels.
        max_pixels: larger images of the shards are skipped, as in its training.
        crops: the crops of its training, if known.
        checkpoint: the last checkpoint of the run that trained it, if its folder contains one.
    """

    folder: str
    index: tuple[str, ...]
    size: int
    max_pixels: int
    crops: CropsConfig
    checkpoint: Origin | None


@dataclass(frozen=True, kw_only=True)
class PruneRuntime:
    """How a job runs.

    Attributes:
        training: the specification of each stage whose model is pruned, by name.
        max_pixels: limit up to which images of target sets are decoded.
        dense: the model, if none of these stages trained it.
    """

    training: Mapping[str, TrainSpec]
    max_pixels: int
    dense: Dense | None = None


@dataclass(frozen=True, kw_only=True)
class PruneDetails:
    """One report per job, and the folder of the pruned models, relative to the store."""

    jobs: Sequence[Mapping[str, Any]]
    folder: str


def images_per_part(images: int) -> int:
    """Number of images whose moments one part holds.

    Parts are few, because each holds every layer's moments (170 MB for a 3 x 3 convolution of 512 channels), and they
    fit in memory (1,024 images of 224 pixels: 150 MB). They do not depend on the number of workers.
    """
    return min(1_024, max(64, -(-images // 16)))


def trainings(job: Learned) -> int:
    """Number of networks that a job trains."""
    if isinstance(job, LotteryJob):
        on_labels = len([task for task in job.tasks if task != "labels"]) if job.transfer else 0
        return (len(job.tasks) + on_labels) * (1 + 2 * job.rounds)
    return len(job.lr) if isinstance(job, SelfMaskingJob) else 1
