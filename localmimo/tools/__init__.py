"""Functions that a model may call: their schemas, checked arguments, a file of them in a process of its own."""
