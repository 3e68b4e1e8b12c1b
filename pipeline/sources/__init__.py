"""Folders, tars and Parquet files -> slices of (uri, member, offset, size): `listing`, `slices`, `reading`."""
