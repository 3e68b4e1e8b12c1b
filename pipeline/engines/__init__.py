"""The only modules that start an engine."""
