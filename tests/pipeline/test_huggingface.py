"""Models of transformers as embedders: tiny ones with random weights, saved here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import pixels
from PIL import Image

from lodeset.pipeline.config import CurationConfig, load
from lodeset.pipeline.embedders import hub, preprocess
from lodeset.pipeline.embedders.config import HuggingFaceEmbedder
from lodeset.pipeline.embedders.huggingface import extra_tokens, huggingface, recipe_of
from lodeset.pipeline.embedders.models import identity, name_of, pinned
from lodeset.pipeline.errors import LodesetError
from lodeset.training.config import ModelConfig
from lodeset.training.export import export
from lodeset.training.vit import DinoVisionTransformer

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DINO_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `dino` (28 pixels, patches of 14) and `vit` (32 pixels, patches of 8)."""
    folder = tmp_path_factory.mktemp("models")
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=28, patch_size=14))
    vit = transformers.ViTModel(
        transformers.ViTConfig(**SIZES, intermediate_size=32, image_size=32, patch_size=8, initializer_range=0.2)
    )
    for name, model in (("dino", dino), ("vit", vit)):
        model.eval().save_pretrained(folder / name)
    return folder


def of(folder: Path, **knobs: Any) -> HuggingFaceEmbedder:
    return HuggingFaceEmbedder(kind="huggingface", model=str(folder), **knobs)


def images(count: int, width: int = 48, height: int = 40) -> list[Image.Image]:
    return [Image.fromarray(pixels(i, width=width, height=height)) for i in range(count)]


def fed(folder: Path, config: HuggingFaceEmbedder, count: int = 3) -> torch.Tensor:
    """What the embedder gives its network."""
    ((_, batch),) = preprocess.inputs(images(count), recipe_of(folder, config))
    return torch.from_numpy(batch)


@pytest.mark.parametrize("name", ["dino", "vit"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_vectors_are_those_of_the_model(models: Path, name: str, pooling: Any) -> None:
    config = of(models / name, pooling=pooling)
    model = transformers.AutoModel.from_pretrained(models / name).eval()
    with torch.inference_mode():
        out = model(pixel_values=fed(models / name, config))
    expected = {
        "cls": out.last_hidden_state[:, 0],
        "mean": out.last_hidden_state[:, 1:].mean(dim=1),
        "pooler": out.pooler_output,
    }[pooling]
    np.testing.assert_allclose(huggingface(config, 1)(images(3)), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "vit"])
def test_another_size_interpolates_positions(models: Path, name: str) -> None:
    config = of(models / name, size=56)
    model = transformers.AutoModel.from_pretrained(models / name).eval()
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    with torch.inference_mode():
        out = model(pixel_values=fed(models / name, config), **options)
    assert out.last_hidden_state.shape[1] == 1 + {"dino": 16, "vit": 49}[name]
    found = huggingface(config, 1)(images(3))
    np.testing.assert_allclose(found, out.last_hidden_state[:, 0].numpy(), atol=1e-5)
    assert identity(config) != identity(of(models / name))


@pytest.mark.parametrize("registers", [0, 3])
def test_an_exported_checkpoint_gives_the_features_of_its_model(tmp_path: Path, registers: int) -> None:
    torch.manual_seed(0)
    model = DinoVisionTransformer(ModelConfig(patch_size=8, dim=32, depth=2, heads=2, registers=registers), 32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    export(model, tmp_path / "export")
    config = of(tmp_path / "export")
    batch = fed(tmp_path / "export", config)
    assert batch.shape == (3, 3, 32, 32)
    with torch.inference_mode():
        expected = model(batch)
    np.testing.assert_allclose(huggingface(config, 1)(images(3)), expected.cls.numpy(), atol=1e-3)
    mean = huggingface(of(tmp_path / "export", pooling="mean"), 1)(images(3))
    np.testing.assert_allclose(mean, expected.patches.mean(dim=1).numpy(), atol=1e-3)


def test_sixteen_bits_stay_close_and_are_another_embedder(models: Path) -> None:
    exact = huggingface(of(models / "dino"), 1)(images(4))
    for dtype, cosine in (("bf16", 0.999), ("fp16", 0.99999)):
        config = of(models / "dino", dtype=dtype)
        found = huggingface(config, 1)(images(4))
        assert found.dtype == np.float32 and (found != exact).any()
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
        assert ((found * exact).sum(axis=1) / lengths).min() > cosine
        assert identity(config) != identity(of(models / "dino"))


# -- preprocessing


@pytest.mark.parametrize("crop", [True, False])
def test_images_are_prepared_as_transformers_does(tmp_path: Path, crop: bool) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    said = dict(DINO_PROCESSOR)
    if not crop:
        said |= {"size": {"height": 28, "width": 28}, "do_center_crop": False}
        del said["crop_size"]
    (tmp_path / hub.PREPROCESSOR).write_text(json.dumps(said))
    theirs = BitImageProcessorPil(**said)
    for width, height in ((48, 40), (37, 91), (28, 28)):
        given = images(2, width, height)
        ((_, found),) = preprocess.inputs(given, recipe_of(tmp_path, of(tmp_path)))
        expected = theirs(given, return_tensors="np")["pixel_values"]
        difference = np.abs(found - expected) * 255 * 0.224  # levels of 8 bits; the box of a crop rounds otherwise
        assert difference.max() < 2.5 and difference.mean() < 0.2


def test_size_keeps_the_margin_of_the_crop(tmp_path: Path) -> None:
    (tmp_path / hub.PREPROCESSOR).write_text(json.dumps(DINO_PROCESSOR))
    recipe = recipe_of(tmp_path, of(tmp_path, size=56))
    assert (recipe.resize, recipe.side, recipe.scaled) == ("crop", 56, 72)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"do_pad": True}, "do_pad = True is not supported"),
        ({"crop_pct": 0.875}, "crop_pct"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"size": {"longest_edge": 36}}, r"size = \{'longest_edge': 36\}"),
        ({"crop_size": {"height": 28, "width": 14}}, "crop_size"),
        ({"crop_size": 99}, "larger than the image"),
        ({"resample": 1}, "resample = 1"),
        ({"image_mean": None, "do_normalize": True}, "image_mean"),
    ],
)
def test_preprocessing_that_is_not_known_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    (tmp_path / hub.PREPROCESSOR).write_text(json.dumps(DINO_PROCESSOR | change))
    with pytest.raises(LodesetError, match=told):
        recipe_of(tmp_path, of(tmp_path))


# -- what it is


def test_a_copy_of_the_folder_is_the_same_embedder(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dino", tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("hello")
    before = identity(of(models / "dino"))
    assert identity(of(tmp_path / "copy", batch=7)) == before
    assert set(before["files"]) == {"config.json", "model.safetensors"}
    (tmp_path / "copy" / hub.PREPROCESSOR).write_text(json.dumps(DINO_PROCESSOR))
    assert identity(of(tmp_path / "copy")) != before


def test_a_model_of_the_cache_is_pinned_to_its_commit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(models / "dino", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    offline(monkeypatch, tmp_path)
    written = HuggingFaceEmbedder(kind="huggingface", model="someone/tiny")
    config = pinned(written)
    assert name_of(config) == f"someone/tiny@{commit}"
    assert identity(config) == identity(of(models / "dino"))
    np.testing.assert_array_equal(huggingface(config, 1)(images(2)), huggingface(of(models / "dino"), 1)(images(2)))


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_folder_is_relative_to_the_configuration_and_a_name_is_not(models: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    for written, expected in (
        ("exports", str(tmp_path / "exports")),
        ("./absent", str(tmp_path / "absent")),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
    ):
        file = tmp_path / "lodeset.yaml"
        file.write_text(f"pool: [x.tar]\nembed: {{semantic: {{kind: huggingface, model: {written}}}}}\n")
        semantic = load(CurationConfig, file).embed.semantic
        assert isinstance(semantic, HuggingFaceEmbedder) and semantic.model == expected


# -- what cannot be used


def test_a_model_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(LodesetError, match=r"no folder someone/tiny.*hf download someone/tiny"):
        identity(HuggingFaceEmbedder(kind="huggingface", model="someone/tiny"))
    with pytest.raises(LodesetError, match="no model folder at"):
        identity(of(tmp_path / "absent"))


def test_a_folder_has_no_revision(models: Path) -> None:
    with pytest.raises(LodesetError, match="no revision main"):
        identity(of(models / "dino", revision="main"))


def test_folders_that_hold_no_model(models: Path, tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match=r"has no config\.json"):
        identity(of(tmp_path))
    shutil.copy(models / "dino/config.json", tmp_path)
    with pytest.raises(LodesetError, match=r"has no model\.safetensors\. Convert"):
        identity(of(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(LodesetError, match=r"only pytorch_model\.bin: pickles.*refused"):
        huggingface(of(tmp_path), 1)
    (tmp_path / hub.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret", "b": "part-2.safetensors"}}))
    with pytest.raises(LodesetError, match=r"lacks \.\./secret, part-2\.safetensors"):
        identity(of(tmp_path))
    (tmp_path / hub.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(LodesetError, match="is not a model that transformers can load"):
        huggingface(of(tmp_path), 1)


def test_code_in_a_model_is_not_run(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dino", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(LodesetError, match="without running its code"):
        huggingface(of(tmp_path / "model"), 1)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_there_are_not_drawn_at_random(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "vit", tmp_path / "model")
    weights = load_file(tmp_path / "model" / hub.WEIGHTS)
    without = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(without, tmp_path / "model" / hub.WEIGHTS, metadata={"format": "pt"})
    assert huggingface(of(tmp_path / "model"), 1)(images(2)).shape == (2, 16)  # cls does not read the pooler
    with pytest.raises(LodesetError, match="has no pooler: use `pooling: cls`"):
        huggingface(of(tmp_path / "model", pooling="pooler"), 1)
    del without[next(name for name in without if "attention" in name)]
    save_file(without, tmp_path / "model" / hub.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LodesetError, match="lacks 1 of the weights of ViTModel"):
        huggingface(of(tmp_path / "model"), 1)


def test_a_model_of_words_is_refused(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=16, vocab_size=9)).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / hub.CONFIG).read_text()) | {"image_size": 8}
    (tmp_path / hub.CONFIG).write_text(json.dumps(config))
    with pytest.raises(LodesetError, match="BertModel, which takes input_ids"):
        huggingface(of(tmp_path), 1)


def test_a_network_without_a_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], image_size=32)
    model = transformers.ConvNextModel(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(LodesetError, match="no class token: use `pooling: mean` or `pooler`"):
        huggingface(of(tmp_path), 1)
    with torch.inference_mode():
        out = model(pixel_values=fed(tmp_path, of(tmp_path)))
    assert out.last_hidden_state.shape == (3, 8, 4, 4)
    found = huggingface(of(tmp_path, pooling="mean"), 1)(images(3))
    np.testing.assert_allclose(found, out.last_hidden_state.mean(dim=(2, 3)).numpy(), atol=1e-5)
    pooled = huggingface(of(tmp_path, pooling="pooler"), 1)(images(3))
    np.testing.assert_allclose(pooled, out.pooler_output.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "side", "said", "expected"),
    [
        (257, 224, {"patch_size": 14}, 1),
        (261, 224, {"patch_size": 14, "num_register_tokens": 4}, 5),
        (256, 224, {"patch_size": 14}, 0),
        (198, 224, {"patch_size": (16, 16)}, 2),
        (49, 224, {"patch_size": 4}, 0),  # Swin merges patches
        (50, 224, {}, 1),
        (201, 224, {}, 5),
        (196, 224, {"patch_size": None}, 0),
    ],
)
def test_tokens_that_are_no_patches_are_counted(tokens: int, side: int, said: dict[str, Any], expected: int) -> None:
    assert extra_tokens(tokens, side, SimpleNamespace(**said)) == expected


TINY = {"intermediate_size": 32, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}


@pytest.mark.parametrize(
    ("kind", "first", "has_class"),
    [
        ("DeiT", 2, True),  # a token for distillation
        ("SiglipVision", 0, False),
        ("ViTMSN", 1, True),
        ("IJepa", 0, False),
        ("DINOv3ViT", 4, True),
        ("Dinov2WithRegisters", 4, True),
        ("CLIPVision", 1, True),
        ("Swin", 0, False),
    ],
)
def test_class_tokens_whatever_they_are_called(tmp_path: Path, kind: str, first: int, has_class: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, **TINY} | ({"num_register_tokens": 3} if kind.lower().startswith("dino") else {})
    if kind == "Swin":
        sizes = {
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 1],
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
        }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        tokens = model(pixel_values=fed(tmp_path, of(tmp_path))).last_hidden_state
    found = huggingface(of(tmp_path, pooling="mean"), 1)(images(3))
    np.testing.assert_allclose(found, tokens[:, first:].mean(dim=1).numpy(), atol=1e-4)
    if has_class:
        np.testing.assert_allclose(huggingface(of(tmp_path), 1)(images(3)), tokens[:, 0].numpy(), atol=1e-4)
    else:
        with pytest.raises(LodesetError, match="has no class token"):
            huggingface(of(tmp_path), 1)


@pytest.mark.parametrize(
    ("ratio", "pooling", "told"),
    [(0.75, "cls", "another vector each time.*mask_ratio"), (0.0, "pooler", "no pooler_output: use `pooling: cls`")],
)
def test_a_masked_autoencoder(tmp_path: Path, ratio: float, pooling: Any, told: str) -> None:
    config = transformers.ViTMAEConfig(
        **SIZES, intermediate_size=32, image_size=32, patch_size=8, mask_ratio=ratio, initializer_range=0.2
    )
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    with pytest.raises(LodesetError, match=told):
        huggingface(of(tmp_path, pooling=pooling), 1)


def test_a_size_that_no_patch_divides(models: Path) -> None:
    with pytest.raises(LodesetError, match=r"size 40 is not a multiple of its patch size 14.*28"):
        huggingface(of(models / "dino", size=40), 1)


def test_without_transformers(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LodesetError, match=r"pip install -e '\.\[hf\]'"):
        huggingface(of(models / "dino"), 1)
