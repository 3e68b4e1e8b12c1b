"""What a store holds: runs, tables, and the history of one image, read without touching the sources."""
