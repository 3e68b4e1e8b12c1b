"""Sums that layers' outputs go into, in forward passes of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodeset.pruning.units.residual_sums import Call, watched

Forward = Callable[["Layers", Tensor], Any]


class Layers(nn.Module):
    """Linear layers a, b and c of width 4, a gain a channel, and a forward pass that is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.gain = nn.Parameter(torch.rand(4) + 0.5)
        self.given = forward

    def forward(self, x: Tensor) -> Any:
        return self.given(self, x)


def in_place(m: Layers, x: Tensor) -> Tensor:
    y = m.a(x)
    y += x
    return F.relu(y, inplace=True)


SUMS: dict[str, tuple[Forward, Callable[[Layers, Tensor], Tensor]]] = {
    "x + y": (lambda m, x: x + m.a(x), lambda m, x: x),
    "y + x": (lambda m, x: m.a(x) + x, lambda m, x: x),
    "in place": (in_place, lambda m, x: x),
    "into x": (lambda m, x: x.clone().add_(m.a(x)), lambda m, x: x),
    "a function": (lambda m, x: torch.add(x, m.a(x)), lambda m, x: x),
    "alpha": (lambda m, x: torch.add(x, m.a(x), alpha=0.5), lambda m, x: x / 0.5),
    "alpha of the stream": (lambda m, x: torch.add(m.a(x), x, alpha=0.5), lambda m, x: x * 0.5),
    "a gain": (lambda m, x: x + m.gain * m.a(x), lambda m, x: x / m.gain),
    "a gain seen from elsewhere": (lambda m, x: x + m.a(x).mul_(m.gain.view(1, 4)), lambda m, x: x / m.gain),
    "numbers": (lambda m, x: x + 3 * (m.a(x) / 2), lambda m, x: x / 1.5),
    "a constant more": (lambda m, x: x + (m.a(x) + m.gain), lambda m, x: x),
    "dropout": (lambda m, x: x + F.dropout(m.a(x), 0.5, training=False), lambda m, x: x),
    "a shortcut that comes later": (
        lambda m, x: m.a(x) + F.pad(x[:, :2], (0, 2)),
        lambda m, x: F.pad(x[:, :2], (0, 2)),
    ),
    "the same tensor again": (lambda m, x: m.a(x) + x.contiguous(), lambda m, x: x),
    "the later of two branches": (lambda m, x: m.b(x) + m.a(x), lambda m, x: m.b(x)),
}


@pytest.mark.parametrize("name", SUMS)
def test_what_an_output_is_added_to(name: str) -> None:
    forward, expected = SUMS[name]
    call = seen(forward, ["b", "a"])
    assert call.added is not None and call.factor is not None and not call.shared
    model, x = Layers(forward), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(call.added / call.factor, expected(model, x))
        torch.testing.assert_close(call.y, model.a(x))


NONE: dict[str, Forward] = {
    "no sum": lambda m, x: m.a(x),
    "a gate": lambda m, x: x + m.a(x) * x.sigmoid(),
    "something in between": lambda m, x: x + F.relu(m.a(x)),
    "overwritten": lambda m, x: x + F.relu_(m.a(x)),
    "another shape": lambda m, x: x[:1] + m.a(x),
    "the earlier of two branches": lambda m, x: m.a(x) + m.b(x),
    "what depends on it": lambda m, x: (y := m.a(x)) + m.b(y),
    "itself": lambda m, x: (y := m.a(x)) + y,
    "dropout that is on": lambda m, x: x + F.dropout(m.a(x), 0.5, training=True),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_sum_of_a_residual_stream(name: str) -> None:
    assert seen(NONE[name], ["a", "b"]).added is None


def test_an_output_that_goes_elsewhere_too() -> None:
    assert seen(lambda m, x: (x + (y := m.a(x))) * y.mean(), ["a"]).shared
    assert seen(lambda m, x: (x + (y := m.a(x)), y), ["a"]).shared
    assert seen(lambda m, x: (x + (y := m.a(x))) + (x.sigmoid() + y), ["a"]).shared
    assert seen(into_a_buffer, ["a"]).shared
    assert not seen(lambda m, x: x + m.a(x), ["a"]).shared


def into_a_buffer(m: Layers, x: Tensor) -> Tensor:
    buffer, y = torch.zeros(5, 8), m.a(x)
    buffer[:, :4] = y
    return torch.cat([x + y, buffer], dim=1)


def test_a_buffer_that_outputs_are_written_into_is_no_constant() -> None:
    def forward(m: Layers, x: Tensor) -> Tensor:
        buffer = torch.zeros(5, 4)
        buffer[:, :2].add_(m.b(x)[:, :2])
        return buffer * m.a(x) + x

    assert seen(forward, ["b", "a"]).added is None


def seen(forward: Forward, order: list[str]) -> Call:
    images = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    calls, _ = watched(Layers(forward), order, ["a"], images, lambda _, y: y.clone())
    (call,) = calls["a"]
    return call


def test_the_rest_of_a_forward_pass_is_not_run() -> None:
    def forward(m: Layers, x: Tensor) -> Tensor:
        runs.append("a")
        x = x + m.a(x)
        runs.append("b")
        return x + m.b(x)

    runs: list[str] = []
    model, images = Layers(forward), torch.randn(5, 4)
    whole, last = watched(model, ["a", "b"], ["a"], images, lambda _, y: y.clone())
    assert last == ("a", 1, "added") and runs == ["a", "b"]
    again, _ = watched(model, ["a", "b"], ["a"], images, lambda _, y: y.clone(), until=last)
    assert runs == ["a", "b", "a"]
    for one, other in zip(whole["a"], again["a"], strict=True):
        assert one.added is not None and other.added is not None
        torch.testing.assert_close(one.added, other.added)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_are_called_twice() -> None:
    calls, _ = watched(
        Layers(lambda m, x: (x := x + m.a(x)) + m.a(x)), ["a"], ["a"], torch.randn(5, 4), lambda _, y: y.clone()
    )
    first, second = calls["a"]
    assert first.added is not None and second.added is None  # its stream depends on the layer itself
