"""Changes of a store outside of runs: take-down, compaction, and repair of damaged files."""
