"""The curation algorithms as plain functions of arrays; no engine is imported here."""
