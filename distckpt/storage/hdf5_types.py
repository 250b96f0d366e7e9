"""HDF5 datatypes of torch dtypes: native where HDF5 has one, so that every HDF5 tool shows the true numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

from distckpt.layout.dtypes import FloatFields, dtype_info


@cache
def itemsize(dtype: str) -> int:
    """Bytes per element of a torch dtype name."""
    return dtype_info(dtype).itemsize


@cache
def hdf5_type(dtype: str) -> Any:
    """The HDF5 datatype of a torch dtype name, in the file and in memory, as a low-level h5py type."""
    from h5py import h5t

    info = dtype_info(dtype)
    if info.fields is not None:
        return _float_type(info.itemsize, info.fields)
    if info.kind == "complex":
        return _complex_type(info.itemsize, hdf5_type(info.part))
    if info.kind == "bool":
        boolean = h5t.enum_create(h5t.STD_I8LE)
        boolean.enum_insert(b"FALSE", 0)
        boolean.enum_insert(b"TRUE", 1)
        return boolean
    return h5t.py_create(info.numpy)


def _float_type(nbytes: int, fields: FloatFields) -> Any:
    from h5py import h5t

    made = h5t.IEEE_F16LE.copy()
    made.set_fields(fields.sign, fields.exponent, fields.exponent_nbits, fields.mantissa, fields.mantissa_nbits)
    # In this order: HDF5 refuses a size below the precision.
    made.set_precision(8 * nbytes)
    made.set_size(nbytes)
    made.set_ebias(fields.bias)
    return made


def _complex_type(nbytes: int, part: Any) -> Any:
    from h5py import h5t

    made = h5t.create(h5t.COMPOUND, nbytes)
    made.insert(b"r", 0, part)
    made.insert(b"i", nbytes // 2, part)
    return made
