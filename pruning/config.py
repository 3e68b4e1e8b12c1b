"""Every knob of a pruning job."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import Strict


class PruneJob(Strict):
    """One method, swept over strengths of its penalty on one checkpoint, without fine-tuning."""

    method: Literal["entropic"] = Field("entropic", description="how the units to keep are chosen")
    targets: tuple[Literal["units", "heads"], ...] = Field(
        ("units",),
        min_length=1,
        description="what is removed: hidden units of feed-forward layers and channels of convolutions (units), attention heads",
    )
    checkpoint: Literal["train", "finish", "distill"] = Field("train", description="the stage whose model is pruned")
    mode: Literal["one_pass", "sequential"] = Field(
        "one_pass",
        description="what a layer is measured on: one_pass, what it takes in the dense model, so that images are seen once for all "
        "strengths; sequential, what it takes behind the layers pruned so far, measured anew for every strength and method",
    )
    sweep: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        (1e-5, 1e-4, 1e-3),
        min_length=1,
        description="eps_w, the strengths of the sparsity penalty, as shares of a layer's output variance; "
        "a larger one keeps fewer units",
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
    seed: int = Field(0, ge=0, description="of the tokens drawn and of the random baseline")
    max_iterations: int = Field(500, ge=1, description="alternations of (Q, w) a start, at most")
    tolerance: float = Field(
        1e-6, gt=0.0, description="stop when an alternation lowers the objective by less than this share of it"
    )
