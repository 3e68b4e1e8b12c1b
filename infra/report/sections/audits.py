"""What people judged of random samples: how often rejects, drops and selections are wrong."""

from __future__ import annotations

from lodeset.infra.audits import kept
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    made = {id_: artifact.fingerprint for id_, artifact in finished.artifacts.items()}
    return Contents(values={"samples": [sample for _, sample in kept(finished.store, made)]})


SECTION = Section(
    id="audits",
    title="Audits",
    collect=_collect,
    template=stored("audits.html.jinja"),
)
