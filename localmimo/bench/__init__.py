"""Measuring an engine: its speed at depths of context, the text to measure with, the machine's own speeds."""
