"""Encoded bytes to pixels and what can be measured of them."""
