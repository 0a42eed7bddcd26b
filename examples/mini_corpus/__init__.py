"""The text that trains the embedded miniature: hand-made templates and a few openly licensed sources."""
