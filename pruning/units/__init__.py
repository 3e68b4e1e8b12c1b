"""Which units of a network can be removed, what they compute, and how they are removed."""
