"""Pruned models, and models of any origin, on disk."""
