"""What tasks lose, against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodeset.pruning.learning.tasks import DINO_TEMPERATURE, STUDENT_TEMPERATURE, SWAV_EPSILON, Dino, Swav

IMAGES, WIDTH = 6, 12


def assigned(scores: list[list[float]], temperature: float) -> list[list[float]]:
    """Three rounds of Sinkhorn-Knopp, rows last, by loops."""
    rows, columns = len(scores), len(scores[0])
    found = [[math.exp(score / temperature) for score in row] for row in scores]
    for _ in range(3):
        for j in range(columns):
            total = sum(row[j] for row in found)
            for row in found:
                row[j] /= total * columns
        for row in found:
            total = sum(row)
            row[:] = [value / (total * rows) for value in row]
    return [[value * rows for value in row] for row in found]


def swapped(student: list[Tensor], targets: list[list[list[float]]]) -> float:
    """Mean over both views of the cross-entropy between a view's scores and what the other view was assigned to."""
    total = 0.0
    for view in (0, 1):
        for scores, wanted in zip(student[view].tolist(), targets[1 - view], strict=True):
            whole = sum(math.exp(score / STUDENT_TEMPERATURE) for score in scores)
            logs = [math.log(math.exp(score / STUDENT_TEMPERATURE) / whole) for score in scores]
            total -= sum(p * log for p, log in zip(wanted, logs, strict=True)) / len(student[view])
    return total / 2


def views_of(seed: int) -> Tensor:
    return torch.randn(2, IMAGES, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def codes() -> Tensor:
    return torch.full((IMAGES,), -1)


def test_swav_with_and_without_what_was_seen_before() -> None:
    torch.manual_seed(0)
    task = Swav(WIDTH, prototypes=5, queue=8, queue_from=0.5)
    first, _, _, last = task.projection
    prototypes = F.normalize(task.prototypes.detach(), dim=-1)

    def scored(both: Tensor) -> list[Tensor]:
        """Of features [2, n, D]: both views go through the BatchNorm together."""
        with torch.no_grad():
            hidden = first(both.flatten(0, 1))
            centred = hidden - hidden.mean(0)
            projected = last((centred / (centred.square().mean(0) + 1e-5).sqrt()).clamp(min=0))
            return list((F.normalize(projected, dim=-1) @ prototypes.T).view(2, both.shape[1], -1))

    queue = torch.zeros(2, 0, WIDTH)
    for step, share in enumerate((0.0, 0.4, 0.6, 0.9)):
        views = views_of(step)
        loss = float(task(lambda pixels: pixels.flatten(1), views, codes(), torch.Generator(), share).detach())
        found = views.flatten(2)
        among = scored(torch.cat([found, queue], dim=1)) if share >= 0.5 else scored(found)
        targets = [assigned(view.tolist(), SWAV_EPSILON)[:IMAGES] for view in among]
        assert loss == pytest.approx(swapped(scored(found), targets), rel=1e-5)
        queue = torch.cat([found, queue], dim=1)[:, :8]
    assert not torch.equal(task.queued[0], task.queued[1]) and task.filled == 8


def test_swav_tells_images_apart_with_a_queue_while_its_head_learns() -> None:
    """By the optimiser that masks learn with, on features most of which all images share. A queue of what the head made before, and a head
    without BatchNorm, end at the loss of telling nothing apart, log K (.97 and 1.00 of it; this one .65)."""
    torch.manual_seed(0)
    task = Swav(WIDTH, prototypes=200, queue=512, queue_from=0.2)
    optimiser = torch.optim.SGD(task.parameters(), 0.1, momentum=0.9)
    drawn = torch.Generator().manual_seed(1)
    losses = []
    for step in range(60):
        images = torch.randn(1, 32, WIDTH, generator=drawn) + 3.0
        views = (images + 0.3 * torch.randn(2, 32, WIDTH, generator=drawn)).view(2, 32, 3, 2, 2)
        loss = task(lambda pixels: pixels.flatten(1), views, torch.full((32,), -1), torch.Generator(), step / 60)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.8 * math.log(200)


def test_dino_of_two_views_and_a_teacher_that_follows() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, WIDTH))
    task = Dino(network, WIDTH)
    task.begin(network)
    with torch.no_grad():
        network[1].weight.add_(0.1)  # type: ignore[operator]
        task.head.prototypes.add_(0.01 * torch.randn_like(task.head.prototypes))
    views = views_of(0)
    loss = float(task(network, views, codes(), torch.Generator(), 0.0).detach())
    with torch.no_grad():
        student = [task.head(network(view)) for view in views]
        rows = [task.teacher_head(task.teacher(view)).tolist() for view in views]
    both = assigned(rows[0] + rows[1], DINO_TEMPERATURE)
    assert loss == pytest.approx(swapped(student, [both[:IMAGES], both[IMAGES:]]), rel=1e-4)

    before = [p.clone() for p in task.teacher.parameters()]
    task.follow(network, 0.0)
    for old, new, now in zip(before, task.teacher.parameters(), network.parameters(), strict=True):
        assert torch.allclose(new, 0.99 * old + 0.01 * now, atol=1e-6)
    task.follow(network, 1.0)  # at the end the teacher stands still
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before, task.teacher.parameters(), strict=True))
