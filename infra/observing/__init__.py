"""What tells others about runs: hooks, logs, metrics, lineage. Nothing here changes what a run makes, or fails it."""
