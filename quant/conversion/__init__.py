"""A checkpoint and a recipe become a pack, unit by unit, resumable."""
