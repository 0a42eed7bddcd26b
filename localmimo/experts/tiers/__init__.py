"""Where pages can be: disk, slots of RAM, slots of a GPU, and the threads that read."""
