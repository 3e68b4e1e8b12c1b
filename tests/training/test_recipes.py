"""The published recipes: their numbers, and that what a user says stands above them."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from lodeset.training.config import ModelConfig, TrainingConfig, distilling, finishing, identity_of
from lodeset.training.schedules import step_values
from lodeset.training.ssl import Network


def test_short_is_the_published_recipe() -> None:
    short = TrainingConfig(recipe="short")
    assert (short.steps, short.batch, short.precision) == (125_000, 2_048, "bf16")
    assert (short.model.dim, short.model.depth, short.model.heads, short.model.patch_size) == (1024, 24, 16, 16)
    assert short.heads.tied and short.heads.prototypes == 65_536 and short.losses.centering == "softmax"
    assert (short.crops.global_size, short.crops.local_size, short.crops.local_count) == (224, 96, 8)
    peak = step_values(short, 12_500)
    assert peak.lr == pytest.approx(4e-3 * 2**0.5)
    assert peak.prototypes_lr == peak.lr and step_values(short, 1_249).prototypes_lr == 0
    assert step_values(short, 1_250).prototypes_lr > 0
    assert step_values(short, 37_500).teacher_temperature == 0.07 and step_values(short, 0).momentum == 0.992
    assert step_values(short, 18_750).teacher_temperature == pytest.approx(0.055)


def test_long_is_the_published_recipe() -> None:
    long = TrainingConfig(recipe="long")
    assert (long.steps, long.batch, long.model.patch_size, long.model.ffn) == (625_000, 3_072, 14, "swiglu")
    assert (long.heads.dino_bottleneck, long.heads.ibot_bottleneck, long.heads.tied) == (384, 256, False)
    assert long.losses.centering == "sinkhorn" and long.crops.local_size == 98
    assert step_values(long, 100_000).lr == pytest.approx(2e-4 * 3**0.5)
    assert step_values(long, 0).momentum == 0.994 and long.optimiser.layer_decay == 1.0
    assert (long.optimiser.weight_decay_start, long.optimiser.weight_decay_end) == (0.04, 0.2)


def test_what_is_said_stands_above_the_recipe_at_every_depth() -> None:
    config = TrainingConfig.model_validate(
        {
            "recipe": "short",
            "batch": 64,
            "model": {"size": "small"},
            "heads": {"prototypes": 4_096},
            "crops": {"flip": 0.0},
        }
    )
    assert (config.batch, config.steps) == (64, 125_000)
    assert (config.model.dim, config.model.depth, config.model.heads) == (384, 12, 6)
    assert config.model.drop_path == 0.3 and config.model.layerscale == 1e-5
    assert config.heads.prototypes == 4_096 and config.heads.hidden == 2_048
    assert config.crops.flip == 0 and config.crops.blur_sigma == (0.1, 2.0)
    spelled = TrainingConfig.model_validate({**config.model_dump(), "recipe": "long"})
    assert identity_of(spelled) == identity_of(config)  # names of defaults are no part of what a run is
    again = TrainingConfig.model_validate(config.model_dump(mode="json"))
    assert again == config  # what a worker is sent


def test_the_defaults_are_tiny() -> None:
    tiny = TrainingConfig()
    assert (tiny.recipe, tiny.steps, tiny.batch, tiny.model.dim, tiny.model.depth) == ("tiny", 1000, 32, 128, 4)
    for wrong in ({"recipe": ["short"]}, {"model": {"size": ["small"]}}):
        with pytest.raises(ValidationError):
            TrainingConfig.model_validate(wrong)
    assert ModelConfig(size="base").dim == 768 and ModelConfig(size="base", dim=96).dim == 96


def test_the_published_heads_have_their_shapes() -> None:
    with torch.device("meta"):
        long = Network(TrainingConfig.model_validate({"recipe": "long", "model": {"depth": 1}}))
    assert long.dino_head.prototypes.shape == (131_072, 384) and long.ibot_head.prototypes.shape == (131_072, 256)
    assert long.backbone.blocks[0].mlp.w12.weight.shape == (5_472, 1_024)


def test_the_guide_shows_a_recipe_that_keeps_its_settings() -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/training.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)]
    (shown,) = (block["training"] for block in blocks if block.get("training", {}).get("weights"))
    config = TrainingConfig.model_validate(shown)
    assert config.model.layerscale == finishing(config).model.layerscale == distilling(config).model.layerscale == 1e-5
    assert distilling(config).model.registers == 4 and finishing(config).crops.global_size == 518
