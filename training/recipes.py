"""The published recipes of DINOv2 (arXiv:2304.07193, tables 16 and 17), as differences from the defaults of `tiny`.

Durations are shares of `steps`, whose defaults here are the published numbers: a shorter run compresses its schedules.
"""

from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "giant": {"dim": 1536, "depth": 40, "heads": 24},
}

_CROPS = {"global_size": 224, "local_count": 8, "blur_sigma": (0.1, 2.0)}

RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    # ViT-L/16 from scratch on ImageNet-22k: one day on 32 A100.
    "short": {
        "steps": 125_000,
        "batch": 2_048,
        "precision": "bf16",
        "loader_processes": 8,
        "log_every": 50,
        "checkpoint_every": 2_500,
        "model": {"size": "large", "patch_size": 16, "layerscale": 1e-5, "drop_path": 0.3},
        "crops": {**_CROPS, "local_size": 96},
        "heads": {"prototypes": 65_536, "hidden": 2_048, "dino_bottleneck": 256, "ibot_bottleneck": 256, "tied": True},
        "losses": {"centering": "softmax"},
        "teacher": {"temperature_warmup": 37_500 / 125_000, "momentum_start": 0.992},
        "optimiser": {
            "base_lr": 4e-3,
            "warmup": 12_500 / 125_000,
            "weight_decay_end": 0.4,
            "layer_decay": 0.9,
            "freeze_last_layer": 1_250 / 125_000,
        },
    },
    # ViT-L/14 and ViT-g/14 on LVD-142M.
    "long": {
        "steps": 625_000,
        "batch": 3_072,
        "precision": "bf16",
        "loader_processes": 8,
        "log_every": 50,
        "checkpoint_every": 2_500,
        "model": {"size": "large", "patch_size": 14, "ffn": "swiglu", "layerscale": 1e-5, "drop_path": 0.4},
        "crops": {**_CROPS, "local_size": 98},
        "heads": {
            "prototypes": 131_072,
            "hidden": 2_048,
            "dino_bottleneck": 384,
            "ibot_bottleneck": 256,
            "tied": False,
        },
        "teacher": {"temperature_warmup": 37_500 / 625_000, "momentum_start": 0.994},
        "optimiser": {
            "base_lr": 2e-4,
            "warmup": 100_000 / 625_000,
            "layer_decay": 1.0,
            "freeze_last_layer": 1_250 / 625_000,
        },
    },
}


def under(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`values` completed by `defaults`, at every depth."""
    merged = {**defaults, **values}
    for name, default in defaults.items():
        if isinstance(default, dict) and isinstance(values.get(name), dict):
            merged[name] = under(values[name], default)
    return merged
