"""The owner of expert pages in memory, and what it needs to decide."""
