"""Every knob of a pruning job, by its method."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from lodeset.pipeline.config import Strict
from lodeset.training.config import CropsConfig, Fraction, Positive, TrainingConfig, recovering

BASE_LR = 1e-4  # of a recovery by a run
LADDER = tuple(1e-5 * 2**rung for rung in range(15))  # strengths that `remove` chooses from: to .16


class Job(Strict):
    """What every job has."""

    checkpoint: Literal["train", "finish", "distill"] = Field("train", description="the stage whose model is pruned")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of all that is drawn: images, baselines, new weights, crops")


class RecoverConfig(Strict):
    """Training after pruning: one for each strength and each way of choosing units.

    Of what a run trained: by that run, with its settings but for what is given here, and without `mix`: every image is shown once an epoch. Of
    a model alone: by the outputs of the dense one.
    """

    how: Literal["distill", "finetune"] = Field(
        "distill",
        description="distill: the dense model stays as it is and teaches (a run's: DINO and iBOT terms, on all patches; a model alone: what it "
        "returns first, mean square difference over its variance); finetune: the run goes on with the pruned model as student and teacher",
    )
    steps: int = Field(ge=1, description="optimiser steps; all schedules are compressed into them")
    batch: int | None = Field(
        None,
        ge=2,
        description="images a step, over all workers; none: as the dense model's run; 64 where it is a model alone",
    )
    base_lr: Positive | None = Field(
        None,
        description="learning rate at batch 1024; used: base_lr * sqrt(batch / 1024) "
        "[default: 1e-4, by a run; 4e-4, by the outputs of a model alone]",
    )
    crops: CropsConfig | None = Field(
        None,
        description="of a model alone: augmentation of the two views of each image [default: DINOv2's global crops]; their size is the "
        "model's, local crops are not taken",
    )
    sweep: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="points of the sweep (or of remove) whose models are trained; none: all of the job's",
    )


def run_of(dense: TrainingConfig, recover: RecoverConfig) -> TrainingConfig:
    """The configuration of a recovery.

    Raises:
        ValueError: it does not fit the dense model's run.
    """
    if recover.crops is not None:
        raise ValueError("crops are those of the dense model's run: remove `crops`")
    return recovering(dense, recover.steps, recover.batch, recover.base_lr or BASE_LR, recover.how == "distill")


class PruneJob(Job):
    """Entropic sparsification, swept over strengths of its penalty on one checkpoint."""

    method: Literal["entropic"] = Field("entropic", description="how the units to keep are chosen")
    targets: tuple[Literal["units", "heads"], ...] = Field(
        ("units",),
        min_length=1,
        description="what is removed: hidden units of feed-forward layers and channels of convolutions (units), attention heads",
    )
    mode: Literal["one_pass", "sequential"] = Field(
        "one_pass",
        description="what a layer is measured on: one_pass, what it takes in the dense model, so that images are seen once for all "
        "strengths; sequential, layer after layer what it takes behind those pruned before it, measured anew for every strength and method; "
        "what a residual stream has lost is made up for (with remove units are chosen in one pass, and layers refitted in turn)",
    )
    sweep: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        (1e-5, 1e-4, 1e-3),
        min_length=1,
        description="eps_w, the strengths of the sparsity penalty, as shares of a layer's output variance; "
        "a larger one keeps fewer units; with `remove`, those to choose from [there: 1e-5 to .16, each twice the one before]",
    )
    remove: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(
        (),
        description="shares of the model's parameters to remove, at least, one model each for every method; every group then has a strength "
        "of its own from `sweep`, such that a parameter saved changes the model's outputs as much as anywhere else [default: one strength "
        "in all groups, a model for each of sweep]",
    )
    entropy_sign: Literal[-1, 1] = Field(
        -1,
        description="sign of eps_w * sum(w log w): -1 minimises the entropy of w (few units carry the weight), as the "
        "paper on networks says; +1 pulls w towards uniform, as the regression method that it extends does, and is "
        "sparse only when l2_ratio is 10 or more (at 1 it keeps every unit)",
    )
    l2_ratio: float = Field(
        1.0,
        gt=0.0,
        description="eps_L2 / eps_w: how strong the L2 penalty on Lambda is beside the entropy; with w on the simplex "
        "the L2 term by itself is sparse, and it decides most of the sparsity of wide layers",
    )
    round_to: int = Field(
        1,
        ge=1,
        description="units kept are rounded up to a multiple of this: 8 or 16 suit fast kernels (not attention heads)",
    )
    calibration_images: int = Field(512, ge=1, description="images that the layers' moments are measured on")
    positions_per_image: int | None = Field(
        None, ge=1, description="tokens drawn at random of each calibration image; null takes all of them"
    )
    max_iterations: int = Field(500, ge=1, description="alternations of (Q, w) a start, at most")
    tolerance: float = Field(
        1e-6, gt=0.0, description="stop when an alternation lowers the objective by less than this share of it"
    )
    recover: RecoverConfig | None = Field(
        None, description="training of what pruning and refit left, by every criterion; none: as they are"
    )

    @model_validator(mode="before")
    @classmethod
    def _remove_has_a_ladder(cls, given: Any) -> Any:
        return {"sweep": LADDER, **given} if isinstance(given, dict) and given.get("remove") else given

    @model_validator(mode="after")
    def _recovers_what_is_made(self) -> Self:
        strange = [at for at in (self.recover and self.recover.sweep) or () if at not in self.points]
        if strange:
            field = "shares of remove" if self.remove else "strengths of sweep"
            raise ValueError(f"recover.sweep {strange}: not among the {field}, {list(self.points)}")
        return self

    @property
    def points(self) -> tuple[float, ...]:
        """What models are made for, ascending: shares of the parameters to remove, or else strengths."""
        return tuple(sorted(set(self.remove or self.sweep)))

    @property
    def swept(self) -> Literal["eps_w", "remove"]:
        """What `points` are."""
        return "remove" if self.remove else "eps_w"

    @property
    def solved_in_turn(self) -> bool:
        """Whether groups are solved behind those before them; units are chosen at once where a share of all parameters is to go."""
        return self.mode == "sequential" and not self.remove

    @property
    def recovered(self) -> list[float]:
        """The points whose models are trained again."""
        return sorted(self.recover.sweep or self.points) if self.recover is not None else []


class Learned(Job):
    """What jobs have that train."""

    target: str | None = Field(
        None, description="target set whose gallery gives the labels to train on; none: the first of `targets`"
    )
    steps: int = Field(1000, ge=2, description="optimiser steps of one training")
    batch: int = Field(64, ge=2, description="images a step; two views are taken of each")
    warmup: Fraction = Field(
        0.1, description="linear warm-up of the learning rate, share of steps; then half a cosine to 0"
    )
    crops: CropsConfig | None = Field(
        None,
        description="augmentation of the two views; none: what the model was trained with. Their size is the model's; local crops are not taken",
    )


class LotteryJob(Learned):
    """Iterative magnitude pruning with late rewinding (arXiv:2001.03554), of networks trained with labels or without."""

    method: Literal["lottery"] = Field(description="how the weights to keep are chosen")
    tasks: tuple[Literal["labels", "rotation", "dino"], ...] = Field(
        ("dino", "rotation"),
        min_length=1,
        description="what networks are trained to do, each by itself; their masks are compared",
    )
    start: Literal["fresh", "model"] = Field(
        "fresh", description="the first weights: drawn anew (fresh), or those of the model"
    )
    rounds: int = Field(5, ge=1, description="how often weights are taken away")
    rate: float = Field(0.2, gt=0, lt=1, description="share of the weights left that a round takes away")
    scope: Literal["global", "layer"] = Field(
        "global", description="among which the smallest are sought: all weights together, or those of each layer"
    )
    structured: bool = Field(
        False,
        description="whole units go (rows that make and columns that read them; scores are divided by their mean in each group), and models "
        "really shrink; otherwise single weights are set to 0",
    )
    rewind: Fraction = Field(0.1, description="to where weights are set back after each round, share of steps")
    transfer: bool = Field(
        True,
        description="train every ticket on labels, too, where there are any: from its rewound weights, with its mask",
    )
    lr: Positive = Field(1e-3, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of convolutions and linear layers")

    @model_validator(mode="after")
    def _each_task_once(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {', '.join(self.tasks)}: each of them once")
        return self

    @model_validator(mode="after")
    def _labels_are_learned(self) -> Self:
        if self.target is not None and "labels" not in self.tasks and not self.transfer:
            raise ValueError(f"target {self.target}: nothing learns its labels: add labels to tasks, or transfer: true")
        return self

    @model_validator(mode="after")
    def _rewinds_into_the_run(self) -> Self:
        if round(self.rewind * self.steps) >= self.steps:
            raise ValueError(f"rewind {self.rewind} of {self.steps} steps leaves none to train: lower it")
        return self


class SelfMaskingJob(Learned):
    """Masks learned for a frozen network (arXiv:2409.07577)."""

    method: Literal["self_masking"] = Field(description="how the weights to keep are chosen")
    task: Literal["labels", "swav"] = Field("swav", description="what masks are learned from")
    lr: tuple[Positive, ...] = Field(
        (8.0,),
        min_length=1,
        description="peak learning rates of the scores, swept; published for a ResNet-50 and many epochs: 0.15 for swav, 50 for labels",
    )
    head_lr: Positive = Field(0.1, description="peak learning rate of the head (and of prototypes)")
    prototypes: int = Field(500, ge=2, description="of swav (published)")
    queue: int = Field(
        1024,
        ge=0,
        description="of swav: earlier images that assignments are evened out over; the outputs of two views of each are kept",
    )

    @model_validator(mode="after")
    def _each_rate_once(self) -> Self:
        if len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr {list(self.lr)}: each of them once")
        return self

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        others = ("target",) if self.task == "swav" else ("prototypes", "queue")
        unread = [name for name in others if name in self.model_fields_set]
        if unread:
            raise ValueError(f"{', '.join(unread)}: not for task {self.task}: remove it, or choose another task")
        return self


class WhichMethod(BaseModel):
    """What decides which keys a job has; it passes over them."""

    method: Literal["entropic", "lottery", "self_masking"] = "entropic"


METHODS: dict[str, type[Job]] = {"entropic": PruneJob, "lottery": LotteryJob, "self_masking": SelfMaskingJob}


def _method(job: Any) -> str:
    return str(job.get("method", "entropic")) if isinstance(job, dict) else str(getattr(job, "method", "entropic"))


AnyJob = Annotated[
    Annotated[PruneJob, Tag("entropic")]
    | Annotated[LotteryJob, Tag("lottery")]
    | Annotated[SelfMaskingJob, Tag("self_masking")],
    Discriminator(
        _method,
        custom_error_type="unknown_method",
        custom_error_message=f"no such method: use one of {', '.join(METHODS)}",
    ),
]
