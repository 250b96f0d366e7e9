"""Reading and writing together: the ranks of one node move bytes between each other in shared memory."""
