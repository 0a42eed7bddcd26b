"""Small services of the operating system: paths, JSON files, helper processes. Knows nothing of models."""
