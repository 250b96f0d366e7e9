"""Reading and writing together: ranks move bytes between each other, in shared memory and between nodes."""
