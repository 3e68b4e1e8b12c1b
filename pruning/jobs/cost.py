"""Size and cost of a pruned model compared with the dense one: one row per variant."""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lodeset.pruning.choosing.variants import Variant
from lodeset.pruning.units.groups import Group, evaluating

LATENCY_BATCHES = (1, 32)
WARMUPS = 2


@dataclass(frozen=True)
class Cost:
    """Size and cost of a model."""

    parameters: int
    nonzero: int  # parameters that are not 0
    macs: int  # multiply-accumulates for one image
    channels: int  # units of the prunable groups
    latency_ms: dict[str, dict[str, float]]  # batch_1, batch_32: median and spread
    threads: int  # torch threads during the timing


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates for one image of the size of `example` [B, 3, height, width].

    Counted: convolutions and all matrix products, including those of attention however a module writes them. Not
    counted: biases, norms, activations, softmax, interpolation.
    """
    # PyTorch does not count fused attention kernels on a CPU; the plain implementation is two matrix products.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(_images(model, example, 1))
    return int(counter.get_total_flops()) // 2


def _images(model: nn.Module, example: Tensor, batch: int) -> Tensor:
    """Noise in the shape of `batch` images like `example`, on the model's device and in its precision."""
    like = next(model.parameters())
    noise = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)


def latencies_ms(
    models: Mapping[str, nn.Module], example: Tensor, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Wall-clock milliseconds of a forward pass of `batch` images, by model: median and spread (interquartile range).

    The models take turns within every round, so that a busy machine slows all of them equally. For models on the CPU.
    """
    images = {name: _images(model, example, batch) for name, model in models.items()}
    times_ms: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        for number in range(WARMUPS + rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model(images[name])
                if number >= WARMUPS:
                    times_ms[name].append(1000.0 * (time.perf_counter() - start))
    summary = {}
    for name, times in times_ms.items():
        first, _, third = statistics.quantiles(times, n=4, method="inclusive")
        summary[name] = {"median": statistics.median(times), "spread": third - first}
    return summary


def measure(
    models: Mapping[str, nn.Module], channels: Mapping[str, int], example: Tensor, rounds: int = 9
) -> dict[str, Cost]:
    """Size and cost of each model for images like `example` [B, 3, height, width]; latencies as in `latencies_ms`."""
    latency = {batch: latencies_ms(models, example, batch, rounds) for batch in LATENCY_BATCHES}
    return {
        name: Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            nonzero=sum(int(torch.count_nonzero(p)) for p in model.parameters()),
            macs=count_macs(model, example),
            channels=channels[name],
            latency_ms={f"batch_{batch}": latency[batch][name] for batch in LATENCY_BATCHES},
            threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }


def shares(pruned: nn.Module, dense: nn.Module, channels: Mapping[str, int], example: Tensor) -> dict[str, object]:
    """Fields of every row of the report, as plain values for JSON; shares lie between 0 and 1. `channels` of `pruned`
    and `dense`.

    The `Cost` of the pruned model, and under `dense` that of the dense model, timed together with it; the shares of
    parameters, MACs and channels removed; `density`, the share of the dense model's parameters that remain and are not
    zero.
    """
    cost = measure({"pruned": pruned, "dense": dense}, channels, example)
    after, before = cost["pruned"], cost["dense"]
    return {
        **asdict(after),
        "parameters_removed": 1.0 - after.parameters / before.parameters,
        "macs_removed": 1.0 - after.macs / before.macs,
        "channels_removed": 1.0 - after.channels / before.channels if before.channels else 0.0,
        "density": after.nonzero / before.parameters,
        "dense": asdict(before),
    }


def row(
    chosen: Variant, groups: Sequence[Group], pruned: nn.Module, dense: nn.Module, example: Tensor
) -> dict[str, object]:
    """The report row of one variant of a sweep (see `shares`); groups that the variant does not prune are whole."""
    units = {g.name: len(chosen.layers[g.name].keep) if g.name in chosen.layers else g.units for g in groups}
    channels = {"pruned": sum(units.values()), "dense": sum(group.units for group in groups)}
    return {
        "method": chosen.method,
        **shares(pruned, dense, channels, example),
        "units": units,
        "unexplained": chosen.unexplained,
        "converged": chosen.converged,
    }
