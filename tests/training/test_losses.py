"""Each loss against plain loops over numbers; reductions over two real processes against one."""

import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lodeset.training.losses import ibot
from lodeset.training.losses.centering import centred
from lodeset.training.losses.dino import dino_loss
from lodeset.training.losses.ibot import ibot_loss
from lodeset.training.losses.koleo import koleo_loss, nearest_distances
from lodeset.training.losses.sinkhorn import sinkhorn_knopp
from lodeset.training.ssl import average_gradients


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_cross_entropy(target: Tensor, scores: Tensor, temperature: float) -> float:
    exponentials = [math.exp(float(s) / temperature) for s in scores]
    return -sum(float(t) * math.log(e / sum(exponentials)) for t, e in zip(target, exponentials, strict=True))


def loop_sinkhorn(scores: Tensor, temperature: float, iterations: int) -> np.ndarray:
    """The published order of operations on Q [K, B], in float64."""
    q = np.exp(scores.double().numpy() / temperature).T
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes
        for b in range(rows):
            q[:, b] = q[:, b] / q[:, b].sum() / rows
    balanced: np.ndarray = (q * rows).T
    return balanced


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return torch.tanh(random(*shape, seed=seed))


def test_dino_loss_is_the_sum_over_pairs_of_views() -> None:
    student, teacher = random(3, 4, 5), torch.softmax(random(2, 4, 5, seed=1), -1)
    for skip in (False, True):
        expected = sum(
            loop_cross_entropy(teacher[u, b], student[v, b], 0.1) / 4
            for u in range(2)
            for v in range(3)
            for b in range(4)
            if not (skip and u == v)
        )
        assert math.isclose(float(dino_loss(student, teacher, 0.1, skip)), expected, rel_tol=1e-5)


def test_ibot_loss_weighs_each_crop_alike() -> None:
    masks = torch.tensor([[True, True, True], [False, False, False], [False, True, False]])
    student, teacher = random(4, 5), torch.softmax(random(4, 5, seed=1), -1)
    expected, row = 0.0, 0
    for crop in masks:
        count = int(crop.sum())
        for _ in range(count):
            expected += loop_cross_entropy(teacher[row], student[row], 0.1) / count / len(masks)
            row += 1
    assert math.isclose(float(ibot_loss(student, teacher, masks, 0.1)), expected, rel_tol=1e-5)


def test_ibot_loss_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = random(4, 9) > 0
    found = []
    for chunk in (ibot.CHUNK, 5 * 3):  # three rows of five prototypes
        monkeypatch.setattr(ibot, "CHUNK", chunk)
        student = random(int(masks.sum()), 5).requires_grad_()
        loss = ibot_loss(student, torch.softmax(random(int(masks.sum()), 5, seed=1), -1), masks, 0.1)
        torch.autograd.backward(loss)
        assert student.grad is not None
        found.append((loss.detach(), student.grad))
    torch.testing.assert_close(found[0], found[1])
    assert int(masks.sum()) > 3


def test_ibot_loss_without_masks_is_zero() -> None:
    assert float(ibot_loss(random(0, 5), random(0, 5), torch.zeros(2, 3, dtype=torch.bool), 0.1)) == 0


def test_koleo_is_the_log_distance_to_the_nearest_other_row() -> None:
    features = random(7, 4)
    rows = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    nearest = [min(np.linalg.norm(a - b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    np.testing.assert_allclose(nearest_distances(features).numpy(), nearest, rtol=1e-4)
    assert math.isclose(float(koleo_loss(features)), -np.mean(np.log(nearest)), rel_tol=1e-4)


def test_koleo_of_identical_rows_has_finite_gradients() -> None:
    features = torch.ones(3, 4, requires_grad=True)
    torch.autograd.backward(koleo_loss(features))
    assert features.grad is not None and bool(torch.isfinite(features.grad).all())


def test_sinkhorn_equals_the_loops_and_evens_out_prototypes() -> None:
    scores = cosines(12, 5)
    expected = loop_sinkhorn(scores, 0.07, 3)
    np.testing.assert_allclose(sinkhorn_knopp(scores, 0.07).numpy(), expected, rtol=1e-4, atol=1e-7)
    balanced = sinkhorn_knopp(scores, 0.2, iterations=100)
    np.testing.assert_allclose(balanced.sum(1).numpy(), 1, rtol=1e-5)
    np.testing.assert_allclose(balanced.sum(0).numpy(), 12 / 5, rtol=1e-3)


def test_sinkhorn_stays_finite_at_the_sharpest_temperature() -> None:
    scores = torch.full((4, 6), -1.0)
    scores[:, 0] = 1.0
    targets = sinkhorn_knopp(scores, 0.02)
    assert bool(torch.isfinite(targets).all())
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-5)


def test_softmax_centering_equals_the_loops() -> None:
    """Probabilities are of scores less the mean so far; the mean then takes these scores in."""
    center = torch.linspace(-0.2, 0.2, 5)
    before = center.clone()
    for seed in range(3):
        scores = cosines(12, 5) + 0.1 * seed
        expected = np.zeros((12, 5))
        for row in range(12):
            for k in range(5):
                expected[row, k] = math.exp((float(scores[row, k]) - float(before[k])) / 0.05)
            expected[row] /= expected[row].sum()
        mean = [sum(float(scores[row, k]) for row in range(12)) / 12 for k in range(5)]
        np.testing.assert_allclose(centred(scores, center, 0.05, 0.9).numpy(), expected, rtol=1e-4)
        before = 0.9 * before + 0.1 * torch.tensor(mean)
        torch.testing.assert_close(center, before)
    centred(torch.zeros(0, 5), center, 0.05, 0.9)  # no masked patch in a batch
    torch.testing.assert_close(center, before)


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    scores = cosines(12, 5)
    uneven = scores[:9] if rank == 0 else scores[9:]
    none_here = scores if rank == 0 else scores[:0]
    center, center_none = torch.zeros(5), torch.zeros(5)
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    average_gradients([parameter], group, 2)
    rows = random(8, 4)
    mine = (rows[:4] if rank == 0 else rows[4:]).clone().requires_grad_()
    koleo = koleo_loss(mine, group)
    torch.autograd.backward(koleo)
    assert mine.grad is not None
    torch.save(
        {
            "uneven": sinkhorn_knopp(uneven, 0.07, 3, group),
            "none_here": sinkhorn_knopp(none_here, 0.07, 3, group),
            "centred": centred(uneven, center, 0.07, 0.9, group),
            "centred_none_here": centred(none_here, center_none, 0.07, 0.9, group),
            "center": center,
            "center_none_here": center_none,
            "gradient": parameter.grad,
            "koleo": koleo.detach(),
            "koleo_gradient": mine.grad / 2,  # the mean over processes, as `average_gradients` takes it
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_two_processes, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()  # where it hangs
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = sinkhorn_knopp(cosines(12, 5), 0.07)
    for name in ("uneven", "none_here"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole)
    center = torch.zeros(5)
    softmax = centred(cosines(12, 5), center, 0.07, 0.9)
    for name in ("centred", "centred_none_here"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), softmax)
    for found in (first, second):
        torch.testing.assert_close(found["center"], center)
        torch.testing.assert_close(found["center_none_here"], center)
    torch.testing.assert_close(first["gradient"], torch.tensor([1.5, 3.0, 4.5]))
    rows = random(8, 4).requires_grad_()
    koleo = koleo_loss(rows)
    torch.autograd.backward(koleo)
    torch.testing.assert_close(first["koleo"], koleo.detach())
    torch.testing.assert_close(second["koleo"], koleo.detach())
    torch.testing.assert_close(torch.cat([first["koleo_gradient"], second["koleo_gradient"]]), rows.grad)
    assert torch.equal(first["gradient"], second["gradient"])
