"""The settings of self-supervised training, with their units; the defaults are the `tiny` recipe (others:
`training.recipes`).

`tiny` is DINOv2's method (Oquab et al. 2023, arXiv:2304.07193) scaled down until two CPU cores learn something within
minutes. Durations are fractions of `steps`, so a longer run needs no other change. Fields whose default differs from
the published value say so.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from lodeset.pipeline.config import Strict
from lodeset.training import backbones, objectives
from lodeset.training.backbones import BACKBONES
from lodeset.training.backbones.kind import Architecture, BackboneConfig, kind_of
from lodeset.training.kinds import by_kind
from lodeset.training.objectives import OBJECTIVES
from lodeset.training.objectives.objective import ObjectiveConfig
from lodeset.training.recipes import RECIPES, SIZES, under

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Range = tuple[Positive, Positive]


class ModelConfig(Strict):
    """The Vision Transformer (DINOv2, table 17 for the published sizes)."""

    size: Literal["tiny", "small", "base", "large", "giant"] | None = Field(
        None,
        description="sets dim, depth and heads unless they are given (tiny: 192, 12, 3; the others as published)",
    )
    patch_size: Literal[4, 8, 14, 16] = Field(8, description="side of a patch, pixels")
    dim: int = Field(128, ge=8, description="width of a token, channels")
    depth: int = Field(4, ge=1, description="number of transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads per block; must divide dim")
    ffn: Literal["mlp", "swiglu"] = Field("mlp", description="feed-forward layer of a block: mlp (x4, GELU) or swiglu")
    registers: int = Field(0, ge=0, description="register tokens (Darcet et al. 2023); 0 or 4 in released models")
    layerscale: float = Field(
        1.0, gt=0, description="initial LayerScale gain (published 1e-5, which takes thousands of steps to open)"
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="share of samples that skip a residual branch (published 0.3 to 0.4)"
    )

    @property
    def hidden(self) -> int:
        """Hidden width of a feed-forward layer: 4 x dim; for swiglu two thirds of that, rounded up to a multiple of
        8.
        """
        return 4 * self.dim if self.ffn == "mlp" else (int(4 * self.dim * 2 / 3) + 7) // 8 * 8

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        return under(values, SIZES[size]) if isinstance(size, str) and size in SIZES else values

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads")
        return self


class CropsConfig(Strict):
    """Multi-crop augmentation (DINOv2, appendix B; values of the released training code)."""

    global_size: int = Field(64, ge=4, description="side of the 2 global crops, pixels (published 224)")
    local_size: int = Field(32, ge=4, description="side of a local crop, pixels (published 96 or 98)")
    local_count: int = Field(4, ge=0, description="local crops per image (published 8)")
    global_scale: Range = Field(
        (0.32, 1.0), description="area of a global crop as a share of the image, minimum and maximum"
    )
    local_scale: Range = Field(
        (0.05, 0.32), description="area of a local crop as a share of the image, minimum and maximum"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    jitter: Fraction = Field(0.8, description="probability of color jitter")
    brightness: Fraction = Field(0.4, description="color jitter: brightness factor within 1 +- this")
    contrast: Fraction = Field(0.4, description="color jitter: contrast factor within 1 +- this")
    saturation: Fraction = Field(0.2, description="color jitter: saturation factor within 1 +- this")
    hue: float = Field(0.1, ge=0, le=0.5, description="color jitter: hue shift within +- this, in turns")
    grey: Fraction = Field(0.2, description="probability of turning a crop gray")
    solarise: Fraction = Field(0.2, description="probability of solarizing the second global crop at 128 of 255")
    blur: tuple[Fraction, Fraction, Fraction] = Field(
        (0.0, 0.9, 0.5),
        description="probability of blur: first global, second global and local crops. The defaults are those of the "
        "released checkpoints; the paper's nominal values are 1.0, 0.1, 0.5",
    )
    blur_sigma: Range = Field(
        (0.1, 0.6),
        description="standard deviation of the blur in pixels, minimum and maximum (published 0.1 to 2 at 224 px)",
    )

    distort: Literal["loader", "device"] = Field(
        "loader",
        description="where crops are mirrored, jittered and blurred: in the loader's processes, or many at once on "
        "the device (for GPUs that would wait)",
    )

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for name in ("global_scale", "local_scale", "blur_sigma"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"{name} ({least}, {most}): the minimum must not exceed the maximum")
        if max(self.global_scale[1], self.local_scale[1]) > 1:
            raise ValueError("global_scale and local_scale are shares of the image: at most 1")
        return self


class HeadsConfig(Strict):
    """Projection heads (DINOv2, section 4; table 16)."""

    prototypes: int = Field(1024, ge=2, description="K, number of scores of a head (published 65,536 or 131,072)")
    hidden: int = Field(256, ge=1, description="width of the two hidden layers, channels (published 2048)")
    dino_bottleneck: int = Field(
        64, ge=1, description="width before the prototypes of the DINO head (published 256 or 384)"
    )
    ibot_bottleneck: int = Field(64, ge=1, description="width before the prototypes of the iBOT head (published 256)")
    tied: bool = Field(False, description="use one head for CLS and patches (as the published short recipe does)")

    @model_validator(mode="after")
    def _tied_heads_agree(self) -> Self:
        if self.tied and self.dino_bottleneck != self.ibot_bottleneck:
            raise ValueError(
                f"tied heads have one bottleneck, not {self.dino_bottleneck} and {self.ibot_bottleneck}: "
                "set dino_bottleneck and ibot_bottleneck to the same value, or tied: false"
            )
        return self


class MaskingConfig(Strict):
    """Block masking of global crops for the iBOT term (Zhou et al. 2021, arXiv:2111.07832)."""

    probability: Fraction = Field(0.5, description="share of global crops that are masked")
    ratio: tuple[Fraction, Fraction] = Field(
        (0.1, 0.5), description="masked share of a masked crop's patches, minimum and maximum"
    )

    @model_validator(mode="after")
    def _ratio_ascends(self) -> Self:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio {self.ratio}: the minimum must not exceed the maximum")
        return self


class LossesConfig(Strict):
    """Weights of the loss terms (DINOv2, section 4)."""

    dino: float = Field(1.0, ge=0, description="weight of the image-level term")
    ibot: float = Field(1.0, ge=0, description="weight of the patch-level term")
    koleo: float = Field(0.1, ge=0, description="weight of the KoLeo term for each global crop that has one")
    student_temperature: float = Field(0.1, ge=0.02, description="temperature of the student's softmax")
    centering: Literal["sinkhorn", "softmax"] = Field(
        "sinkhorn",
        description="how the teacher's targets are centered to prevent collapse: Sinkhorn-Knopp, or "
        "softmax with a moving mean",
    )
    sinkhorn_iterations: int = Field(3, ge=1, description="iterations of Sinkhorn-Knopp centering of the teacher")
    center_momentum: Fraction = Field(
        0.9, description="share of the moving mean kept at each step (centering: softmax)"
    )
    koleo_crops: Literal[1, 2] = Field(
        2, description="number of global crops with a KoLeo term (paper: 1, the first; released code: 2)"
    )


class TeacherConfig(Strict):
    """The exponential moving average of the student, and the temperature of its targets."""

    temperature_start: float = Field(0.04, ge=0.02, description="temperature of the teacher's softmax at step 0")
    temperature_end: float = Field(0.07, ge=0.02, description="temperature after the warm-up")
    temperature_warmup: Fraction = Field(0.3, description="length of the linear warm-up, share of steps")
    momentum_start: Fraction = Field(
        0.98, description="share of the teacher kept at step 0 (published 0.992 or 0.994, for longer runs)"
    )
    momentum_end: Fraction = Field(1.0, description="share of the teacher kept at the last step; cosine in between")


class OptimiserConfig(Strict):
    """AdamW with betas 0.9 and 0.999 (DINOv2, table 16)."""

    base_lr: float = Field(
        4e-3, gt=0, description="learning rate at batch 1024; the rate used is base_lr * sqrt(batch / 1024)"
    )
    final_lr: float = Field(1e-6, ge=0, description="learning rate at the last step; cosine in between")
    warmup: Fraction = Field(0.1, description="linear warm-up of the learning rate, share of steps")
    weight_decay_start: float = Field(0.04, ge=0, description="decoupled weight decay at step 0")
    weight_decay_end: float = Field(0.2, ge=0, description="decoupled weight decay at the end; cosine in between")
    layer_decay: float = Field(0.9, gt=0, le=1, description="learning-rate factor per block, from the last block down")
    patch_embed_lr: float = Field(0.2, gt=0, description="learning-rate factor of the patch embedding")
    freeze_last_layer: Fraction = Field(0.01, description="share of steps during which the prototypes are frozen")
    clip_norm: float = Field(3.0, gt=0, description="maximum gradient norm of each submodule (backbone, each head)")


class WeightsConfig(Strict):
    """A backbone to start from."""

    path: str = Field(
        description="released DINOv2 weights (.pth), or a folder with model.safetensors and config.json; `model` "
        "must have their architecture"
    )

    @model_validator(mode="after")
    def _on_this_machine(self) -> Self:
        if "://" in self.path:
            raise ValueError(f"path {self.path} is a URL: download the file and give its local path")
        return self


class CacheConfig(Strict):
    """A local disk for shards in a remote store."""

    folder: str = Field(
        description="folder on every machine for copies of whole shards, shared by all of its processes"
    )
    size_gb: float = Field(
        gt=0,
        description="maximum size in GiB; if the shards are larger, an epoch is shuffled in blocks of shards of half "
        "that size",
    )

    @model_validator(mode="after")
    def _on_this_machine(self) -> Self:
        if "://" in self.folder:
            raise ValueError(f"folder {self.folder} is a URL: give a folder on a local disk of the training machines")
        return self


class FinishConfig(Strict):
    """A last stage at a higher resolution that continues with the trained student and teacher (DINOv2, section 5)."""

    global_size: int = Field(518, ge=4, description="side of the 2 global crops, pixels")
    local_size: int | None = Field(None, ge=4, description="side of a local crop, pixels [default: as before]")
    steps: int = Field(10_000, ge=1, description="optimizer steps; all schedules are compressed to this length")
    batch: int | None = Field(None, ge=2, description="images per step, over all workers [default: as before]")
    base_lr: float | None = Field(
        None,
        gt=0,
        description="learning rate at batch 1024 [default: a tenth of the rate before (the paper reduces it without "
        "giving a value)]",
    )


class DistillConfig(Strict):
    """A smaller model that learns from the trained, frozen one (DINOv2, section 5).

    No patch is hidden, no sample skips a branch, and the patch-level term covers all patches of both global crops.
    """

    model: ModelConfig = Field(
        description="the smaller Vision Transformer; patch size, registers and LayerScale default to the teacher's"
    )
    steps: int = Field(ge=1, description="optimiser steps")
    batch: int | None = Field(None, ge=2, description="images per step, over all workers [default: the teacher's]")
    base_lr: float = Field(
        1e-3, gt=0, description="learning rate at batch 1024; the rate used is base_lr * sqrt(batch / 1024)"
    )

    @model_validator(mode="after")
    def _no_sample_skips(self) -> Self:
        if self.model.drop_path:
            raise ValueError(f"model.drop_path {self.model.drop_path}: distillation does not use drop_path: remove it")
        return self


class TrainingConfig(Strict):
    """One training run, and the stages that follow it."""

    recipe: Literal["tiny", "short", "long"] = Field(
        "tiny", description="the set of defaults: tiny suits two CPU cores; short and long are DINOv2's"
    )
    steps: int = Field(1000, ge=1, description="optimizer steps; 300 to 1,500 suit tiny")
    batch: int = Field(32, ge=2, description="images per step, over all workers")
    seed: int = Field(0, ge=0, description="seed of initialization, order, crops, masks and stochastic depth")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of forward passes; weights stay fp32")
    workers: int | None = Field(
        None, ge=1, description="data-parallel processes [default: as many as the budget allows]"
    )
    fsdp: bool = Field(
        False,
        description="each worker holds a share of the weights, means and optimizer states, for models too large for "
        "one worker",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of storing them"
    )
    loader_processes: int = Field(
        0, ge=0, description="processes per worker that decode and crop ahead; 0: the worker does it itself"
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="largest image that is decoded, in pixels; larger ones are skipped"
    )
    cache: CacheConfig | None = Field(
        None, description="a local disk for shards in a remote store [default: images are read from the store]"
    )
    mix: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="how often an epoch shows each image of a curated set, for example 0.5 or 3 times; once for sets "
        "that are not listed",
    )
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",),
        description="where metrics go besides metrics.jsonl; mlflow and wandb are set up by their own environment "
        "variables, and are extras",
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints kept on disk")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the Vision Transformer")
    crops: CropsConfig = Field(default_factory=CropsConfig, description="augmentation")
    heads: HeadsConfig = Field(default_factory=HeadsConfig, description="projection heads")
    masking: MaskingConfig = Field(default_factory=MaskingConfig, description="block masking")
    losses: LossesConfig = Field(default_factory=LossesConfig, description="loss weights and temperatures")
    teacher: TeacherConfig = Field(
        default_factory=TeacherConfig, description="moving average of the student and its targets"
    )
    optimiser: OptimiserConfig = Field(default_factory=OptimiserConfig, description="AdamW and its schedules")

    objective: Annotated[SerializeAsAny[ObjectiveConfig] | None, by_kind(OBJECTIVES, objectives.DEFAULT)] = Field(
        None,
        description="what the network is trained to do, {kind: NAME, ...}; none: DINOv2, whose settings are heads, masking, losses and teacher",
    )
    backbone: Annotated[SerializeAsAny[BackboneConfig] | None, by_kind(BACKBONES, backbones.DEFAULT)] = Field(
        None,
        description="another network in place of the Vision Transformer, {kind: NAME, ...}; `model` is not used then",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="number of consecutive worker losses without a checkpoint in between before the run stops; each "
        "loss costs at most checkpoint_every steps",
    )
    weights: WeightsConfig | None = Field(None, description="a backbone to start from [default: from scratch]")
    finish: FinishConfig | None = Field(None, description="a last stage at a higher resolution [default: none]")
    distill: DistillConfig | None = Field(
        None, description="a smaller model that learns from the finished one [default: none]"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        recipe = values.get("recipe")
        if isinstance(recipe, str) and recipe in RECIPES:
            values = under(values, RECIPES[recipe])
        model, distill = values.get("model"), values.get("distill")
        if isinstance(model, dict) and isinstance(distill, dict) and isinstance(distill.get("model"), dict):
            shared = {name: model[name] for name in ("patch_size", "registers", "layerscale") if name in model}
            values = {**values, "distill": {**distill, "model": under(distill["model"], shared)}}
        return values

    @property
    def network(self) -> Architecture:
        """The settings of the backbone."""
        return self.model if self.backbone is None else self.backbone

    @model_validator(mode="after")
    def _crops_are_whole_patches(self) -> Self:
        for name in ("global_size", "local_size"):
            size, patch = getattr(self.crops, name), self.network.patch_size
            if size % patch:
                near = max(patch, round(size / patch) * patch)
                raise ValueError(f"crops.{name} {size} is not a multiple of patch_size {patch}: use {near}")
        return self

    @model_validator(mode="after")
    def _backbone_takes_the_crops(self) -> Self:
        if self.backbone is None:
            return self
        used = [name for name in ("weights", "distill") if getattr(self, name) is not None]
        if used:
            raise ValueError(f"{used[0]} is for the Vision Transformer alone: remove it, or `backbone`")
        if self.activation_checkpointing:
            raise ValueError(f"activation_checkpointing: the backbone {self.backbone.kind} has none: remove it")
        if not kind_of(self.backbone).any_size:
            crops, finish = self.crops, self.finish
            if crops.local_count and crops.local_size != crops.global_size:
                raise ValueError(
                    f"the backbone {self.backbone.kind} takes images of one size: set crops.local_size to {crops.global_size}, or "
                    "crops.local_count to 0"
                )
            if finish is not None and finish.global_size != crops.global_size:
                raise ValueError(
                    f"the backbone {self.backbone.kind} takes images of one size: set finish.global_size to {crops.global_size}"
                )
        return self

    @model_validator(mode="after")
    def _distills_dinov2(self) -> Self:
        if self.distill is not None and self.objective is not None:
            raise ValueError(
                f"distill needs the heads of DINOv2, not those of {self.objective.kind}: remove distill, or objective"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        for name, derived in (("finish", finishing), ("distill", distilling)):
            if getattr(self, name) is not None:
                try:
                    derived(self)
                except ValidationError as error:
                    raise ValueError("; ".join(f"{name}: {detail['msg']}" for detail in error.errors())) from None
        if self.distill is not None and self.distill.model.patch_size != self.model.patch_size:
            raise ValueError(
                f"distill: patches of {self.distill.model.patch_size} pixels cannot learn from patches of "
                f"{self.model.patch_size} pixels: use distill.model.patch_size {self.model.patch_size}"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> Self:
        """Every worker gets the same number of images, and at least two: the feature metrics need two."""
        if self.workers is not None and (self.batch % self.workers or self.batch // self.workers < 2):
            fitting = max(n for n in range(1, self.workers) if n == 1 or (self.batch % n == 0 and self.batch // n >= 2))
            raise ValueError(
                f"workers {self.workers} cannot share a batch of {self.batch} evenly with at least two images each: "
                f"use workers {fitting}, or batch {2 * self.workers}"
            )
        return self


_EVERY_PATCH: dict[str, Any] = {"probability": 1.0, "ratio": (1.0, 1.0)}
ALONE: dict[str, Any] = {"weights": None, "finish": None, "distill": None}
_SPEED = (
    "workers",
    "cache",
    "fsdp",
    "activation_checkpointing",
    "loader_processes",
    "log_every",
    "trackers",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
)
_NOT_IDENTITY: dict[str, Any] = dict.fromkeys(("recipe", *_SPEED, *ALONE), True) | {"model": {"size"}}


def identity_of(config: TrainingConfig) -> dict[str, Any]:
    """The settings that two runs must share to be the same run.

    Left out are settings that only change speed or what is kept or written but never the weights (if a cache decides
    the order, the loop adds that to a checkpoint's identity), the stages before and after, and settings that only stand
    for other values (recipe, size). A run may continue with another number of workers: batches and losses stay the
    same, but not the last bits of the weights nor, with `drop_path`, which samples of a batch skip a branch.
    """
    without = dict(_NOT_IDENTITY)
    if not config.mix:
        without["mix"] = True
    if config.objective is None:
        without["objective"] = True
    without["backbone" if config.backbone is None else "model"] = True
    return config.model_dump(mode="json", exclude=without)


def finishing(config: TrainingConfig) -> TrainingConfig:
    """The run that `config.finish` describes, which must be set.

    Raises:
        pydantic.ValidationError: it does not fit `config`.
    """
    if config.finish is None:
        raise ValueError("config.finish is not set")
    finish = config.finish
    crops = config.crops.model_dump() | {"global_size": finish.global_size}
    if finish.local_size is not None:
        crops["local_size"] = finish.local_size
    optimiser = config.optimiser.model_dump() | {"base_lr": finish.base_lr or config.optimiser.base_lr / 10}
    return _derived(config, steps=finish.steps, batch=finish.batch or config.batch, crops=crops, optimiser=optimiser)


def distilling(config: TrainingConfig) -> TrainingConfig:
    """The run of the smaller model that `config.distill` describes, which must be set.

    Raises:
        pydantic.ValidationError: it does not fit `config`.
    """
    if config.distill is None:
        raise ValueError("config.distill is not set")
    optimiser = config.optimiser.model_dump() | {"base_lr": config.distill.base_lr}
    return _derived(
        config,
        steps=config.distill.steps,
        batch=config.distill.batch or config.batch,
        model=config.distill.model.model_dump(),
        optimiser=optimiser,
        masking=_EVERY_PATCH,
    )


def recovering(config: TrainingConfig, steps: int, batch: int | None, base_lr: float, distil: bool) -> TrainingConfig:
    """The run that continues with the pruned networks of `config`; distil: the dense model is frozen and teaches.

    Raises:
        ValueError: the settings do not fit `config` (pydantic's), or that run hid every patch, as distillation does.
    """
    if not distil and config.masking.model_dump() == MaskingConfig.model_validate(_EVERY_PATCH).model_dump():
        raise ValueError(
            "the dense model was distilled and has no objective of its own to continue with: use `how: distill`"
        )
    if config.objective is not None or config.backbone is not None:
        raise ValueError(
            "only a Vision Transformer that DINOv2 trained can be trained again after pruning: remove `recover`"
        )
    optimiser = config.optimiser.model_dump() | {"base_lr": base_lr}
    changed: dict[str, Any] = {"steps": steps, "batch": batch or config.batch, "mix": {}, "optimiser": optimiser}
    if distil:
        changed |= {"model": config.model.model_dump() | {"drop_path": 0.0}, "masking": _EVERY_PATCH}
    return _derived(config, **changed)


def _derived(config: TrainingConfig, **changed: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(config.model_dump() | ALONE | changed)
