"""The text that trains the embedded model: hand-made templates and a few openly licensed sources."""
