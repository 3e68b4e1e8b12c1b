"""The jobs of the stage `prune`: their parts, and their reports."""
