"""One file a stage: a function `Context -> Outcome` and what its workers run."""
