"""Accuracies of the networks' features on labeled target sets."""

from __future__ import annotations

from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    ks = {
        scores.target: sorted({k for by_k in scores.knn.values() for k in by_k}, key=int)
        for scores in finished.report.scores
    }
    return Contents(values={"ks": ks})


SECTION = Section(
    id="evaluation",
    title="Evaluation",
    needs=("evaluate/*",),
    collect=_collect,
    template=stored("evaluation.html.jinja"),
)
