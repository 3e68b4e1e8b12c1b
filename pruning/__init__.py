"""Turn checkpoints into smaller models: which hidden units of a vision transformer's MLPs to keep, and with what
weights.

Read in this order: `units/groups` (what can be removed and how), `choosing/entropic` (which units to keep, from second
moments of the activations alone), `choosing/criteria` (the list of the ways of choosing units), `choosing/magnitude`,
`choosing/at_random` and `choosing/refit` (the baselines that every result is compared with), `jobs/cost` (one report
row per variant).
"""
