"""Checkpoints to smaller models: which hidden units of a vision transformer's MLPs to keep, and with what weights.

Read in this order: `groups` (what can be removed, and removing it), `entropic` (which units, from second moments of the
activations alone), `criteria` (the list of the ways of choosing units), `magnitude`, `at_random` and `refit` (the baselines that every
result stands beside), `report` (a row a variant).
"""
