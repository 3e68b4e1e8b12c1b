"""When a thumbnail shows nothing."""

# Luminance standard deviation (8-bit steps) below which a thumbnail says too little for a hash or a correlation.
LOW_INFORMATION = 5.0
