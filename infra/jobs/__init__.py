"""Runs as jobs of a Ray cluster: sent, followed, listed and stopped through its head."""
