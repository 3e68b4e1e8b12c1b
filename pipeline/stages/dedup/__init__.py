"""The stage dedup: its function in `run`, and what its workers do."""
