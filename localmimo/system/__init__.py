"""The operating system's small things: where files go, JSON files, helper processes."""
