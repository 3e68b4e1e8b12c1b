"""k-means, hierarchies of clusters, and balanced sampling from them."""
