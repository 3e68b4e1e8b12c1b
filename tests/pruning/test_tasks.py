"""What tasks lose, against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.tasks import DINO_TEMPERATURE, STUDENT_TEMPERATURE, SWAV_EPSILON, Dino, Swav

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
    prototypes = F.normalize(task.head.prototypes.detach(), dim=-1)

    def embedded(views: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [F.normalize(task.head.mlp(view.flatten(1)), dim=-1) for view in views]

    queue: list[list[Tensor]] = [[], []]
    for step, share in enumerate((0.0, 0.4, 0.6, 0.9)):
        views = views_of(step)
        loss = float(task(lambda pixels: pixels.flatten(1), views, codes(), torch.Generator(), share).detach())
        targets, student = [], []
        for view, found in enumerate(embedded(views)):
            waiting = queue[view] if share >= 0.5 else []
            scores = [(prototypes @ one).tolist() for one in (*found, *waiting)]
            targets.append(assigned(scores, SWAV_EPSILON)[:IMAGES])
            student.append(found @ prototypes.T)
            queue[view] = [*found, *queue[view]][:8]
        assert loss == pytest.approx(swapped(student, targets), rel=1e-5)
    assert not torch.equal(task.queued[0], task.queued[1]) and task.filled == 8


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
