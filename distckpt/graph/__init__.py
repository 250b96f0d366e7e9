"""What there is to save: live objects and the stored object graph. No MPI, no files."""
