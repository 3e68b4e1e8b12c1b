"""What the nodes of a cluster can give, in resources as Ray counts them ({"CPU": 16.0, "GPU": 2.0}); without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def lacks(nodes: Sequence[Mapping[str, float]], asked: Sequence[Sequence[Mapping[str, float]]]) -> tuple[str, bool]:
    """What groups of workers wait for, and whether the nodes could hold each group if they were free.

    Args:
        nodes: the resources of each node.
        asked: for each group that has to start together, the resources of each worker.
    """
    if not asked:
        return "", True
    for group in asked:
        # Workers that ask for much first, on the nodes that have least: those with a GPU are left for who needs it.
        free = sorted((dict(node) for node in nodes), key=lambda node: (len(node), sum(node.values())))
        for worker in sorted(group, key=lambda one: -sum(one.values())):
            fits = next((n for n in free if all(n.get(k, 0.0) >= v for k, v in worker.items())), None)
            if fits is None:
                together = f", {len(group)} times at once" if len(group) > 1 else ""
                there = "; ".join(_amounts(node) or "nothing" for node in nodes) or "no node"
                return (
                    f"{_amounts(worker)}{together}, which no node of the Ray cluster can give (nodes: {there})",
                    False,
                )
            for name, amount in worker.items():
                fits[name] -= amount
    workers = [worker for group in asked for worker in group]
    total: dict[str, float] = {}
    for worker in workers:
        for name, amount in worker.items():
            total[name] = total.get(name, 0.0) + amount
    return f"{_amounts(total)} for {len(workers)} workers: the Ray cluster is busy", True


def _amounts(resources: Mapping[str, float]) -> str:
    named = {"memory", "object_store_memory"}
    shown = [(k, v) for k, v in sorted(resources.items()) if k not in named and not k.startswith("node:")]
    return ", ".join(f"{amount:g} {name}" for name, amount in shown)


def share_of(nodes: Sequence[int], actors: int, cores: int) -> float:
    """The cores that each of some actors may ask for so that all of them can run at the same time; `cores` at most.

    Args:
        nodes: the cores of each node.
    """
    for each in range(cores, 0, -1):
        if sum(node // each for node in nodes) >= actors:
            return each
    # More actors than cores: they take turns.
    return max(0.01, round(0.9 * sum(nodes) / max(1, actors), 2))
