"""Which HDF5 h5py was built with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HDF5Build:
    """What the h5py of this process was built with.

    Attributes:
        h5py: Version of h5py.
        hdf5: Version of the HDF5 library.
        mpi: Whether h5py has the mpio driver.
    """

    h5py: str
    hdf5: tuple[int, int, int]
    mpi: bool


def hdf5_build() -> HDF5Build:
    """What this process's h5py was built with. Loads HDF5, and the MPI library of an MPI build; starts no MPI.

    Raises:
        ImportError: h5py is missing, or one of its libraries.
    """
    import h5py

    return HDF5Build(h5py.version.version, h5py.version.hdf5_version_tuple, bool(h5py.get_config().mpi))
