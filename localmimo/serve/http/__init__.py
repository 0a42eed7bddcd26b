"""Sockets, limits, keys, and the built-in page."""
