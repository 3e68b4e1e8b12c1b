"""Find the units of a network that can be removed, measure what they compute, and remove them."""
