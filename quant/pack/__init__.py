"""A pack: opened read-only, described by its manifest, verified."""
