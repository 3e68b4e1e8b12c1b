"""The stage ingest: its function in `run`, and what its workers do."""
