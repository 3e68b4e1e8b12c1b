"""Nearest neighbors by inner product, exact and approximate."""
