"""How strong the penalty is in each group, so that a share of a model's parameters goes.

One strength everywhere prunes a layer of 64 channels as hard as one of 512, though there is little to save in it, and prunes layers
alike that matter little and much to what the model returns. Here a group gets the strength at which a parameter saved changes the model's
outputs as much as it does in the others: steps from strength to strength are taken in the order of what they save for what they lose,
until the share is reached (marginal analysis, as bits are allocated in coding: Shoham & Gersho 1988). What a strength loses is measured with the
group pruned alone; losses are taken to add up. A group may also be left whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.groups import Group, layer_of

LEAST_LOSS = 1e-9  # of the outputs' variance; less is rounding, and costs nothing


@dataclass(frozen=True)
class Level:
    """A strength that a group was solved at, or 0 for what is left whole: the share of its units that is kept, and what the model's outputs lose."""

    eps_w: float
    kept: float
    lost: float


@dataclass(frozen=True)
class _Weights:
    """A layer's weights, and the groups that make their rows and columns fewer."""

    count: int
    rows: int  # its outputs, each with a bias
    made: str | None
    read: str | None


@dataclass(frozen=True)
class Sizes:
    """How many parameters a model has when shares of its groups' units are kept."""

    layers: tuple[_Weights, ...]
    dense: int  # parameters of the model as it is
    rest: int  # those outside the layers

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group]) -> "Sizes":
        made = {maker.name: group.name for group in groups for maker in group.makers}
        read = {reader.name: group.name for group in groups for reader in group.readers}
        layers, held = [], 0
        for name in dict.fromkeys([*made, *read]):
            layer = layer_of(model, name)
            rows, has_bias = len(layer.weight), layer.bias is not None
            held += layer.weight.numel() + rows * has_bias
            # A layer that is rewritten has a bias from then on.
            biases = rows if has_bias or name in read else 0
            layers.append(_Weights(layer.weight.numel(), biases, made.get(name), read.get(name)))
        dense = sum(p.numel() for p in model.parameters())
        return cls(tuple(layers), dense, dense - held)

    def parameters(self, kept: Mapping[str, float]) -> float:
        """`kept`: shares of the units, by group."""
        total = float(self.rest)
        for one in self.layers:
            rows = kept[one.made] if one.made else 1.0
            total += one.count * rows * (kept[one.read] if one.read else 1.0) + one.rows * rows
        return total

    def near(self, group: str) -> "Sizes":
        """Only the layers that make or read a group: what changes with it."""
        layers = tuple(one for one in self.layers if group in (one.made, one.read))
        return Sizes(layers, self.dense, 0)


def allocate(sizes: Sizes, levels: Mapping[str, Sequence[Level]], share: float) -> dict[str, float]:
    """A strength for each group, of those that it was solved at, or 0, such that at least `share` of the model's parameters go.

    Raises:
        LodesetError: less goes at the strongest of them.
    """
    at = dict.fromkeys(levels, Level(0.0, 1.0, 0.0))
    near = {name: sizes.near(name) for name in levels}
    while True:
        kept = {name: level.kept for name, level in at.items()}
        left = sizes.parameters(kept)
        missing = left - (1.0 - share) * sizes.dense
        if missing <= 0.0:
            return {name: level.eps_w for name, level in at.items()}
        # Parameters saved, what is lost, and where to; always to fewer units, so that this ends.
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
            strongest = max((level.eps_w for of in levels.values() for level in of), default=0.0)
            raise LodesetError(
                f"remove {share:g}: at the strongest penalty of sweep, {strongest:g}, {1.0 - left / sizes.dense:.1%} of the parameters go: ask for "
                "less, add stronger penalties to sweep, or give `targets: [units, heads]` if it names units alone"
            )
        best = max(steps, key=lambda step: step[0] / max(step[1], LEAST_LOSS))
        if best[0] >= missing:  # the last step: of all that suffice the one that loses least
            best = min((step for step in steps if step[0] >= missing), key=lambda step: step[1])
        at[best[2]] = best[3]
