"""What this computer has: memory, disks, a GPU, and how fast they are."""
