"""The report: one self-contained HTML page about what a run kept, dropped, found and trained."""
