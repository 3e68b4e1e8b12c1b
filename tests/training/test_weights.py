"""Weights of others: released checkpoints by name, folders, what is refused; and a model's ONNX form."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from lodeset.pipeline.embedders.config import HuggingFaceEmbedder, OnnxEmbedder
from lodeset.pipeline.embedders.huggingface import recipe_of
from lodeset.pipeline.embedders.onnx import onnx, opened
from lodeset.pipeline.embedders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Recipe, normalised
from lodeset.pipeline.errors import LodesetError
from lodeset.training.config import ModelConfig, TrainingConfig, WeightsConfig
from lodeset.training.export import export, load_backbone
from lodeset.training.index import Shards
from lodeset.training.launch import train_inline
from lodeset.training.onnx import export_onnx
from lodeset.training.origin import Origin, networks
from lodeset.training.vit import DinoVisionTransformer
from lodeset.training.weights import check_weights, identity, load_weights

MODEL = ModelConfig(patch_size=8, dim=128, depth=2, heads=2, registers=2)


def backbone(model: ModelConfig = MODEL, image_size: int = 40) -> DinoVisionTransformer:
    torch.manual_seed(1)
    made = DinoVisionTransformer(model, image_size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def same(one: DinoVisionTransformer, other: DinoVisionTransformer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_released_file_loads_unchanged(tmp_path: Path) -> None:
    model = backbone()
    torch.save(model.state_dict(), tmp_path / "released.pth")
    loaded = load_weights(str(tmp_path / "released.pth"), MODEL)
    assert same(loaded, model) and loaded.image_size == 40 and not loaded.training


def test_a_checkpoint_of_the_authors_code_gives_its_teacher(tmp_path: Path) -> None:
    """Its names have prefixes, numbered chunks of blocks, and heads beside the backbone."""
    model = backbone()
    chunked = {
        "backbone." + re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): value
        for name, value in model.state_dict().items()
    }
    head = {"dino_head.mlp.0.weight": torch.zeros(3), "ibot_head.last_layer.weight": torch.zeros(3)}
    torch.save({"teacher": {**chunked, **head}, "iteration": 5}, tmp_path / "training.pth")
    assert same(load_weights(str(tmp_path / "training.pth"), MODEL), model)


def prefixed(model: DinoVisionTransformer, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


HEADS = {"dino_head.mlp.0.weight": torch.zeros(3), "head.weight": torch.zeros(3)}
# How runs leave a backbone: what is saved, given its teacher and its student.
LEFT: dict[str, Callable[[DinoVisionTransformer, DinoVisionTransformer], Any]] = {
    "all of a run's networks": lambda t, s: {
        "model": prefixed(t, "teacher.backbone.")
        | prefixed(s, "student.backbone.")
        | {"teacher.dino_head.mlp.0.weight": torch.zeros(1)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]},
        "iteration": 5,
    },
    "fsdp": lambda t, s: {"teacher": prefixed(t, "backbone._fsdp_wrapped_module.")},
    "every block wrapped": lambda t, s: {
        "teacher": {
            "_fsdp_wrapped_module.backbone."
            + re.sub(r"^blocks\.(\d+)\.", r"blocks.0._fsdp_wrapped_module.\1._checkpoint_wrapped_module.", name): value
            for name, value in t.state_dict().items()
        }
    },
    "compiled": lambda t, s: prefixed(t, "_orig_mod."),
    "compiled, parallel": lambda t, s: {"state_dict": prefixed(t, "module._orig_mod.backbone.") | HEADS},
    "student and teacher": lambda t, s: {
        "student": prefixed(s, "module.backbone."),
        "teacher": prefixed(t, "backbone."),
    },
    "an average beside": lambda t, s: {"model": prefixed(s, ""), "model_ema": prefixed(t, "")},
    "a student alone": lambda t, s: {"epoch": 3, "student": prefixed(t, "backbone.")},
    "heads beside": lambda t, s: t.state_dict() | HEADS,
    "nested": lambda t, s: {"checkpoint": {"model": {"teacher": {"backbone": dict(t.state_dict()), "head": HEADS}}}},
}


@pytest.mark.parametrize("how", LEFT)
def test_what_runs_leave_loads_as_its_teacher(tmp_path: Path, how: str) -> None:
    teacher, student = backbone(), DinoVisionTransformer(MODEL, 40)
    torch.save(LEFT[how](teacher, student), tmp_path / "left.pth")
    check_weights(str(tmp_path / "left.pth"), MODEL)
    assert same(load_weights(str(tmp_path / "left.pth"), MODEL), teacher)


def test_the_old_form_of_files_loads(tmp_path: Path) -> None:
    torch.save({"teacher": backbone().state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_weights(str(tmp_path / "old.pth"), MODEL), backbone())


def test_tensors_in_safetensors_load_and_folders_say_what_they_hold(tmp_path: Path) -> None:
    save_file(prefixed(backbone(), "teacher.backbone."), tmp_path / "left.safetensors")
    assert same(load_weights(str(tmp_path / "left.safetensors"), MODEL), backbone())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "left.safetensors").read_bytes()[:99])
    with pytest.raises(LodesetError, match=r"cut\.safetensors cannot be read"):
        check_weights(str(tmp_path / "cut.safetensors"), MODEL)
    export(backbone(), tmp_path / "exported")
    with pytest.raises(LodesetError, match=r"give the folder, .*exported$"):
        check_weights(str(tmp_path / "exported/model.safetensors"), MODEL)
    (tmp_path / "eval").mkdir()
    torch.save(backbone().state_dict(), tmp_path / "eval/teacher_checkpoint.pth")
    with pytest.raises(LodesetError, match=r"but teacher_checkpoint\.pth: give the path of such a file"):
        check_weights(str(tmp_path / "eval"), MODEL)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (
            {"model": prefixed(backbone(), "one.") | prefixed(backbone(), "two.")},
            r"several backbones \(`model\.one\..*`model\.two",
        ),
        ({"model": {"teacher.backbone._flat_param": torch.zeros(9)}}, "one process's share.*teacher_checkpoint"),
        ({"layer1.0.conv1.weight": torch.zeros(1)}, r"patch_embed\.proj\.weight is missing among 1 tensors"),
        (backbone().state_dict() | {"fc_norm.weight": torch.zeros(1)}, r"fc_norm\.weight does not belong to one"),
        (backbone().state_dict() | {"norm.bias": torch.zeros(2)}, r"norm\.bias is \[2\], not \[128\]"),
        ({"model": [1, 2], "epoch": 1}, "holds no named tensors"),
    ],
)
def test_files_without_one_backbone_say_so_before_training(tmp_path: Path, saved: Any, told: str) -> None:
    torch.save(saved, tmp_path / "odd.pth")
    with pytest.raises(LodesetError, match=told):
        check_weights(str(tmp_path / "odd.pth"), MODEL)


def test_a_folder_in_the_form_of_hugging_face_is_weights_too(tmp_path: Path) -> None:
    export(backbone(), tmp_path)
    assert same(load_weights(str(tmp_path), MODEL), backbone())
    before = identity(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data + b" ")
        assert identity(str(tmp_path)) != before
        (tmp_path / name).write_bytes(data)
    assert identity(str(tmp_path)) == before


def test_another_architecture_is_told_with_the_numbers(tmp_path: Path) -> None:
    torch.save(backbone().state_dict(), tmp_path / "released.pth")
    wanted = ModelConfig(patch_size=8, dim=32, depth=3, heads=4)
    told = r"it has dim 128, depth 2, heads 2, registers 2; training.model has dim 32, depth 3, heads 4, registers 0"
    with pytest.raises(LodesetError, match=told):
        load_weights(str(tmp_path / "released.pth"), wanted)
    export(backbone(), tmp_path / "folder")
    for path in ("folder", "released.pth"):
        with pytest.raises(LodesetError, match=r"it has heads 2; training.model has heads 4"):
            load_weights(str(tmp_path / path), MODEL.model_copy(update={"heads": 4}))
    with pytest.raises(ValidationError, match="is a URL: download the file"):
        WeightsConfig(path="https://dl.fbaipublicfiles.com/dinov2_vits14_pretrain.pth")


def test_what_is_no_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(LodesetError, match="no weights at"):
        load_weights(str(path), MODEL)
    with pytest.raises(LodesetError, match=r"no weights at .* check `training: weights: path:`"):
        identity(str(path))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(LodesetError, match="could not be loaded with weights_only=True"):
        load_weights(str(path), MODEL)
    torch.save({"fn": np.add}, path)  # a pickle that would run code
    with pytest.raises(LodesetError, match="could not be loaded with weights_only=True"):
        load_weights(str(path), MODEL)
    torch.save([1, 2], path)
    with pytest.raises(LodesetError, match="holds no named tensors"):
        load_weights(str(path), MODEL)
    torch.save({"patch_embed.proj.weight": torch.zeros(1)}, path)
    with pytest.raises(LodesetError, match="is not a DINOv2 backbone"):
        load_weights(str(path), MODEL)
    state = backbone().state_dict()
    torch.save(state | {"pos_embed": torch.zeros(1, 8, 128)}, path)
    with pytest.raises(LodesetError, match="7 positions do not form a square grid"):
        load_weights(str(path), MODEL)
    state.pop("norm.bias")
    torch.save(state, path)
    with pytest.raises(LodesetError, match=r"norm\.bias"):
        load_weights(str(path), MODEL)


def test_training_goes_on_from_weights(tmp_path: Path, shards: Shards, small: TrainingConfig) -> None:
    """Positions keep the grid they are stored for, larger than that of the crops; the first step sees these weights."""
    small = small.model_copy(update={"model": small.model.model_copy(update={"dim": 64, "heads": 1})})
    torch.save(backbone(small.model, 40).state_dict(), tmp_path / "released.pth")
    origin = Origin(path=str(tmp_path / "released.pth"), digest=identity(str(tmp_path / "released.pth")))
    nets = networks(small, origin)
    assert same(nets.student.backbone, backbone(small.model, 40)) and same(nets.average.backbone, nets.student.backbone)
    assert nets.teacher is nets.average and nets.student.training
    assert not any(parameter.requires_grad for parameter in nets.average.parameters())
    folder = tmp_path / "run"
    train_inline(small, shards, folder, origin)
    trained = load_weights(str(folder), small.model)
    assert trained.image_size == 40 and not same(trained, backbone(small.model, 40))
    with pytest.raises(LodesetError, match="origin"):
        train_inline(small, shards, folder, origin.model_copy(update={"digest": "another"}))


@pytest.mark.parametrize("registers", [0, 2])
def test_onnx_gives_what_the_model_gives_at_every_size(tmp_path: Path, registers: int) -> None:
    """On the grid that positions are stored for, on larger and smaller ones, and on one that is so along one side alone."""
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    import onnxruntime

    model = backbone(MODEL.model_copy(update={"registers": registers}))
    assert export_onnx(model, tmp_path / "model.onnx", 40)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, height, width in ((3, 40, 40), (1, 56, 56), (2, 16, 24), (1, 40, 64), (5, 8, 96)):
        images = torch.randn(batch, 3, height, width)
        embedding, patches = session.run(["embedding", "patches"], {"image": images.numpy()})
        with torch.no_grad():
            seen = model(images)
        np.testing.assert_allclose(embedding, seen.cls.numpy(), atol=1e-4)
        np.testing.assert_allclose(patches, seen.patches.numpy(), atol=1e-4)
    with pytest.raises(LodesetError, match="size 44 is not a multiple of patch size 8: use 40"):
        export_onnx(model, tmp_path / "model.onnx", 44)


@pytest.mark.parametrize("free", [False, True])
def test_onnx_of_other_networks_takes_the_sizes_that_they_take(tmp_path: Path, free: bool) -> None:
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    import onnxruntime

    torch.manual_seed(0)
    last = (
        [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        if free
        else [torch.nn.Flatten(), torch.nn.Linear(4 * 64, 5)]
    )
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, stride=4), *last).eval()
    assert export_onnx(network, tmp_path / "model.onnx", 32) == free
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for side in (32, 64) if free else (32,):
        images = torch.randn(3, 3, side, side)
        (found,) = session.run(None, {"image": images.numpy()})
        np.testing.assert_allclose(found, network(images).detach().numpy(), atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_an_exported_network_is_an_embedder_that_needs_no_knobs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    export_onnx(backbone(), tmp_path / "model.onnx", 56)
    plain = opened(OnnxEmbedder(kind="onnx", path=str(tmp_path / "model.onnx")), 1)
    assert plain.recipe == Recipe("square", 56, 56, IMAGENET_MEAN, IMAGENET_STD)
    image = Image.linear_gradient("L").convert("RGB")
    images = torch.from_numpy(normalised(image, plain.recipe))[None]
    with torch.no_grad():
        expected = backbone()(images).cls.numpy()
    found = onnx(OnnxEmbedder(kind="onnx", path=str(tmp_path / "model.onnx")), 1)([image])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_processor_lies_beside_an_exported_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    export(backbone(), str(tmp_path))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    theirs = processor(image, return_tensors="np")["pixel_values"]
    ours = normalised(image, recipe_of(tmp_path, HuggingFaceEmbedder(kind="huggingface", model=str(tmp_path))))
    assert theirs.shape == (1, 3, 40, 40)
    assert np.abs(theirs[0] - ours).max() * 255 * 0.224 < 2.5  # levels of 8 bits
    assert same(load_backbone(str(tmp_path)), backbone())


def test_other_sizes_with_registers_are_those_of_hugging_face(tmp_path: Path) -> None:
    """Without registers they differ: Hugging Face interpolates by size, the released models by scale factor and an offset."""
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    images = torch.randn(1, 3, 24, 56)
    for registers, kind in ((2, transformers.Dinov2WithRegistersModel), (0, transformers.Dinov2Model)):
        model = backbone(MODEL.model_copy(update={"registers": registers}))
        export(model, tmp_path / str(registers))
        with torch.no_grad():
            theirs = kind.from_pretrained(tmp_path / str(registers)).eval()(images).last_hidden_state[:, 0]
            ours = model(images).cls
        assert torch.allclose(theirs, ours, atol=1e-4) == bool(registers)
