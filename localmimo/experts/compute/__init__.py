"""Tokens and their experts become weighted sums, on the CPU or beside a GPU."""
