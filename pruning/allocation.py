"""How strong the penalty is in each group, so that a share of a model's parameters goes.

One strength everywhere prunes a layer of 64 channels as hard as one of 512, though there is little to save in it, and prunes layers
alike that matter little and much to what the model returns. Here a group gets the strength at which a parameter saved changes the model's
outputs as much as it does in the others: steps from strength to strength are taken in the order of what they save for what they lose,
until the share is reached (marginal analysis, as bits are allocated in coding: Shoham & Gersho 1988). What a strength loses is measured with the
group pruned alone; losses are taken to add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.errors import LodesetError
from pruning.groups import Group, layer_of

LEAST_LOSS = 1e-9  # of the outputs' variance; less is rounding, and costs nothing


@dataclass(frozen=True)
class Level:
    """A strength that a group was solved at: the share of its units that is kept, and what the model's outputs lose."""

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

    def parameters(self, kept: Mapping[str, float], of: str | None = None) -> float:
        """Parameters of the layers that make or read a group, or of the whole model; `kept`: shares of the units, by group."""
        total = 0.0 if of else float(self.rest)
        for one in self.layers:
            if of is None or of in (one.made, one.read):
                rows = kept[one.made] if one.made else 1.0
                total += one.count * rows * (kept[one.read] if one.read else 1.0) + one.rows * rows
        return total


def allocate(sizes: Sizes, levels: Mapping[str, Sequence[Level]], share: float) -> dict[str, float]:
    """A strength for each group, of those that it was solved at (ascending), such that at least `share` of the model's parameters go.

    Raises:
        LodesetError: less goes at the strongest of them.
    """
    at = dict.fromkeys(levels, 0)
    kept = {name: of[0].kept for name, of in levels.items()}
    while (removed := 1.0 - sizes.parameters(kept) / sizes.dense) < share:
        steps = [
            (_gain(sizes, kept, name, of[at[name]], of[to]), name, to)
            for name, of in levels.items()
            for to in range(at[name] + 1, len(of))
        ]
        gain, name, to = max(steps, key=lambda step: step[0], default=(0.0, "", 0))
        if gain <= 0.0:
            strongest = max(level.eps_w for of in levels.values() for level in of)
            raise LodesetError(
                f"remove {share:g}: at the strongest penalty of sweep, {strongest:g}, {removed:.1%} of the parameters go: ask for less, or put "
                "stronger ones into sweep"
            )
        at[name], kept[name] = to, levels[name][to].kept
    return {name: of[at[name]].eps_w for name, of in levels.items()}


def _gain(sizes: Sizes, kept: Mapping[str, float], name: str, now: Level, to: Level) -> float:
    """Parameters saved for what is lost by a step of one group."""
    saved = sizes.parameters(kept, name) - sizes.parameters({**kept, name: to.kept}, name)
    return saved / max(to.lost - now.lost, LEAST_LOSS)
