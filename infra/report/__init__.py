"""The report: one self-contained HTML page of what a run kept, dropped, found and trained."""
