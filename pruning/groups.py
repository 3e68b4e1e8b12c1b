"""What can be removed from a model, the moments that decide it, and the removal itself.

A group is the hidden units of a two-layer MLP `fc2(activation(fc1(x)))`: removing unit i removes row i of fc1 and
column i of fc2, and nothing else in the network sees it.

Shapes: B images, N tokens, n hidden units, m outputs, k units kept.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import LodesetError
from pruning.entropic import Array, Gram, Indices
from training.config import ModelConfig
from training.vit import DinoVisionTransformer

Model = TypeVar("Model", bound=nn.Module)

# Removing units and zeroing them differ by the order of float32 sums alone; more means that something else reads them.
REMOVAL_TOLERANCE = 1e-4
# Not called config.json: no reader of dense checkpoints may take a pruned one for its own.
WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"


@dataclass(frozen=True)
class Group:
    """Hidden units of one MLP; `name` is the module that holds fc1 and fc2."""

    name: str
    units: int


@dataclass(frozen=True)
class Groups:
    """The prunable groups of a model, and why other modules with weights are left whole, by name."""

    prunable: tuple[Group, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Replacement:
    """What becomes of one group: the units kept [k] (ascending), and the new fc2 weight [m, k] and bias [m]."""

    keep: Indices
    weight: Array
    bias: Array


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def linears(model: nn.Module, name: str) -> tuple[nn.Linear, nn.Linear]:
    """(fc1, fc2) of the group called `name`.

    Raises:
        LodesetError: the model has no such MLP.
    """
    mlp = dict(model.named_modules()).get(name)
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
        raise LodesetError(f"the model has no MLP with linear layers fc1 and fc2 called {name!r}")
    return fc1, fc2


def find_groups(model: nn.Module) -> Groups:
    """Every two-layer MLP of the model, in order, and the reason for each other module with weights of its own.

    Raises:
        LodesetError: there is nothing to prune.
    """
    prunable: list[Group] = []
    skipped: dict[str, str] = {}
    covered: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in covered):
            continue
        if isinstance(fc1 := getattr(module, "fc1", None), nn.Linear) and isinstance(
            fc2 := getattr(module, "fc2", None), nn.Linear
        ):
            if fc1.out_features == fc2.in_features:
                prunable.append(Group(name, fc1.out_features))
            else:
                skipped[name] = (
                    f"fc1 gives {fc1.out_features} values and fc2 takes {fc2.in_features}: units do not pair up"
                )
            covered.append(name + ".")
        elif isinstance(getattr(module, "w12", None), nn.Linear):
            skipped[name] = "gated feed-forward layer: a hidden unit is two rows of w12, and only plain MLPs are pruned"
            covered.append(name + ".")
        elif isinstance(getattr(module, "qkv", None), nn.Linear):
            skipped[name] = "attention: heads are left whole, only hidden units of MLPs are pruned"
            covered.append(name + ".")
        elif isinstance(module, nn.Linear | nn.Conv2d):
            skipped[name] = "writes to the residual stream, whose width every block shares"
    if not prunable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise LodesetError(f"nothing to prune in this model ({reasons}): use a checkpoint with `ffn: mlp`")
    return Groups(tuple(prunable), skipped)


def sample_positions(image: int, tokens: int, count: int | None, seed: int) -> Indices:
    """Tokens of one image to measure on, ascending; the seed and the image's number decide, not the batches."""
    if count is None or count >= tokens:
        return np.arange(tokens)
    return np.sort(np.random.default_rng((seed, image)).choice(tokens, size=count, replace=False))


def collect_grams(
    model: nn.Module,
    groups: Groups,
    batches: Iterable[Tensor],
    *,
    positions_per_image: int | None,
    seed: int,
    first_image: int = 0,
) -> dict[str, Gram]:
    """Moments of every prunable group over batches of images [B, 3, height, width], by group name.

    x is what fc2 receives, n wide; y is what it gives, m wide, its bias included; both a row a token, image by image
    ([B, N, n] or packed, [B N, n]). One pass through the dense
    model in evaluation mode. A worker that starts at image number `first_image` draws the tokens that a single worker
    would have drawn, so its moments add up to the same total.

    Raises:
        LodesetError: there are no images.
    """
    grams: dict[str, Gram] = {}
    image, count = first_image, 0

    def measure(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x, y = (rows.reshape(count, -1, rows.shape[-1]) for rows in (args[0], y))
            drawn = [sample_positions(image + i, x.shape[1], positions_per_image, seed) for i in range(len(x))]
            tokens = torch.from_numpy(np.stack(drawn)).to(x.device)
            rows = torch.arange(len(x), device=x.device)[:, None]
            gram = Gram.from_activations(x[rows, tokens].flatten(0, 1), y[rows, tokens].flatten(0, 1))
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    handles = [linears(model, group.name)[1].register_forward_hook(measure(group.name)) for group in groups.prunable]
    try:
        with evaluating(model):
            for images in batches:
                count = len(images)
                model(images)
                image += count
    finally:
        for handle in handles:
            handle.remove()
    if image == first_image:
        raise LodesetError("no calibration images: pruning needs some to see what the units do")
    return grams


def _like(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with this weight and bias, on the device and in the precision of `linear`."""
    out = nn.Linear(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    with torch.no_grad():
        out.weight.copy_(weight)
        if bias is not None:
            out.bias.copy_(bias)
    return out


def _set(model: nn.Module, name: str, fc1: nn.Linear, fc2: nn.Linear) -> None:
    mlp = model.get_submodule(name)
    mlp.register_module("fc1", fc1)
    mlp.register_module("fc2", fc2)


def apply(model: Model, replacements: Mapping[str, Replacement]) -> Model:
    """A copy of the model that holds only the units kept; its fc2 layers always have a bias."""
    pruned = copy.deepcopy(model)
    for name, new in replacements.items():
        fc1, fc2 = linears(pruned, name)
        keep = torch.from_numpy(new.keep).to(fc1.weight.device)
        smaller = _like(fc1, fc1.weight[keep], None if fc1.bias is None else fc1.bias[keep])
        _set(pruned, name, smaller, _like(fc2, torch.from_numpy(new.weight), torch.from_numpy(new.bias)))
    return pruned


def masked(model: Model, replacements: Mapping[str, Replacement]) -> Model:
    """A copy of the model at full size that computes what `apply` computes: removed units have zero columns in fc2."""
    dense = copy.deepcopy(model)
    for name, new in replacements.items():
        fc1, fc2 = linears(dense, name)
        weight = torch.zeros(fc2.weight.shape, dtype=torch.float64)
        weight[:, torch.from_numpy(new.keep)] = torch.from_numpy(new.weight)
        _set(dense, name, fc1, _like(fc2, weight, torch.from_numpy(new.bias)))
    return dense


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The tensors that a model returns, as such or as the fields of a dataclass, in evaluation mode."""
    with evaluating(model):
        out = model(images)
    values = [getattr(out, f.name) for f in fields(out)] if is_dataclass(out) else [out]
    return [value for value in values if value.numel()]


def max_difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Largest absolute difference between two models' outputs on images [B, 3, height, width]."""
    pairs = zip(_outputs(one, images), _outputs(other, images), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def check_removal(
    pruned: nn.Module, dense: nn.Module, replacements: Mapping[str, Replacement], images: Tensor
) -> float:
    """`max_difference` between the pruned model and `masked(dense)` on images [B, 3, height, width].

    Raises:
        LodesetError: it exceeds REMOVAL_TOLERANCE: removing units changed more than those units' own contribution.
    """
    difference = max_difference(pruned, masked(dense, replacements), images)
    if not difference <= REMOVAL_TOLERANCE:
        raise LodesetError(
            f"the pruned model and the same model with units zeroed differ by {difference:.2g} (allowed: "
            f"{REMOVAL_TOLERANCE:g}): prune only MLPs fc2(activation(fc1(x))) whose activation acts unit by unit"
        )
    return difference


def save_pruned(model: DinoVisionTransformer, folder: Path) -> None:
    """Write `model.safetensors` and `architecture.json` (the dense architecture, the hidden units left in each MLP)."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture = {
        "model": model.config.model_dump(mode="json"),
        "image_size": model.image_size,
        "hidden": {group.name: group.units for group in find_groups(model).prunable},
    }
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def load_pruned(folder: Path) -> DinoVisionTransformer:
    """The model that `save_pruned` wrote, in evaluation mode on the CPU.

    Raises:
        LodesetError: a file is missing or damaged, or the two do not belong together.
    """
    try:
        architecture = json.loads((folder / ARCHITECTURE).read_text())
        model = DinoVisionTransformer(ModelConfig.model_validate(architecture["model"]), architecture["image_size"])
        for name, units in architecture["hidden"].items():
            fc1, fc2 = linears(model, name)
            _set(model, name, nn.Linear(fc1.in_features, units), nn.Linear(units, fc2.out_features))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise LodesetError(f"{folder} does not hold a pruned model: {error}") from error
    return model.eval()
