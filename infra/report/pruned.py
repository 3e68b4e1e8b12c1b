"""What pruning jobs reported -> what a page shows of them: a sweep of the entropic method, or networks that were trained under masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.pictures import png_uri
from lodeset.pruning.choosing.criteria import CRITERIA

PATHS_SHOWN = 24  # groups whose path of w a page draws


@dataclass(frozen=True)
class Variant:
    """One pruned model; shares lie between 0 and 1. `dense` is the cost of the model that it came from."""

    method: str
    parameters: int
    parameters_removed: float
    macs: int
    macs_removed: float
    channels: int
    channels_removed: float
    density: float
    latency_ms: Mapping[str, Mapping[str, float]]
    knn: Mapping[str, Mapping[str, float]]
    dense: Mapping[str, Any]


@dataclass(frozen=True)
class Swept(Variant):
    """`at`: a strength, or the share of the parameters that was asked to go; then `strengths` by group, and the units kept there."""

    at: float
    units: Mapping[str, int]
    unexplained: Mapping[str, float]
    converged: bool | None
    agreement: float | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Masked(Variant):
    """`at`: the round, or the learning rate of a sweep; `kept`: the share of maskable weights that is."""

    at: float
    kept: float
    linear: Mapping[str, float]
    loss: float | None = None
    masks_bytes: int | None = None  # on disk; and of the weights that they are for, as float32
    weights_bytes: int | None = None


@dataclass(frozen=True)
class SweepReport:
    job: Mapping[str, Any]
    calibration_images: int
    skipped_modules: Mapping[str, str]
    knn_dense: Mapping[str, Mapping[str, float]]
    variants: tuple[Swept, ...]
    paths: Mapping[str, str] = field(default_factory=dict)  # PNG files in the store, by group


@dataclass(frozen=True)
class TrainedReport:
    job: Mapping[str, Any]
    skipped_modules: Mapping[str, str]
    knn_dense: Mapping[str, Mapping[str, float]]
    variants: tuple[Masked, ...]
    linear_dense: Mapping[str, float] = field(default_factory=dict)
    overlaps: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Drawn:
    """A job as a page shows it: its report, charts, the key of its methods, and the paths of w as data URIs."""

    report: SweepReport | TrainedReport
    charts: Sequence[Markup]
    legend: Sequence[tuple[str, Markup]]
    paths: Mapping[str, str]

    @property
    def at(self) -> str:
        return "learning rate" if self.report.job["method"] == "self_masking" else "round"

    @property
    def allocations(self) -> Sequence[Swept]:
        """A variant for each share of the parameters that was asked to go: what its groups keep, all methods keep."""
        swept = [one for one in self.report.variants if isinstance(one, Swept) and one.strengths]
        return list({one.at: one for one in reversed(swept)}.values())[::-1]

    @property
    def targets(self) -> Sequence[str]:
        return list(self.report.variants[0].knn) if self.report.variants else []

    @property
    def agreement(self) -> bool:
        return any(getattr(one, "agreement", None) is not None for one in self.report.variants)


Kind = TypeVar("Kind")


def report_of(tree: Mapping[str, Any]) -> SweepReport | TrainedReport:
    """What a job reported, as it lies in `report.json`."""
    if "calibration_images" in tree:
        rows = [row | {"at": row["remove"] if "remove" in row else row["eps_w"]} for row in tree["variants"]]
        return _of(SweepReport, tree, tuple(_of(Swept, row) for row in rows))
    rows = [row | {"at": row["round"] if "round" in row else row["lr"]} for row in tree["variants"]]
    return _of(TrainedReport, tree, tuple(_of(Masked, row) for row in sorted(rows, key=lambda row: row["at"])))


def _of(kind: type[Kind], tree: Mapping[str, Any], variants: tuple[Any, ...] | None = None) -> Kind:
    """A dataclass of what the tree says; more that it says is passed over."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    told = {name: value for name, value in tree.items() if name in known}
    return kind(**(told if variants is None else told | {"variants": variants}))


def drawn(report: SweepReport | TrainedReport, read: Callable[[str], bytes | None]) -> Drawn:
    """`read` gives the bytes of a file of the store."""
    methods = list(dict.fromkeys(one.method for one in report.variants))
    legend = [(method, charts.key(*_style_of(method, methods))) for method in methods]
    if isinstance(report, TrainedReport):
        return Drawn(report, _by_weights(report, methods), legend, {})
    shown = list(report.paths.items())[:PATHS_SHOWN]
    paths = {name: png_uri(data) for name, path in shown if (data := read(path))}
    return Drawn(report, _by_parameters(report, methods), legend, paths)


def smallest_k(accuracies: Mapping[str, float]) -> str:
    """The smallest k that a target was evaluated with."""
    return min(accuracies, key=int)


def _style_of(method: str, methods: Sequence[str]) -> tuple[int, charts.Line]:
    """A method's colour, and how its line is drawn."""
    criterion, _, refit = method.partition("+")
    criteria = [one.name for one in CRITERIA]
    if criterion in criteria:  # solid with refit, dashed without, dotted where it was trained again
        return criteria.index(
            criterion
        ) % charts.COLOURS, "dashed" if not refit else "dotted" if ", " in refit else "solid"
    of, _, how = method.partition(", ")
    tasks = list(dict.fromkeys(one.partition(", ")[0] for one in methods))
    return tasks.index(of) % charts.COLOURS, "dashed" if how.startswith("at random") else "solid"


def _by_parameters(one: SweepReport, methods: Sequence[str]) -> list[Markup]:
    """For each target, kNN accuracy against the share of parameters removed, a line a method; agreement where there is no target."""
    found = []
    for target, dense in one.knn_dense.items():
        k = smallest_k(dense)
        marks = [charts.Mark(f"dense {100 * dense[k]:.1f} %", 100 * dense[k])]
        scores = [100 * v.knn[target][k] for v in one.variants]
        found.append(_chart(one, methods, scores, f"kNN accuracy on {target}, k = {k}, %", marks))
    agreements = [v.agreement for v in one.variants if v.agreement is not None]
    if not found and len(agreements) == len(one.variants):
        found.append(_chart(one, methods, agreements, "agreement with the dense model, mean cosine", []))
    return found


def _chart(
    one: SweepReport, methods: Sequence[str], scores: Sequence[float], label: str, marks: Sequence[charts.Mark]
) -> Markup:
    """`scores` are those of the variants, in their order."""
    scored = list(zip(one.variants, scores, strict=True))
    series = [
        charts.Series(
            method,
            sorted((100 * v.parameters_removed, score) for v, score in scored if v.method == method),
            *_style_of(method, methods),
        )
        for method in methods
    ]
    return charts.line_chart(series, "parameters removed, %", label, marks, width=560, height=320)


def _by_weights(one: TrainedReport, methods: Sequence[str]) -> list[Markup]:
    """For each target, kNN and linear accuracy against the share of weights removed: as they were trained, and then on labels."""
    found = []
    scores: Sequence[tuple[str, Callable[[Masked, str], float]]] = (
        ("kNN", lambda v, target: v.knn[target][smallest_k(v.knn[target])]),
        ("linear", lambda v, target: v.linear[target]),
    )
    for target in one.variants[0].knn if one.variants else ():
        for name, score in scores:
            for then in (False, True):
                wanted = [
                    m for m in methods if m.endswith(", then labels") is then or (then and m.startswith("labels"))
                ]
                series = [
                    charts.Series(
                        method,
                        sorted(
                            (100 * (1 - v.kept), 100 * score(v, target)) for v in one.variants if v.method == method
                        ),
                        *_style_of(method, methods),
                    )
                    for method in wanted
                ]
                if not any(method.endswith(", then labels") is then for method in wanted):
                    continue
                label = f"{name} accuracy on {target}, %{', then trained on labels' if then else ''}"
                found.append(charts.line_chart(series, "weights removed, %", label, width=560, height=320))
    return [chart for chart in found if chart]
