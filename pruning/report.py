"""Every way of choosing and rewriting units at one sparsity, and what each costs: one row a variant.

The penalty's strength decides how many units the entropic method keeps in each layer; the baselines then keep exactly
as many in that layer, so that only the choice of units and of weights differs.

Shapes: n hidden units, m outputs, k units kept.
"""

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import LodesetError
from pruning.config import PruneJob
from pruning.entropic import Gram, Indices, Solution
from pruning.groups import Group, Groups, Replacement, evaluating, find_groups, linears
from pruning.magnitude import magnitude_scores, random_scores, top
from pruning.refit import refit

# `entropic` uses the weights that the penalised objective gives (shrunk by the L2 term); `magnitude` and `random` keep
# the dense model's; `+refit` solves least squares on the units kept.
Method = Literal["entropic", "entropic+refit", "magnitude", "magnitude+refit", "random", "random+refit"]
METHODS: tuple[Method, ...] = get_args(Method)
LATENCY_BATCHES = (1, 32)
WARMUPS = 2


@dataclass(frozen=True)
class Variant:
    """One pruned model to be: what becomes of every group, and how well that rebuilds the dense layers."""

    eps_w: float
    method: Method
    layers: dict[str, Replacement]
    unexplained: dict[str, float]  # share of each fc2's output variance lost on the calibration positions
    converged: bool  # whether every layer's solve settled within max_iterations


def variant(
    model: nn.Module,
    groups: Groups,
    grams: Mapping[str, Gram],
    job: PruneJob,
    eps_w: float,
    method: Method,
    solved: Mapping[str, Mapping[float, Solution]],
) -> Variant:
    """One variant by itself, whoever computes it and in whatever order.

    `solved` are the entropic solutions (`entropic.path`) by group and eps_w: the costly part, shared by all variants.

    Raises:
        LodesetError: eps_w is not in the sweep, or the moments are not of this model or cannot be used.
    """
    if eps_w not in job.sweep:
        raise LodesetError(f"eps_w {eps_w:g} is not in the sweep {list(job.sweep)}: choose one of these")
    layers: dict[str, Replacement] = {}
    unexplained: dict[str, float] = {}
    for group in groups.prunable:
        gram, solution = _gram(group, grams), solved[group.name][eps_w]
        new = _replacement(model, group, gram, job, solution, method)
        layers[group.name] = new
        q = np.zeros_like(solution.q)
        q[:, new.keep] = new.weight
        unexplained[group.name] = gram.moments(group.name).unexplained(q, new.bias)
    converged = all(solved[group.name][eps_w].converged for group in groups.prunable)
    return Variant(eps_w, method, layers, unexplained, converged)


def _gram(group: Group, grams: Mapping[str, Gram]) -> Gram:
    gram = grams.get(group.name)
    found = 0 if gram is None else len(gram.sum_x)
    if gram is None or found != group.units:
        raise LodesetError(
            f"{group.name}: the moments cover {found} units and the model has {group.units}: "
            "measure them again on this checkpoint"
        )
    return gram


def _replacement(
    model: nn.Module, group: Group, gram: Gram, job: PruneJob, solution: Solution, method: Method
) -> Replacement:
    fc1, fc2 = linears(model, group.name)
    criterion, _, rewrite = method.partition("+")
    keep: Indices
    if criterion == "entropic":
        keep = solution.support
    elif criterion == "magnitude":
        keep = top(magnitude_scores(fc1, fc2), len(solution.support))
    else:
        keep = top(random_scores(group.units, group.name, job.seed), len(solution.support))
    if rewrite:
        return Replacement(keep, *refit(gram, keep, group.name))
    if criterion == "entropic":
        return Replacement(keep, solution.q[:, keep], solution.bias)
    weight = fc2.weight.detach().double().cpu().numpy()
    bias = np.zeros(len(weight)) if fc2.bias is None else fc2.bias.detach().double().cpu().numpy()
    return Replacement(keep, weight[:, keep], bias)


@dataclass(frozen=True)
class Cost:
    """What a model weighs and takes."""

    parameters: int
    nonzero: int  # parameters that are not 0
    macs: int  # multiply-accumulates for one image
    channels: int  # hidden units of the prunable groups
    latency_ms: dict[str, dict[str, float]]  # batch_1, batch_32: median and spread
    threads: int  # of torch, while timing


def count_macs(model: nn.Module, input_size: int) -> int:
    """Multiply-accumulates for one image [3, input_size, input_size].

    Counted: every Linear and Conv2d, and the two products of each attention (a module with a linear `qkv`): for N
    tokens of width D, N * N * D for the scores and as many for the mix of values. Not counted: biases, norms,
    activations, softmax, interpolation.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += out.numel() * module.weight[0].numel()
        else:
            *_, tokens, width = args[0].shape
            total += 2 * tokens * tokens * width

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) or isinstance(getattr(module, "qkv", None), nn.Linear)
    ]
    try:
        with evaluating(model):
            model(_images(model, 1, input_size))
    finally:
        for handle in handles:
            handle.remove()
    return total


def _images(model: nn.Module, batch: int, size: int) -> Tensor:
    """Noise [batch, 3, size, size] on the model's device and in its precision."""
    like = next(model.parameters())
    noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)


def latencies_ms(
    models: Mapping[str, nn.Module], input_size: int, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Wall-clock milliseconds of a forward pass of `batch` images, by model: median and spread (interquartile range).

    The models take turns within every round, so that a busy machine slows all of them alike. For models on the CPU.
    """
    images = {name: _images(model, batch, input_size) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        for number in range(WARMUPS + rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model(images[name])
                if number >= WARMUPS:
                    taken[name].append(1000.0 * (time.perf_counter() - start))
    summary = {}
    for name, times in taken.items():
        first, _, third = statistics.quantiles(times, n=4, method="inclusive")
        summary[name] = {"median": statistics.median(times), "spread": third - first}
    return summary


def measure(models: Mapping[str, nn.Module], input_size: int, rounds: int = 9) -> dict[str, Cost]:
    """Size and cost of each model for images of input_size x input_size pixels; latencies as in `latencies_ms`."""
    latency = {batch: latencies_ms(models, input_size, batch, rounds) for batch in LATENCY_BATCHES}
    return {
        name: Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            nonzero=sum(int(torch.count_nonzero(p)) for p in model.parameters()),
            macs=count_macs(model, input_size),
            channels=sum(group.units for group in find_groups(model).prunable),
            latency_ms={f"batch_{batch}": latency[batch][name] for batch in LATENCY_BATCHES},
            threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }


def row(chosen: Variant, pruned: nn.Module, dense: nn.Module, input_size: int) -> dict[str, object]:
    """The report's row of one variant, as plain values for JSON; shares lie between 0 and 1.

    The `Cost` of the pruned model, and under `dense` that of the dense one, timed beside it; the shares of parameters,
    MACs and channels removed; `density`, the share of the dense model's parameters that are left and not zero.
    """
    cost = measure({"pruned": pruned, "dense": dense}, input_size)
    after, before = cost["pruned"], cost["dense"]
    return {
        "method": chosen.method,
        "eps_w": chosen.eps_w,
        **asdict(after),
        "parameters_removed": 1.0 - after.parameters / before.parameters,
        "macs_removed": 1.0 - after.macs / before.macs,
        "channels_removed": 1.0 - after.channels / before.channels,
        "density": after.nonzero / before.parameters,
        "units": {name: len(new.keep) for name, new in chosen.layers.items()},
        "unexplained": chosen.unexplained,
        "converged": chosen.converged,
        "dense": asdict(before),
    }
