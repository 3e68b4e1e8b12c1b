"""Layers in a basis in which their inputs are white: they stay what they are, and learn as if inputs were independent."""

import copy
from collections.abc import Iterable

import pytest
import torch
from networks import LeNet, images, shaken, vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lodeset.pruning.jobs.distil import towards
from lodeset.pruning.jobs.judging import output_change
from lodeset.pruning.learning.loop import Recipe
from lodeset.pruning.learning.whitening import moments_of, whitened
from lodeset.pruning.units.groups import outputs_of


def white(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if parametrize.is_parametrized(layer, "weight")}


def correlated(count: int, columns: int = 24) -> Tensor:
    """[count, columns], neighbours correlated at .99, as AR(1) gives them."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(count, columns, generator=generator)
    for column in range(1, columns):
        found[:, column] = 0.99 * found[:, column - 1] + (1 - 0.99**2) ** 0.5 * found[:, column]
    return found


@pytest.mark.parametrize("network", [LeNet(), vit(), vit("swiglu")])
def test_a_network_computes_the_same_within_and_is_the_same_after(network: nn.Module) -> None:
    model = shaken(network)
    batch = images(512)
    before, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(batch)
    kinds = [type(module) for module in model.modules()]
    with whitened(model, batch.split(256), seed=0):
        assert white(model) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        within = model(batch)
    for one, other in zip(outputs_of(within), outputs_of(expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))
    after = model.state_dict()
    assert set(after) == set(before) and [type(module) for module in model.modules()] == kinds
    assert all(
        torch.allclose(after[name], before[name], atol=1e-4 * float(before[name].abs().max())) for name in before
    )


def test_moments_are_those_of_all_that_a_layer_takes() -> None:
    layer = nn.Conv2d(3, 2, 3, padding=1)
    batch = images(6)[..., :4, :4]  # 16 positions an image: none is left out
    (taken,) = moments_of(nn.Sequential(layer), ["0"], batch.split(4), seed=0).values()
    rows = nn.functional.unfold(batch, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    assert torch.allclose(taken.squares, rows.T @ rows / len(rows)) and torch.allclose(taken.mean, rows.mean(0))
    assert (taken.rows, taken.rows_a_batch) == (6 * 16, 4 * 16)


def test_a_square_loss_is_equally_steep_in_all_directions() -> None:
    """Of a linear layer: the Hessian of the mean square is the second moments in its own basis, and the identity, times s^2, in the white one."""
    x, layer = correlated(4_000).double(), nn.Linear(24, 3, bias=False).double()
    model = nn.Sequential(layer)

    def spread() -> float:
        ((name, parameter),) = model.named_parameters()

        def loss(weight: Tensor) -> Tensor:
            return torch.func.functional_call(model, {name: weight.view_as(parameter)}, (x,)).square().mean()

        values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, parameter.detach().flatten()))
        return float(values.max() / values.min())

    assert spread() > 1_000
    with whitened(model, x.split(500), seed=0):
        assert spread() < 1.5


class Rows:
    """Correlated inputs to learn from."""

    x = correlated(2_000)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(len(self.x), (2, 32), generator=torch.Generator().manual_seed(step))
        return self.x[drawn], torch.full((32,), -1)


def test_correlated_inputs_are_learned_from_in_fewer_steps() -> None:
    torch.manual_seed(0)
    teacher, start = nn.Sequential(nn.Linear(24, 8)), nn.Sequential(nn.Linear(24, 8))
    recipe = Recipe(200, 3e-2, 0.0, 0.1, 0)
    student = copy.deepcopy(start)
    towards(teacher, student, Rows(), recipe)
    plain = copy.deepcopy(start)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=recipe.lr, weight_decay=0.0)
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * recipe.factor(step)
        batch = Rows().at(step)[0].flatten(0, 1)
        loss = (plain(batch) - teacher(batch)).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert change(student, teacher) < 0.02 * change(plain, teacher)


def test_a_learning_rate_is_relative_to_what_a_layer_gives() -> None:
    left = []
    for scale in (1e-3, 1.0, 1e3):
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(24, 8, bias=False)) for _ in range(2))
        with torch.no_grad():
            for one in (teacher, student):
                one[0].weight.mul_(scale)
        towards(teacher, student, Rows(), Recipe(20, 1e-2, 0.0, 0.1, 0))
        left.append(change(student, teacher))
    assert left[0] == pytest.approx(left[1], rel=0.01) and left[2] == pytest.approx(left[1], rel=0.01)


def change(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        found, expected = one(Rows.x), other(Rows.x)
    return output_change(found, expected)


class Strange(nn.Module):
    """Layers that are left as they are, and one, `last`, that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, groups=3)
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.made = parametrizations.weight_norm(nn.Linear(6, 6))
        self.zero, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.zeros_(self.zero.weight)
        # Uses the weights of a layer that it does not call.
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 6))
        self.of_token, self.last, self.wide = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(300, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(x).mean(dim=(2, 3))
        x = self.zero(self.made(self.again(self.first(x)))) + x + self.of_token(self.token)
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        found: Tensor = self.last(x) + self.wide(x.repeat(1, 50))
        return found


def test_what_cannot_be_written_otherwise_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Strange().eval()
    with whitened(model, iter([images(300), images(200)]), seed=0):
        assert white(model) == {"made", "last"}  # `made` was before; 500 rows are too few for the columns of `wide`
        assert len(model.made.parametrizations.weight) == 1
        model(images(4)).sum().backward()
    assert model.again.weight is model.first.weight and white(model) == {"made"}


def test_a_failure_leaves_the_network_as_it_was() -> None:
    def broken() -> Iterable[Tensor]:
        yield images(2)
        raise OSError("the disk went away")

    model = shaken(LeNet())
    with pytest.raises(ZeroDivisionError), whitened(model, [images(512)], seed=0):
        assert white(model)
        raise ZeroDivisionError
    assert not white(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OSError), whitened(model, broken(), seed=0):
        raise AssertionError("never within")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
