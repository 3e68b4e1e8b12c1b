"""Gates: what a finished run must fulfil, compared with limits and with the last accepted run."""
