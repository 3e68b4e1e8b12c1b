"""Small networks of each kind that can be pruned, with weights large enough that every unit matters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lodeset.pruning.units.groups import Group, layer_of
from lodeset.pruning.units.removal import Replacement, Weights
from lodeset.training.config import ModelConfig
from lodeset.training.vit import DinoVisionTransformer


def shaken(model: nn.Module) -> nn.Module:
    """Weights moved by a fifth of a deviation, running statistics of norms too; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def vit(ffn: str = "mlp", registers: int = 0, heads: int = 2) -> DinoVisionTransformer:
    """Two blocks of width 16 on 16-pixel images."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"patch_size": 4, "dim": 16, "depth": 2, "heads": heads, "ffn": ffn, "registers": registers}
    )
    model = DinoVisionTransformer(config, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class LeNet(nn.Module):
    """Two convolutions, two linear layers, the first behind flattened maps: 16-pixel images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 8, 3, bias=False)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        out: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


class Residual(nn.Module):
    """Two residual blocks with BatchNorm, the second with a stride and a convolution in its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.first = self._branch(8, 8, 1)
        self.second = self._branch(8, 10, 2)
        self.short = nn.Sequential(nn.Conv2d(8, 10, 1, 2, bias=False), nn.BatchNorm2d(10))
        self.head = nn.Linear(10, 4)

    @staticmethod
    def _branch(into: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(into, 12, 3, stride, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.first(x))
        x = torch.relu(self.short(x) + self.second(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def replaced_at_random(model: nn.Module, groups: tuple[Group, ...], kept: int) -> dict[str, Replacement]:
    """`kept` units of every group, or all but one where it has no more, with random weights for what reads them."""
    rng = np.random.default_rng(0)
    found = {}
    for group in groups:
        keep = np.sort(rng.choice(group.units, min(kept, group.units - 1), replace=False))
        readers = {}
        for reader in group.readers:
            outputs = len(layer_of(model, reader.name).weight)
            weight = rng.normal(size=(outputs, len(reader.unit_of))) / np.sqrt(len(reader.unit_of))
            readers[reader.name] = Weights(weight * np.isin(reader.unit_of, keep), rng.normal(size=outputs))
        found[group.name] = Replacement(keep, readers)
    return found
