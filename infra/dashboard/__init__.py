"""The dashboard: what a run decided, image by image, and what to change about it."""
