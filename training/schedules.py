"""Values that change from step to step (DINOv2, table 16): plain functions of the step, so that resuming needs no
state.
"""

import math
from dataclasses import dataclass

from lodeset.training.config import TrainingConfig


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one step."""

    lr: float
    prototypes_lr: float  # 0 while the prototypes are frozen
    weight_decay: float
    momentum: float
    teacher_temperature: float


def step_values(config: TrainingConfig, step: int) -> StepValues:
    """Scheduled values at `step`, counted from 0 to config.steps - 1."""
    steps, optimiser, teacher = config.steps, config.optimiser, config.teacher
    peak = optimiser.base_lr * math.sqrt(config.batch / 1024)
    warmup = round(optimiser.warmup * steps)
    if step < warmup:
        lr = linear(step, warmup, 0.0, peak)
    else:
        lr = cosine(step - warmup, steps - warmup, peak, optimiser.final_lr)
    return StepValues(
        lr=lr,
        prototypes_lr=0.0 if step < round(optimiser.freeze_last_layer * steps) else lr,
        weight_decay=cosine(step, steps, optimiser.weight_decay_start, optimiser.weight_decay_end),
        momentum=cosine(step, steps, teacher.momentum_start, teacher.momentum_end),
        teacher_temperature=linear(
            step, round(teacher.temperature_warmup * steps), teacher.temperature_start, teacher.temperature_end
        ),
    )


def linear(step: int, length: int, start: float, end: float) -> float:
    """From `start` at step 0 linearly to `end` at step `length`, then constant."""
    return end if step >= length else start + (end - start) * step / length


def cosine(step: int, length: int, start: float, end: float) -> float:
    """From `start` at step 0 along half a cosine to `end` at step `length`, then constant."""
    return end if step >= length else end + (start - end) * (1 + math.cos(math.pi * step / length)) / 2
