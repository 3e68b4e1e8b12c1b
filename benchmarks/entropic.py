"""The entropic solver on a planted problem: what it finds, and what its steps cost.

    python benchmarks/entropic.py [SEEDS]

n = 256 channels of which 32 make m = 64 outputs, T = 4,096 positions, AR(1) correlation .7 between neighbours, 5 % noise; the solver is not
told the count. Costs are thread-CPU seconds, medians of REPEATS interleaved runs on one thread; slopes are least squares over doublings.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from lodeset.pruning.choosing.entropic import Layer, path, simplex_weights
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.moments import Array, Gram, Indices

N, TRUE, M, T, RHO, NOISE = 256, 32, 64, 4_096, 0.7, 0.05
EPS = 1e-3
REPEATS = 5
STRENGTHS = tuple(float(e) for e in np.geomspace(1e-4, 1e-1, 10))


def planted(seed: int, n: int = N, t: int = T) -> tuple[Array, Array, Indices]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(t, n))
    for i in range(1, n):
        x[:, i] = RHO * x[:, i - 1] + np.sqrt(1 - RHO**2) * x[:, i]
    support = np.sort(rng.choice(n, n * TRUE // N, replace=False))
    y = x[:, support] @ rng.normal(size=(len(support), M))
    return x, y + NOISE * y.std() * rng.normal(size=y.shape), support


def layer_of(x: Array, y: Array) -> Layer:
    return Layer("planted", gram_of(x, y).moments("planted"), np.arange(x.shape[1]))


def gram_of(x: Array, y: Array) -> Gram:
    return Gram.from_activations(torch.from_numpy(x), torch.from_numpy(y))


def seconds(*steps: Callable[[], object]) -> list[float]:
    """Of each step, taking turns, after one turn to warm up."""
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(REPEATS + 1):
        for which, step in enumerate(steps):
            started = time.thread_time()
            step()
            if turn:
                taken[which].append(time.thread_time() - started)
    return [statistics.median(some) for some in taken]


def slope(sizes: list[int], taken: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])


def told(name: str, sizes: list[int], taken: list[float]) -> str:
    return f"{name} {', '.join(f'{1e3 * s:.2f}' for s in taken)} ms, slope {slope(sizes, taken):.2f}"


def main() -> None:
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for sign in (-1, 1):
        exact, kept = 0, []
        for seed in range(seeds):
            x, y, support = planted(seed)
            solution = path([layer_of(x, y)], N, PruneJob(sweep=(EPS,), entropy_sign=sign))[EPS]
            exact += np.array_equal(solution.support, support)
            kept.append(len(solution.support))
        print(
            f"entropy sign {sign:+d}: support exact in {exact} of {seeds}; channels kept {min(kept)} to {max(kept)} of {TRUE} true"
        )

    sizes = [2_048, 4_096, 8_192, 16_384]
    data = [planted(0, t=t) for t in sizes]
    grams = seconds(*[lambda d=d: gram_of(d[0], d[1]) for d in data])
    layers = [layer_of(x, y) for x, y, _ in data]
    solves = seconds(*[lambda one=one: path([one], N, PruneJob(sweep=(EPS,))) for one in layers])
    print(f"against T {sizes}: {told('Gram', sizes, grams)}; {told('solve', sizes, solves)}")

    sizes = [128, 256, 512, 1_024]
    data = [planted(0, n=n) for n in sizes]
    grams = seconds(*[lambda d=d: gram_of(d[0], d[1]) for d in data])
    layers = [layer_of(x, y) for x, y, _ in data]
    job = PruneJob(sweep=(EPS,))
    solves = seconds(*[lambda one=one, n=n: path([one], n, job) for one, n in zip(layers, sizes, strict=True)])
    rng = np.random.default_rng(0)
    costs = [rng.random(n) ** 4 for n in sizes]
    steps = seconds(*[lambda c=c: simplex_weights(c, np.full(len(c), 1 / len(c)), EPS, -1) for c in costs])
    told_all = (told("Gram", sizes, grams), told("solve", sizes, solves), told("w-step", sizes, steps))
    print(f"against n {sizes}: {'; '.join(told_all)}")

    x, y, _ = planted(0)
    one, ten = seconds(
        lambda: path([layer_of(x, y)], N, PruneJob(sweep=(EPS,))),
        lambda: path([layer_of(x, y)], N, PruneJob(sweep=STRENGTHS)),
    )
    print(f"moments and one strength {one:.3f} s, and ten {ten:.3f} s: {ten / one:.2f} times")


if __name__ == "__main__":
    main()
