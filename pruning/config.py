"""The settings of pruning jobs, by method."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from lodeset.pipeline.config import Strict
from lodeset.training.config import CropsConfig, Fraction, Positive, TrainingConfig, recovering

BASE_LR = 1e-4  # of a recovery through the model's own training run
LADDER = tuple(1e-5 * 2**rung for rung in range(15))  # strengths that `remove` chooses from: up to .16


class Job(Strict):
    """Settings that every job has."""

    checkpoint: Literal["train", "finish", "distill"] = Field("train", description="stage whose model is pruned")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="seed of everything random: images, baselines, new weights, crops"
    )


class RecoverConfig(Strict):
    """Training after pruning: one training for each strength and each way of choosing units.

    A model from a training run is trained by that run with its settings, except those given here, and without `mix`:
    every image is shown once per epoch. A model without a run is trained to match the dense model's outputs.
    """

    how: Literal["distill", "finetune"] = Field(
        "distill",
        description="distill: the frozen dense model is the teacher (with a run: DINO and iBOT terms, on all "
        "patches; a model without a run: the mean square difference of the first output, over its variance); "
        "finetune: the run continues with the pruned model as student and teacher",
    )
    steps: int = Field(ge=1, description="optimizer steps; all schedules are compressed to this length")
    batch: int | None = Field(
        None,
        ge=2,
        description="images per step, over all workers [default: that of the dense model's run; 64 for a model without "
        "a run]",
    )
    base_lr: Positive | None = Field(
        None,
        description="learning rate at batch 1024; the rate used is base_lr * sqrt(batch / 1024) "
        "[default: 1e-4 with a run; 4e-4 for a model without a run]",
    )
    crops: CropsConfig | None = Field(
        None,
        description="only for a model without a run: augmentation of the two views of each image [default: DINOv2's "
        "global crops]; their size is the "
        "model's, and local crops are not used",
    )
    sweep: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="points of the sweep (or of remove) whose models are trained [default: all points of the job]",
    )


def run_of(dense: TrainingConfig, recover: RecoverConfig) -> TrainingConfig:
    """The training configuration of a recovery.

    Raises:
        ValueError: the recovery does not fit the dense model's run.
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
        description="what to remove: units (hidden units of feed-forward layers and channels of convolutions), heads "
        "(attention heads)",
    )
    mode: Literal["one_pass", "sequential"] = Field(
        "one_pass",
        description="input that a layer is measured on. one_pass: its input in the dense model, so that images are "
        "read once for all strengths; sequential: its input behind the layers that were pruned before it, measured "
        "again for every strength and method, which also compensates for what a residual stream has lost (with "
        "remove, units are chosen in one pass, and layers are refitted in turn)",
    )
    sweep: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        (1e-5, 1e-4, 1e-3),
        min_length=1,
        description="eps_w, strengths of the sparsity penalty as shares of a layer's output variance; "
        "a larger strength keeps fewer units; with `remove`, the strengths to choose from [default with remove: 1e-5 "
        "to .16, each twice the previous one]",
    )
    remove: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(
        (),
        description="minimum shares of the model's parameters to remove, one model per share and method; every group "
        "then gets its own strength from `sweep`, so that saving one parameter changes the model's outputs equally "
        "in every group [default: one strength for all groups, one model for each strength of sweep]",
    )
    entropy_sign: Literal[-1, 1] = Field(
        -1,
        description="sign of eps_w * sum(w log w): -1 minimizes the entropy of w (few units carry the weight), as in "
        "the paper on networks; +1 pulls w toward uniform, as in the regression method that the paper extends, and "
        "is sparse only if l2_ratio is 10 or more (at 1 it keeps every unit)",
    )
    l2_ratio: float = Field(
        1.0,
        gt=0.0,
        description="eps_L2 / eps_w: strength of the L2 penalty on Lambda relative to the entropy; with w on the "
        "simplex, "
        "the L2 term alone is sparse and decides most of the sparsity of wide layers",
    )
    round_to: int = Field(
        1,
        ge=1,
        description="round the number of kept units up to a multiple of this: 8 or 16 suit fast kernels (attention "
        "heads are not rounded)",
    )
    calibration_images: int = Field(512, ge=1, description="number of images on which the layers' moments are measured")
    positions_per_image: int | None = Field(
        None, ge=1, description="tokens drawn at random from each calibration image; null uses all of them"
    )
    max_iterations: int = Field(500, ge=1, description="maximum number of (Q, w) alternations per start")
    tolerance: float = Field(
        1e-6, gt=0.0, description="stop when an alternation lowers the objective by less than this share"
    )
    recover: RecoverConfig | None = Field(
        None, description="training of the pruned and refitted models, for every criterion [default: none]"
    )

    @model_validator(mode="before")
    @classmethod
    def _remove_has_a_ladder(cls, values: Any) -> Any:
        return {"sweep": LADDER, **values} if isinstance(values, dict) and values.get("remove") else values

    @model_validator(mode="after")
    def _recovers_what_is_made(self) -> Self:
        strange = [at for at in (self.recover and self.recover.sweep) or () if at not in self.points]
        if strange:
            field = "shares of remove" if self.remove else "strengths of sweep"
            raise ValueError(f"recover.sweep {strange}: not among the {field}, {list(self.points)}")
        return self

    @property
    def points(self) -> tuple[float, ...]:
        """The points that models are made for, ascending: shares of the parameters to remove, or strengths."""
        return tuple(sorted(set(self.remove or self.sweep)))

    @property
    def swept(self) -> Literal["eps_w", "remove"]:
        """The setting that `points` are values of."""
        return "remove" if self.remove else "eps_w"

    @property
    def solved_in_turn(self) -> bool:
        """Whether groups are solved one behind the other; if a share of all parameters is to be removed, units are
        chosen at once.
        """
        return self.mode == "sequential" and not self.remove

    @property
    def recovered(self) -> list[float]:
        """The points whose models are trained again."""
        return sorted(self.recover.sweep or self.points) if self.recover is not None else []


class Learned(Job):
    """Settings of the jobs that train."""

    target: str | None = Field(
        None, description="target set whose gallery provides the training labels [default: the first of `targets`]"
    )
    steps: int = Field(1000, ge=2, description="optimizer steps of each training")
    batch: int = Field(64, ge=2, description="images per step; each image is shown in two views")
    warmup: Fraction = Field(
        0.1, description="share of the steps for the linear warm-up of the learning rate; half a cosine to 0 follows"
    )
    crops: CropsConfig | None = Field(
        None,
        description="augmentation of the two views [default: that of the model's training]; their size is the model's, "
        "and local crops are not used",
    )


class LotteryJob(Learned):
    """Iterative magnitude pruning with late rewinding (arXiv:2001.03554) of networks trained with or without labels."""

    method: Literal["lottery"] = Field(description="how the weights to keep are chosen")
    tasks: tuple[Literal["labels", "rotation", "dino"], ...] = Field(
        ("dino", "rotation"),
        min_length=1,
        description="tasks that networks are trained on, one network per task; their masks are compared",
    )
    start: Literal["fresh", "model"] = Field(
        "fresh", description="first weights: fresh (newly initialized) or model (those of the model)"
    )
    rounds: int = Field(5, ge=1, description="number of pruning rounds")
    rate: float = Field(0.2, gt=0, lt=1, description="share of the remaining weights that each round removes")
    scope: Literal["global", "layer"] = Field(
        "global",
        description="where the smallest weights are searched: global (over all layers) or layer (in each layer)",
    )
    structured: bool = Field(
        False,
        description="remove whole units (the rows that make them and the columns that read them; scores are divided by "
        "their mean in each group), "
        "so that models really shrink; otherwise single weights are set to 0",
    )
    rewind: Fraction = Field(
        0.1, description="point that weights are reset to after each round, as a share of the steps"
    )
    transfer: bool = Field(
        True,
        description="also train every ticket on labels if there are any: from its rewound weights, with its mask",
    )
    lr: Positive = Field(1e-3, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of convolutions and linear layers")

    @model_validator(mode="after")
    def _each_task_once(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {', '.join(self.tasks)}: list each task once")
        return self

    @model_validator(mode="after")
    def _labels_are_learned(self) -> Self:
        if self.target is not None and "labels" not in self.tasks and not self.transfer:
            raise ValueError(
                f"target {self.target}: no task uses its labels: add labels to tasks, or set transfer: true"
            )
        return self

    @model_validator(mode="after")
    def _rewinds_into_the_run(self) -> Self:
        if round(self.rewind * self.steps) >= self.steps:
            raise ValueError(f"rewind {self.rewind} of {self.steps} steps leaves no steps to train: lower it")
        return self


class SelfMaskingJob(Learned):
    """Masks learned for a frozen network (arXiv:2409.07577)."""

    method: Literal["self_masking"] = Field(description="how the weights to keep are chosen")
    task: Literal["labels", "swav"] = Field("swav", description="task that masks are learned from")
    lr: tuple[Positive, ...] = Field(
        (8.0,),
        min_length=1,
        description="peak learning rates of the scores, swept; the paper uses 0.15 for swav and 50 for labels on a "
        "ResNet-50 and many epochs",
    )
    head_lr: Positive = Field(0.1, description="peak learning rate of the head (and of prototypes)")
    prototypes: int = Field(500, ge=2, description="number of prototypes of swav (as published)")
    queue: int = Field(
        1024,
        ge=0,
        description="for swav: number of earlier images over which assignments are balanced; the outputs of two views "
        "of each are stored",
    )

    @model_validator(mode="after")
    def _each_rate_once(self) -> Self:
        if len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr {list(self.lr)}: list each rate once")
        return self

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        others = ("target",) if self.task == "swav" else ("prototypes", "queue")
        unread = [name for name in others if name in self.model_fields_set]
        if unread:
            raise ValueError(f"{', '.join(unread)}: not used by task {self.task}: remove it, or choose another task")
        return self


class WhichMethod(BaseModel):
    """The setting that decides which keys a job has; all other keys are ignored here."""

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
