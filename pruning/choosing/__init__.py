"""Choose which units to keep, and compute the weights of the layers that read them."""
