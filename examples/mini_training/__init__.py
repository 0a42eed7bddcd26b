"""Training, export and evaluation of the embedded miniature (see examples/train_mini.py)."""
