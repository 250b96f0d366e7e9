"""Element types: what a torch dtype is in memory and as an HDF5 type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True)
class FloatFields:
    """A floating-point format that HDF5 can describe but NumPy does not have; positions count from the lowest bit.

    Attributes:
        sign: Position of the sign bit.
        exponent: Position of the exponent.
        exponent_nbits: Width of the exponent in bits.
        mantissa: Position of the mantissa.
        mantissa_nbits: Width of the mantissa in bits, without the implied leading 1.
        bias: Exponent bias.
    """

    sign: int
    exponent: int
    exponent_nbits: int
    mantissa: int
    mantissa_nbits: int
    bias: int


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type.

    Attributes:
        name: torch's name, without "torch.".
        itemsize: Bytes per element.
        kind: "packed" elements are several numbers or less than a byte: nothing but their bytes can be moved.
        numpy: NumPy dtype of the same bytes, little-endian.
        fields: Layout of an HDF5 floating-point type, for formats unknown to NumPy.
        part: Of complex elements, the dtype of the real part and of the imaginary part behind it.
    """

    name: str
    itemsize: int
    kind: Kind
    numpy: str
    fields: FloatFields | None = None
    part: str = ""


def _float8(name: str, exponent_nbits: int, bias: int) -> Dtype:
    mantissa_nbits = 7 - exponent_nbits
    fields = FloatFields(7, mantissa_nbits, exponent_nbits, 0, mantissa_nbits, bias)
    return Dtype(name, 1, "float", "|u1", fields)


_DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 8, "float", "<f8"),
        Dtype("float32", 4, "float", "<f4"),
        Dtype("float16", 2, "float", "<f2"),
        Dtype("bfloat16", 2, "float", "<u2", FloatFields(15, 7, 8, 0, 7, 127)),
        _float8("float8_e4m3fn", 4, 7),
        _float8("float8_e4m3fnuz", 4, 8),
        _float8("float8_e5m2", 5, 15),
        _float8("float8_e5m2fnuz", 5, 16),
        # No mantissa and no sign: nothing that an HDF5 floating-point type could be.
        Dtype("float8_e8m0fnu", 1, "float", "|u1"),
        Dtype("int64", 8, "int", "<i8"),
        Dtype("int32", 4, "int", "<i4"),
        Dtype("int16", 2, "int", "<i2"),
        Dtype("int8", 1, "int", "|i1"),
        Dtype("uint64", 8, "int", "<u8"),
        Dtype("uint32", 4, "int", "<u4"),
        Dtype("uint16", 2, "int", "<u2"),
        Dtype("uint8", 1, "int", "|u1"),
        Dtype("bool", 1, "bool", "|b1"),
        Dtype("complex128", 16, "complex", "<c16", part="float64"),
        Dtype("complex64", 8, "complex", "<c8", part="float32"),
        Dtype("complex32", 4, "complex", "<u4", part="float16"),
        Dtype("bcomplex32", 4, "complex", "<u4", part="bfloat16"),
        Dtype("float4_e2m1fn_x2", 1, "packed", "|u1"),
        *(Dtype(f"{sign}int{nbits}", 1, "packed", "|u1") for sign in ("", "u") for nbits in range(1, 8)),
    )
}


def is_known(name: str) -> bool:
    """Whether tensors of the torch dtype `name` can be stored."""
    return name in _DTYPES


def dtype_info(name: str) -> Dtype:
    """The row of a torch dtype name.

    Raises:
        ValueError: Tensors of this dtype cannot be stored.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        known = ", ".join(_DTYPES)
        raise ValueError(f"dtype: expected one of {known}. Got {name!r}.") from None


def is_castable(saved: str, live: str) -> bool:
    """Whether `RestoreOptions(cast=True)` converts between two dtypes: equal, both floating-point, or both integer."""
    if saved == live:
        return True
    kind = dtype_info(saved).kind
    return kind in ("float", "int") and kind == dtype_info(live).kind
