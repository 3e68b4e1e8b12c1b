"""Remove units from a model: rewrite weights at full size, remove the units, and compare the two models.

Shapes: m outputs of a layer, c its columns.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.groups import TOLERANCE, Group, Model, columns, layer_of, max_difference, shrunk
from lodeset.pruning.units.moments import Array, Indices


@dataclass(frozen=True)
class Weights:
    """New weights of a layer: weight [m, c], zero in the columns of removed units, and bias [m]."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Replacement:
    """The replacement of one group: the kept units [k], ascending, and the layers that read them, by name."""

    keep: Indices
    readers: Mapping[str, Weights]


def masked(model: Model, replacements: Mapping[str, Replacement]) -> Model:
    """A copy of the model at full size in which rewritten layers have zero weights for removed units; these layers have
    a bias.
    """
    dense = copy.deepcopy(model)
    for replacement in replacements.values():
        for name, new in replacement.readers.items():
            layer = layer_of(dense, name)
            with torch.no_grad():
                columns(layer).copy_(torch.from_numpy(new.weight))
                bias = torch.from_numpy(new.bias).to(layer.weight)
                if layer.bias is None:
                    layer.bias = nn.Parameter(bias)
                else:
                    layer.bias.copy_(bias)
    return dense


def apply(
    model: Model, groups: Sequence[Group], replacements: Mapping[str, Replacement], example: Tensor
) -> tuple[Model, float]:
    """A copy of the model that holds only the kept units, by group name, and computes what `masked` computes; and the
    difference between the two on `example`, two images or more [B, 3, height, width] (see `max_difference`).

    Raises:
        LodesetError: they differ by more than rounding.
    """
    zeroed = masked(model, replacements)
    kept = [(group, replacements[group.name].keep) for group in groups if group.name in replacements]
    pruned = shrunk(zeroed, kept, example)
    difference = max_difference(pruned, zeroed, example)
    if not difference <= TOLERANCE:
        raise LodesetError(
            f"the pruned model and the same model with units zeroed differ by {difference:.2g} (allowed: "
            f"{TOLERANCE:g}): something else depends on the units that were removed"
        )
    return pruned, difference
