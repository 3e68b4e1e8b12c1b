"""The limit below which a thumbnail counts as blank."""

# Luminance standard deviation (8-bit steps) below which a thumbnail contains too little for a hash or a correlation.
LOW_INFORMATION = 5.0
