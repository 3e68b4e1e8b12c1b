"""Evaluate frozen features with linear classifiers: the published grid of heads, all trained together.

DINOv2 (arXiv:2304.07193, section 7.1, appendix B.3): CLS of the last one or four blocks, with or without the mean patch
of the last block, times 13 learning rates; SGD without weight decay. Here features are computed once, without
augmentation, and a step draws one batch for all heads. The published result is that of the best head on the evaluated
images; here a fifth of the gallery selects the head (among equally accurate heads the one with the lower loss), which
is then trained again on the whole gallery.

Shapes: n images, D width, C classes, R learning rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # at a batch of 256
BATCH, MOMENTUM, INITIAL = 256, 0.9, 0.01
HELD_OUT = 5  # every fifth gallery image is held out to select the head


@dataclass(frozen=True)
class Probe:
    """The selected head: its features, its learning rate, and its accuracy on the test images."""

    accuracy: float
    features: str
    lr: float


def probe_features(layers: NDArray[np.float32], patches: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The inputs of heads, by name: layers [n, 4, D] are the CLS tokens of the last four blocks, patches [n, D] the
    mean patch of the last block.
    """
    last, four = layers[:, -1], layers.reshape(len(layers), -1)
    return {
        "cls": last,
        "cls + patches": np.concatenate([last, patches], axis=1),
        "4 cls": four,
        "4 cls + patches": np.concatenate([four, patches], axis=1),
    }


def linear_probe(
    inputs: Mapping[str, NDArray[np.float32]],
    labels: Sequence[str],
    gallery: Sequence[int],
    test: Sequence[int],
    steps: int,
    seed: int = 0,
) -> Probe:
    """Train every head on four fifths of the gallery, select one on the rest, train it on the whole gallery, and test
    it.

    inputs: features [n, any width] by name; labels [n]; gallery and test are rows of both.
    """
    codes = torch.from_numpy(np.unique(np.asarray(labels), return_inverse=True)[1])
    classes = int(codes.max()) + 1
    rows = np.random.default_rng(seed).permutation(np.asarray(gallery))
    held_out, rest = rows[::HELD_OUT], np.setdiff1d(rows, rows[::HELD_OUT])
    if len(rest) == 0:
        rest = held_out
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)).float() for name, values in inputs.items()}
    best: tuple[float, float, str, int] | None = None
    heads = _trained({name: x[rest] for name, x in tensors.items()}, codes[rest], classes, LEARNING_RATES, steps, seed)
    for name, x in tensors.items():
        right, loss = _judged(x[held_out], codes[held_out], *heads[name])
        for number in range(len(LEARNING_RATES)):
            candidate = (float(right[number]), -float(loss[number]), name, number)
            best = candidate if best is None or candidate[:2] > best[:2] else best
    if best is None:
        raise ValueError("no features were given")
    _, _, name, number = best
    lr = LEARNING_RATES[number]
    whole = _trained({name: tensors[name][rows]}, codes[rows], classes, (lr,), steps, seed)
    return Probe(float(_judged(tensors[name][test], codes[test], *whole[name])[0][0]), name, lr)


def _trained(
    inputs: Mapping[str, Tensor], codes: Tensor, classes: int, rates: Sequence[float], steps: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights [R, C, width] and biases [R, C] of R heads on each input."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH, len(codes))
    heads: dict[str, tuple[Tensor, Tensor]] = {}
    for name, x in inputs.items():
        first = INITIAL * torch.randn(classes, x.shape[1], generator=generator)
        heads[name] = (
            first.repeat(len(rates), 1, 1).requires_grad_(),
            torch.zeros(len(rates), classes, requires_grad=True),
        )
    parameters = [tensor for pair in heads.values() for tensor in pair]
    velocities = [torch.zeros_like(tensor) for tensor in parameters]
    scaled = torch.tensor(rates) * batch / 256
    for step in range(steps):
        drawn = torch.randint(len(codes), (batch,), generator=generator)
        targets = codes[drawn].expand(len(rates), batch).flatten()
        # A sum over heads, so no head's gradient depends on another head.
        total = torch.stack(
            [
                F.cross_entropy(_scores(inputs[name][drawn], *pair).flatten(0, 1), targets) * len(rates)
                for name, pair in heads.items()
            ]
        ).sum()
        gradients = torch.autograd.grad(total, parameters)
        decay = (1 + np.cos(np.pi * step / steps)) / 2
        with torch.no_grad():
            for tensor, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient)
                tensor.sub_(velocity * (scaled * decay).view(-1, *[1] * (tensor.dim() - 1)))
    return {name: (weights.detach(), biases.detach()) for name, (weights, biases) in heads.items()}


def _scores(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Scores [R, b, C] of x [b, width]."""
    return torch.einsum("bd,rcd->rbc", x, weights) + biases[:, None]


def _judged(x: Tensor, codes: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's share of correctly labeled rows, [R], and its mean cross-entropy on them, [R]."""
    scores = _scores(x, weights, biases)
    loss = F.cross_entropy(scores.transpose(1, 2), codes.expand(len(scores), -1), reduction="none").mean(dim=1)
    return (scores.argmax(dim=2) == codes).float().mean(dim=1), loss
