"""Where every byte belongs: pure functions on frozen records. No MPI, no files, no live objects."""
