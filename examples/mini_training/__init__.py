"""Training, export and evaluation of the embedded model (see examples/train_mini.py)."""
