"""File systems that answer over a network: requests that are repeated, reads that are checked, and a local cache."""
