"""One whole training step against a plain one in float64: an image at a time, a pair of views at a time, every formula written out."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lodeset.training.config import TrainingConfig
from lodeset.training.data import Batch, Batches
from lodeset.training.index import Shards, open_index
from lodeset.training.objectives.dinov2 import losses
from lodeset.training.schedules import step_values
from lodeset.training.ssl import Network, clip_gradients, fresh, make_optimiser, schedule, update_teacher

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain_tokens(p: dict[str, Tensor], image: Tensor, mask: Tensor | None, config: TrainingConfig) -> Tensor:
    """One image [3, S, S], uint8 -> tokens after the last norm, [1 + R + N, D]."""
    model, patch = config.model, config.model.patch_size
    x = torch.stack([(image[c].double() / 255 - MEAN[c]) / DEVIATION[c] for c in range(3)])
    side = image.shape[-1] // patch
    weight = p["patch_embed.proj.weight"].flatten(1)
    tokens = []
    for row in range(side):
        for column in range(side):
            pixels = x[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            hidden = mask is not None and bool(mask[row * side + column])
            tokens.append(p["mask_token"][0] if hidden else weight @ pixels.flatten() + p["patch_embed.proj.bias"])
    stored = p["pos_embed"][0]
    at = round((len(stored) - 1) ** 0.5)
    grid = stored[1:].reshape(at, at, -1).permute(2, 0, 1)[None]
    if side != at:
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)  # as models with registers do it
    positions = grid[0].permute(1, 2, 0).reshape(side * side, -1)
    patches = torch.stack(tokens) + positions
    x = torch.cat([p["cls_token"][0] + stored[:1], p["register_tokens"][0], patches])
    for n in range(model.depth):
        b = {key.removeprefix(f"blocks.{n}."): value for key, value in p.items() if key.startswith(f"blocks.{n}.")}
        q, k, v = (plain_norm(x, b, "norm1") @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, dim=1)
        heads = []
        for h in range(model.heads):
            width = model.dim // model.heads
            mine = slice(h * width, (h + 1) * width)
            weights = torch.softmax(q[:, mine] @ k[:, mine].T / math.sqrt(width), dim=1)
            heads.append(weights @ v[:, mine])
        x = x + (torch.cat(heads, dim=1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]) * b["ls1.gamma"]
        hidden_ = plain_gelu(plain_norm(x, b, "norm2") @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + (hidden_ @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]) * b["ls2.gamma"]
    return plain_norm(x, p, "norm")


def plain_norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    variance = (centred**2).mean(dim=1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]


def plain_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_scores(p: dict[str, Tensor], x: Tensor) -> Tensor:
    for layer in (0, 2):
        x = plain_gelu(x @ p[f"mlp.{layer}.weight"].T + p[f"mlp.{layer}.bias"])
    x = x @ p["mlp.4.weight"].T + p["mlp.4.bias"]
    prototypes = p["prototypes"]
    return (x / x.norm(dim=-1, keepdim=True)) @ (prototypes / prototypes.norm(dim=-1, keepdim=True)).T


def plain_sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    """[B, K]: three times, each prototype gets 1 / K of all, then each row 1 / B."""
    q = torch.exp(scores / temperature)
    for _ in range(3):
        q = q / q.sum(dim=0) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    return -(target * torch.log_softmax(scores / 0.1, dim=-1)).sum()


def part(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def plain_losses(
    student: dict[str, Tensor], teacher: dict[str, Tensor], batch: Batch, temperature: float, config: TrainingConfig
) -> dict[str, Tensor]:
    images, first_patch = len(batch.image_ids), 1 + config.model.registers
    masks = [mask if bool(mask.any()) else None for mask in batch.masks]
    seen_by_teacher = [plain_tokens(part(teacher, "backbone."), crop, None, config) for crop in batch.global_crops]
    whole = [
        plain_tokens(part(student, "backbone."), crop, mask, config)
        for crop, mask in zip(batch.global_crops, masks, strict=True)
    ]
    local = [plain_tokens(part(student, "backbone."), crop, None, config) for crop in batch.local_crops]

    head, its = part(student, "dino_head."), part(teacher, "dino_head.")
    targets = plain_sinkhorn(plain_scores(its, torch.stack([x[0] for x in seen_by_teacher])), temperature)
    dino, pairs = torch.zeros((), dtype=torch.float64), 0
    views = [("global", whole), ("local", local)]
    for u in range(2):
        for kind, crops in views:
            for v in range(len(crops) // images):
                if kind == "global" and u == v:
                    continue
                pairs += 1
                for i in range(images):
                    dino = (
                        dino
                        + cross_entropy(targets[u * images + i], plain_scores(head, crops[v * images + i][:1])[0])
                        / images
                    )

    hidden = [(c, n) for c, mask in enumerate(batch.masks) for n in range(len(mask)) if bool(mask[n])]
    asked = torch.stack([seen_by_teacher[c][first_patch + n] for c, n in hidden])
    patch_targets = plain_sinkhorn(plain_scores(part(teacher, "ibot_head."), asked), temperature)
    ibot = torch.zeros((), dtype=torch.float64)
    for target, (c, n) in zip(patch_targets, hidden, strict=True):
        scores = plain_scores(part(student, "ibot_head."), whole[c][first_patch + n][None])[0]
        ibot = ibot + cross_entropy(target, scores) / int(batch.masks[c].sum()) / (2 * images)

    koleo = torch.zeros((), dtype=torch.float64)
    for view in range(2):
        rows = torch.stack([x[0] / x[0].norm() for x in whole[view * images : (view + 1) * images]])
        for i in range(images):
            nearest = min((float((rows[i] - rows[j]).detach().norm()), j) for j in range(images) if j != i)[1]
            koleo = koleo - torch.log((rows[i] - rows[nearest]).norm() + 1e-8) / images
    return {"dino": dino / pairs, "ibot": ibot, "koleo": 0.1 * koleo}


def plain_step(
    student: dict[str, Tensor],
    gradients: dict[str, Tensor],
    teacher: dict[str, Tensor],
    step: int,
    config: TrainingConfig,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The first step of AdamW from nothing, and the moving mean: name, new weight, new mean."""
    values, depth = step_values(config, step), config.model.depth
    for module in ("backbone.", "dino_head.", "ibot_head."):
        norm = math.sqrt(sum(float((g**2).sum()) for name, g in gradients.items() if name.startswith(module)))
        clip = min(1.0, config.optimiser.clip_norm / (norm + 1e-6))
        for name in (name for name in student if name.startswith(module)):
            block = name.split(".")[2] if name.startswith("backbone.blocks.") else None
            layer = int(block) + 1 if block else depth + 1 if module != "backbone." or ".norm." in name else 0
            lr = values.lr * config.optimiser.layer_decay ** (depth + 1 - layer)
            lr *= config.optimiser.patch_embed_lr if "patch_embed" in name else 1
            decayed = name.endswith((".weight", "_token", "_tokens", "pos_embed", "prototypes")) and "norm" not in name
            gradient = gradients[name] * clip
            moved = student[name] * (1 - lr * values.weight_decay * decayed)
            moved = moved - lr * gradient / (
                gradient.abs() + 1e-8
            )  # both moments are the gradient's, corrected for bias
            yield name, moved, values.momentum * teacher[name] + (1 - values.momentum) * moved


def doubles(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in network.named_parameters()}


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_is_the_plain_one(shards: Shards, small: TrainingConfig, step: int) -> None:
    # Prototypes stand still for two of 20 steps, and weights decay enough to be seen in one.
    optimised = small.optimiser.model_copy(update={"freeze_last_layer": 0.1, "weight_decay_start": 4.0})
    config = small.model_copy(
        update={
            "batch": 4,
            "steps": 20,
            "optimiser": optimised,
            "model": small.model.model_copy(update={"drop_path": 0.0}),
        }
    )
    nets = fresh(config)
    torch.manual_seed(1)
    for parameter in (
        *nets.student.parameters(),
        *nets.average.parameters(),
    ):  # far from the start, where little is told apart
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = Batches(open_index(shards.index), config, 0, 1).load(step)
    values = step_values(config, step)
    student = {name: value.requires_grad_() for name, value in doubles(nets.student).items()}
    teacher = copy.deepcopy(doubles(nets.average))
    expected = plain_losses(student, teacher, batch, values.teacher_temperature, config)

    optimiser = make_optimiser(nets.student, config.optimiser)
    schedule(optimiser, values)
    seen = losses(nets, batch, values, config, None)
    for name, term in expected.items():
        torch.testing.assert_close(seen.terms[name].double(), term, rtol=1e-4, atol=1e-6)

    gradients = torch.autograd.grad(sum(expected.values()), list(student.values()))
    torch.autograd.backward(seen.total)
    mine = dict(nets.student.named_parameters())
    for name, gradient in zip(student, gradients, strict=True):
        found = mine[name].grad
        assert found is not None
        torch.testing.assert_close(
            found.double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name
        )

    assert clip_gradients(nets.student, config.optimiser.clip_norm) > 0
    told = {name: parameter.grad.double() for name, parameter in mine.items() if parameter.grad is not None}
    frozen = {name for name in mine if name.endswith("prototypes")} if step == 1 else set()
    by_hand = {
        n: (w, m)
        for n, w, m in plain_step(
            doubles(nets.student), dict(zip(student, gradients, strict=True)), teacher, step, config
        )
    }
    before = doubles(nets.student)
    optimiser.step()
    update_teacher(nets.student, nets.average, values.momentum)
    means = doubles(nets.average)
    for name, weight in doubles(nets.student).items():
        sure = told[name].abs() > 1e-6  # the first step of Adam goes by a gradient's sign
        wanted = before[name] if name in frozen else by_hand[name][0]
        torch.testing.assert_close(weight[sure], wanted[sure], rtol=1e-5, atol=1e-6)
        mean = values.momentum * teacher[name] + (1 - values.momentum) * wanted
        torch.testing.assert_close(means[name][sure], mean[sure], rtol=1e-5, atol=1e-6)
