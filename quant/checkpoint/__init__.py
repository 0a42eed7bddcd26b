"""Hugging Face checkpoints: their tensors, readable under canonical names."""
