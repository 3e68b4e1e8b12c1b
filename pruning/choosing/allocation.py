"""Choose a penalty strength for each group so that a given share of a model's parameters is removed.

A single strength for the whole model prunes a layer of 64 channels as hard as one of 512, although the small layer
saves little, and it ignores how much each layer matters to the model's output. This module gives each group the
strength at which one saved parameter changes the model's outputs by the same amount as in every other group. Steps from
one strength to the next are taken in the order of parameters saved per loss until the requested share is reached
(marginal analysis, as bits are allocated in source coding: Shoham & Gersho 1988). The loss of a strength is measured
with that group alone pruned, and losses are assumed to add up. A group may also be left whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.groups import Group, layer_of

LEAST_LOSS = 1e-9  # share of the outputs' variance; anything smaller is rounding error and counts as free


@dataclass(frozen=True)
class Level:
    """A strength at which a group was solved (0: left whole), the share of units kept, and the resulting loss of the
    model's outputs.
    """

    eps_w: float
    kept: float
    lost: float


@dataclass(frozen=True)
class _Weights:
    """A layer's weights, and the groups whose pruning removes its rows and columns."""

    count: int
    rows: int  # number of outputs, each with a bias
    made: str | None
    read: str | None


@dataclass(frozen=True)
class Sizes:
    """Computes a model's parameter count when only some share of each group's units is kept."""

    layers: tuple[_Weights, ...]
    dense: int  # parameters of the unpruned model
    rest: int  # parameters outside the layers

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group]) -> "Sizes":
        made = {maker.name: group.name for group in groups for maker in group.makers}
        read = {reader.name: group.name for group in groups for reader in group.readers}
        layers, held = [], 0
        for name in dict.fromkeys([*made, *read]):
            layer = layer_of(model, name)
            rows, has_bias = len(layer.weight), layer.bias is not None
            held += layer.weight.numel() + rows * has_bias
            # A rewritten layer always has a bias.
            biases = rows if has_bias or name in read else 0
            layers.append(_Weights(layer.weight.numel(), biases, made.get(name), read.get(name)))
        dense = sum(p.numel() for p in model.parameters())
        return cls(tuple(layers), dense, dense - held)

    def parameters(self, kept: Mapping[str, float]) -> float:
        """Return the parameter count; `kept` maps each group to the share of its units that is kept."""
        total = float(self.rest)
        for layer in self.layers:
            rows = kept[layer.made] if layer.made else 1.0
            total += layer.count * rows * (kept[layer.read] if layer.read else 1.0) + layer.rows * rows
        return total

    def near(self, group: str) -> "Sizes":
        """Only the layers that make or read `group`, that is, those whose size changes with it."""
        layers = tuple(layer for layer in self.layers if group in (layer.made, layer.read))
        return Sizes(layers, self.dense, 0)


def allocate(sizes: Sizes, levels: Mapping[str, Sequence[Level]], share: float) -> dict[str, float]:
    """Choose for each group one of the strengths it was solved at, or 0, so that at least `share` of the parameters is
    removed.

    Raises:
        LodesetError: even the strongest penalties remove less.
    """
    at = dict.fromkeys(levels, Level(0.0, 1.0, 0.0))
    near = {name: sizes.near(name) for name in levels}
    while True:
        kept = {name: level.kept for name, level in at.items()}
        remaining = sizes.parameters(kept)
        missing = remaining - (1.0 - share) * sizes.dense
        if missing <= 0.0:
            return {name: level.eps_w for name, level in at.items()}
        # Each step: parameters saved, loss added, group, new level. Steps only remove units, so the loop terminates.
        steps = [
            (
                near[name].parameters(kept) - near[name].parameters({**kept, name: to.kept}),
                to.lost - now.lost,
                name,
                to,
            )
            for name, now in at.items()
            for to in levels[name]
            if to.kept < now.kept and math.isfinite(to.lost)
        ]
        if not steps:
            strongest = max((level.eps_w for group_levels in levels.values() for level in group_levels), default=0.0)
            raise LodesetError(
                f"remove {share:g}: at the strongest penalty of sweep, {strongest:g}, "
                f"{1.0 - remaining / sizes.dense:.1%} of the parameters are removed: ask for less, add stronger "
                "penalties to sweep, or give `targets: [units, heads]` if it lists only units"
            )
        best = max(steps, key=lambda step: step[0] / max(step[1], LEAST_LOSS))
        if best[0] >= missing:  # last step: of all steps that suffice, take the one with the smallest loss
            best = min((step for step in steps if step[0] >= missing), key=lambda step: step[1])
        at[best[2]] = best[3]
