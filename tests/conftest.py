"""One token for every Ray that a test session starts: Ray reads it once a process, and forgets nothing."""

import os
import secrets

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
