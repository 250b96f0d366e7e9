"""The only room that touches files: one HDF5 file per checkpoint, written and read at known positions."""
