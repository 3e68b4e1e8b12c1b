"""BatchNorm folded into convolutions."""

import torch
from networks import Residual, images, shaken
from torch import Tensor, nn

from lodeset.pruning.units.folding import folded
from lodeset.pruning.units.groups import find_groups, max_difference


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_residual_network_without_its_norms_computes_the_same() -> None:
    model = shaken(Residual()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = folded(model, images(2))
    assert (norms(model), norms(whole)) == (6, 0)
    assert max_difference(whole, model, images(5, seed=3)) <= 1e-4
    assert model.training and all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    units = [[group.units for group in find_groups(one, images(2)).prunable] for one in (model, whole)]
    assert units[0] == units[1]


class Shared(nn.Module):
    """A convolution whose output is read beside its norm; a norm that two convolutions share; one in front of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.own, self.shared, self.front = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.own(x)
        x = self.shared(self.second(x)) + self.shared(self.third(x))
        return torch.as_tensor(self.front(x))


def test_norms_that_are_not_a_convolution_s_own_stay() -> None:
    model = shaken(Shared())
    whole = folded(model, images(2))
    assert norms(whole) == 3
    assert max_difference(whole, model, images(2)) == 0.0
