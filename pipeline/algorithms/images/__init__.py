"""From encoded bytes to pixels, and measurements of them."""
