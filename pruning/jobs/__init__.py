"""The jobs of the stage prune: their parts, and what they report."""
