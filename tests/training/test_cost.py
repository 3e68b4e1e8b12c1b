"""What plans are told of a run, against the run itself."""

from pathlib import Path

import pytest

from lodeset.training import cost
from lodeset.training.checkpoint import save_checkpoint
from lodeset.training.config import TrainingConfig
from lodeset.training.export import WEIGHTS, export
from lodeset.training.ssl import fresh, make_optimiser, training_state


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"heads": {"tied": True}, "model": {"registers": 4, "depth": 2}},
        {"model": {"ffn": "swiglu", "dim": 192, "heads": 3, "patch_size": 16}},
    ],
)
def test_bytes_are_those_that_are_written(tmp_path: Path, knobs: dict[str, object]) -> None:
    config = TrainingConfig.model_validate({"steps": 5, "checkpoint_every": 2, "keep_checkpoints": 2, **knobs})
    nets = fresh(config)
    state = training_state(nets, make_optimiser(nets.student, config.optimiser))
    for step in (2, 4, 5):
        save_checkpoint(tmp_path, step, state, {}, config.keep_checkpoints)
    export(nets.average.backbone, tmp_path)
    written = sum(path.stat().st_size for path in (*tmp_path.glob("*/*.safetensors"), tmp_path / WEIGHTS))
    assert cost.stored_bytes(config) == pytest.approx(written, rel=0.05)


def test_time_follows_the_size_of_the_network_and_of_the_crops() -> None:
    tiny = cost.seconds_per_image(TrainingConfig())
    assert 1 / tiny == pytest.approx(cost.TINY_IMAGES_PER_S)
    wide = cost.seconds_per_image(TrainingConfig.model_validate({"model": {"dim": 256}}))
    deep = cost.seconds_per_image(TrainingConfig.model_validate({"model": {"depth": 8}}))
    large = cost.seconds_per_image(TrainingConfig.model_validate({"crops": {"global_size": 128, "local_count": 0}}))
    assert deep == pytest.approx(2 * tiny)
    assert 3.5 * tiny < wide < 4 * tiny
    assert large > 2 * tiny


def test_a_step_without_local_crops_is_four_forward_passes_over_each_of_two_crops() -> None:
    """Forward and backward are three, and the teacher's one more."""
    config = TrainingConfig.model_validate({"model": {"dim": 256}, "crops": {"global_size": 64, "local_count": 0}})
    assert cost.seconds_per_image(config) == pytest.approx(8 * cost.forward_seconds(config))
