"""Decide whether two images are copies of one picture: candidates, alignment, evidence, and groups."""
