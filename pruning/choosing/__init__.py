"""Which units to keep, and with which weights."""
