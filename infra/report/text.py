"""The report for terminals: the funnel with its reasons, retrieval, training, pruning, and two runs beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lodeset.infra.report import charts, words
from lodeset.infra.report.contents import Report
from lodeset.infra.report.pruned import smallest_k

if TYPE_CHECKING:
    from lodeset.infra.report.compared import Compared


def lines_of(report: Report, compared: Compared | None = None) -> list[Table | str]:
    """Headings, and a table below each; what is not finished is left out, but for the stages of the funnel."""
    found: list[Table | str] = []
    for title, table in _tables(report, compared):
        if table.row_count:
            found += ["", f"[bold]{title}[/]", table]
    return found


def _tables(report: Report, compared: Compared | None) -> Iterator[tuple[str, Table]]:
    yield "Funnel", _funnel(report)
    if compared is not None:
        yield from _compared(compared)
    yield "Retrieval", _retrieval(report)
    yield "Training", _training(report)
    yield "Accuracy", _accuracy(report)
    for number, job in enumerate(report.pruned, start=1):
        yield f"Pruning, job {number}: {escape(str(job.job['method']))}", _pruning(report, number - 1)


def _table(*heads: str, left: int = 1) -> Table:
    """A plain table: the first `left` columns to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < left else "right", overflow="fold")
    return table


def _funnel(report: Report) -> Table:
    table = _table("stage", "in", "kept", "share", "time", "dropped")
    table.columns[-1].justify = "left"
    for step in report.steps:
        name = escape(f"{step.stage}/{step.set}")
        if not step.finished:
            table.add_row(name, "", "", "", "", "[dim]not finished[/]")
            continue
        reasons = ", ".join(f"{escape(reason)} {count:,}" for reason, count in step.dropped.items())
        share = words.percent(step.kept / step.taken) if step.taken else ""
        table.add_row(name, f"{step.taken:,}", f"{step.kept:,}", share, words.duration(step.seconds), reasons)
    return table


def _compared(compared: Compared) -> Iterator[tuple[str, Table]]:
    before, now = f"run {compared.before}", f"run {compared.number}"
    table = _table("images", before, now, "difference")
    for what, was, is_ in compared.flow:
        change = f"{is_ - was:+,}" if was is not None and is_ is not None and was != is_ else ""
        table.add_row(what, *("–" if n is None else f"{n:,}" for n in (was, is_)), change)
    yield f"Compared with {before}", table
    table = _table("stage", "what was set differently", left=2)
    for cause in compared.causes:
        if cause.settings:
            table.add_row(
                escape(cause.stage), escape("; ".join(cause.settings) + " (with the same result)" * cause.alike)
            )
    yield "Settings that differ", table
    table = _table("images that", "number")
    for changed in compared.changed:
        table.add_row(changed.title, f"{changed.images:,}")
    for number in compared.not_inspected:
        table.add_row(f"are not known before `lodeset inspect CONFIG --run {number} --make-only` has read them", "")
    yield "Images that changed", table
    table = _table(before, now, "images", left=2)
    for old, new, count in compared.outcomes:
        table.add_row(*(escape(_outcome(one)) for one in (old, new)), f"{count:,}")
    yield "From outcome to outcome", table


def _outcome(name: str) -> str:
    return "not there" if name == "absent" else name.replace("_", " ")


def _retrieval(report: Report) -> Table:
    table = _table("set", "mode", "queries", "asked", "distinct", "collisions", "short", "capped", "similarity", left=2)
    for one in report.retrieved:
        similarity = "–" if one.median_similarity is None else f"{one.median_similarity:.3f}"
        numbers = (one.asked, one.distinct, one.collisions, one.short, one.capped)
        table.add_row(
            escape(one.set),
            words.asks(one.config),
            "–" if one.images is None else f"{one.images:,}",
            *(f"{n:,}" for n in numbers),
            similarity,
        )
    return table


def _training(report: Report) -> Table:
    table = _table("stage", "steps", "images", "seen", "images/s", "time", "loss, first", "last", "rank, last")
    for run in report.training:
        summary = run.summary
        losses = [line["loss"] for line in run.lines if "loss" in line]
        ranks = [line["feature_rank"] for line in run.lines if "feature_rank" in line]
        table.add_row(
            run.stage,
            *(f"{summary[key]:,}" for key in ("steps", "images", "images_seen")),
            f"{summary['images_per_s']:.1f}",
            words.duration(summary["seconds"]),
            *(charts.number(value) for value in (losses[0], losses[-1])) if losses else ("–", "–"),
            charts.number(ranks[-1]) if ranks else "–",
        )
    return table


def _accuracy(report: Report) -> Table:
    table = _table("target", "network", "k", "kNN", "linear probe", left=2)
    for one in report.scores:
        for network, by_k in one.knn.items():
            for place, k in enumerate(sorted(by_k, key=int)):
                probe = one.linear.get(network) if place == 0 else None
                linear = words.percent(probe["accuracy"]) if probe else ""
                table.add_row(escape(one.target), network, k, words.percent(by_k[k]), linear)
    return table


def _pruning(report: Report, number: int) -> Table:
    job = report.pruned[number]
    targets: Sequence[str] = list(job.knn_dense) or (list(job.variants[0].knn) if job.variants else [])
    heads = [f"kNN {escape(target)}" for target in targets]
    table = _table("method", "at", *heads, "parameters", "removed", "MACs removed", "ms, batch 1")
    if job.variants and job.knn_dense:
        dense = job.variants[0].dense
        knn = [words.percent(of[smallest_k(of)]) for of in job.knn_dense.values()]
        table.add_row(
            "dense",
            "",
            *knn,
            words.compact(dense["parameters"]),
            "",
            "",
            f"{dense['latency_ms']['batch_1']['median']:.2f}",
        )
    for variant in job.variants:
        knn = [words.percent(of[smallest_k(of)]) if (of := variant.knn.get(target)) else "–" for target in targets]
        table.add_row(
            escape(variant.method),
            charts.number(getattr(variant, "at", 0.0)),
            *knn,
            words.compact(variant.parameters),
            words.percent(variant.parameters_removed),
            words.percent(variant.macs_removed),
            f"{variant.latency_ms['batch_1']['median']:.2f}",
        )
    return table
