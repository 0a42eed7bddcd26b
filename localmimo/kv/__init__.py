"""Keys and values of one sequence: rings for window layers, growing caches for global ones, their file."""
