"""Routed experts: where their pages lie, how they come, and what runs them."""
