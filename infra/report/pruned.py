"""Prepare the reports of pruning jobs for a page: a sweep of the entropic method, or networks that were trained with
masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.pictures import png_uri
from lodeset.pruning.choosing.criteria import CRITERIA

NOTHING = Markup("")
PATHS_SHOWN = 24  # maximum number of groups whose path of w a page draws


@dataclass(frozen=True)
class Variant:
    """One pruned model; shares lie between 0 and 1. `dense` is the cost of the model that it was made from."""

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
    """`at`: a strength, or the requested share of the parameters; with the latter, `strengths` by group, and the units
    kept there.
    """

    at: float
    units: Mapping[str, int]
    unexplained: Mapping[str, float]
    converged: bool | None
    agreement: float | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Masked(Variant):
    """`at`: the round, or the learning rate of a sweep; `kept`: the share of maskable weights that is kept."""

    at: float
    kept: float
    linear: Mapping[str, float]
    loss: float | None = None
    masks_bytes: int | None = None  # size on disk; and below that of the masked weights as float32
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
    """A job as a page shows it: its report, charts, the legend of its methods, and the paths of w as data URIs.

    Attributes:
        layers: how many units each layer keeps, and the legend of its lines; empty where methods choose weights.
    """

    report: SweepReport | TrainedReport
    charts: Sequence[Markup]
    legend: Sequence[tuple[str, Markup]]
    paths: Mapping[str, str]
    layers: Markup = NOTHING
    layers_legend: Sequence[tuple[str, Markup]] = ()

    @property
    def at(self) -> str:
        return "learning rate" if self.report.job["method"] == "self_masking" else "round"

    @property
    def allocations(self) -> Sequence[Swept]:
        """A variant for each requested share of the parameters: all methods keep the same units per group."""
        swept = [variant for variant in self.report.variants if isinstance(variant, Swept) and variant.strengths]
        return list({variant.at: variant for variant in reversed(swept)}.values())[::-1]

    @property
    def targets(self) -> Sequence[str]:
        return list(self.report.variants[0].knn) if self.report.variants else []

    @property
    def agreement(self) -> bool:
        return any(getattr(variant, "agreement", None) is not None for variant in self.report.variants)


Kind = TypeVar("Kind")


def report_of(tree: Mapping[str, Any]) -> SweepReport | TrainedReport:
    """The report of a job, from the content of `report.json`."""
    if "calibration_images" in tree:
        rows = [row | {"at": row["remove"] if "remove" in row else row["eps_w"]} for row in tree["variants"]]
        return _of(SweepReport, tree, tuple(_of(Swept, row) for row in rows))
    rows = [row | {"at": row["round"] if "round" in row else row["lr"]} for row in tree["variants"]]
    return _of(TrainedReport, tree, tuple(_of(Masked, row) for row in sorted(rows, key=lambda row: row["at"])))


def _of(kind: type[Kind], tree: Mapping[str, Any], variants: tuple[Any, ...] | None = None) -> Kind:
    """A dataclass from the tree; unknown fields are ignored."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    values = {name: value for name, value in tree.items() if name in known}
    return kind(**(values if variants is None else values | {"variants": variants}))


def drawn(report: SweepReport | TrainedReport, read: Callable[[str], bytes | None]) -> Drawn:
    """`read` returns the bytes of a file of the store."""
    methods = list(dict.fromkeys(variant.method for variant in report.variants))
    legend = [(method, charts.key(*_style_of(method, methods))) for method in methods]
    if isinstance(report, TrainedReport):
        return Drawn(report, _by_weights(report, methods), legend, {})
    shown = list(report.paths.items())[:PATHS_SHOWN]
    paths = {name: png_uri(data) for name, path in shown if (data := read(path))}
    return Drawn(report, _by_parameters(report, methods), legend, paths, *_by_layer(report))


def _by_layer(report: SweepReport) -> tuple[Markup, list[tuple[str, Markup]]]:
    """Units that each layer keeps, a line for each of a few sizes; every method keeps the same number."""
    by_size = {variant.at: variant for variant in reversed(report.variants) if variant.units}
    sizes = sorted(by_size)
    chosen = (
        sizes if len(sizes) <= charts.COLOURS else [sizes[n * (len(sizes) - 1) // 3] for n in range(charts.COLOURS)]
    )
    if not chosen or len(by_size[chosen[0]].units) < 2:
        return Markup(""), []
    names = [f"{100 * at:.0f} % removed" if by_size[at].strengths else f"eps_w {charts.number(at)}" for at in chosen]
    series = [
        charts.Series(name, [(n + 1.0, float(units)) for n, units in enumerate(by_size[at].units.values())], colour)
        for colour, (name, at) in enumerate(zip(names, chosen, strict=True))
    ]
    drawn_ = charts.line_chart(series, "layer, in the order of the network", "units kept", width=560, height=260)
    return drawn_, [(name, charts.key(colour)) for colour, name in enumerate(names)]


def smallest_k(accuracies: Mapping[str, float]) -> str:
    """The smallest k that a target was evaluated with."""
    return min(accuracies, key=int)


def _style_of(method: str, methods: Sequence[str]) -> tuple[int, charts.Line]:
    """The color of a method, and its line style."""
    criterion, _, refit = method.partition("+")
    criteria = [known.name for known in CRITERIA]
    if criterion in criteria:  # solid with a refit, dashed without, dotted after further training
        return criteria.index(
            criterion
        ) % charts.COLOURS, "dashed" if not refit else "dotted" if ", " in refit else "solid"
    of, _, how = method.partition(", ")
    tasks = list(dict.fromkeys(name.partition(", ")[0] for name in methods))
    return tasks.index(of) % charts.COLOURS, "dashed" if how.startswith("at random") else "solid"


def _by_parameters(report: SweepReport, methods: Sequence[str]) -> list[Markup]:
    """For each target, kNN accuracy against the share of parameters removed, one line per method; agreement if there is
    no target.
    """
    charts_drawn = []
    for target, dense in report.knn_dense.items():
        k = smallest_k(dense)
        marks = [charts.Mark(f"dense {100 * dense[k]:.1f} %", 100 * dense[k])]
        scores = [100 * v.knn[target][k] for v in report.variants]
        charts_drawn.append(_chart(report, methods, scores, f"kNN accuracy on {target}, k = {k}, %", marks))
    agreements = [v.agreement for v in report.variants if v.agreement is not None]
    if not charts_drawn and len(agreements) == len(report.variants):
        charts_drawn.append(_chart(report, methods, agreements, "agreement with the dense model, mean cosine", []))
    return charts_drawn


def _chart(
    report: SweepReport, methods: Sequence[str], scores: Sequence[float], label: str, marks: Sequence[charts.Mark]
) -> Markup:
    """`scores` are those of the variants, in the same order."""
    scored = list(zip(report.variants, scores, strict=True))
    series = [
        charts.Series(
            method,
            sorted((100 * v.parameters_removed, score) for v, score in scored if v.method == method),
            *_style_of(method, methods),
        )
        for method in methods
    ]
    return charts.line_chart(series, "parameters removed, %", label, marks, width=560, height=320)


def _by_weights(report: TrainedReport, methods: Sequence[str]) -> list[Markup]:
    """For each target, kNN and linear accuracy against the share of weights removed: as trained, and after training on
    labels.
    """
    charts_drawn = []
    scores: Sequence[tuple[str, Callable[[Masked, str], float]]] = (
        ("kNN", lambda v, target: v.knn[target][smallest_k(v.knn[target])]),
        ("linear", lambda v, target: v.linear[target]),
    )
    for target in report.variants[0].knn if report.variants else ():
        for name, score in scores:
            for then in (False, True):
                wanted = [
                    m for m in methods if m.endswith(", then labels") is then or (then and m.startswith("labels"))
                ]
                series = [
                    charts.Series(
                        method,
                        sorted(
                            (100 * (1 - v.kept), 100 * score(v, target)) for v in report.variants if v.method == method
                        ),
                        *_style_of(method, methods),
                    )
                    for method in wanted
                ]
                if not any(method.endswith(", then labels") is then for method in wanted):
                    continue
                label = f"{name} accuracy on {target}, %{', then trained on labels' if then else ''}"
                charts_drawn.append(charts.line_chart(series, "weights removed, %", label, width=560, height=320))
    return [chart for chart in charts_drawn if chart]
