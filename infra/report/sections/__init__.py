"""The sections of the report, in the order of the page. A new section is a file here and a line in `SECTIONS`."""

SECTIONS = (
    "lodeset.infra.report.sections.funnel:SECTION",
    "lodeset.infra.report.sections.dropped:SECTION",
    "lodeset.infra.report.sections.near:SECTION",
    "lodeset.infra.report.sections.audits:SECTION",
    "lodeset.infra.report.sections.clusters:SECTION",
    "lodeset.infra.report.sections.retrieval:SECTION",
    "lodeset.infra.report.sections.shards:SECTION",
    "lodeset.infra.report.sections.training:SECTION",
    "lodeset.infra.report.sections.evaluation:SECTION",
    "lodeset.infra.report.sections.pruning:SECTION",
    "lodeset.infra.report.sections.runtimes:SECTION",
)
