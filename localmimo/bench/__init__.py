"""Measuring an engine: runs at depths of context, text to run on, costs of a layer."""
