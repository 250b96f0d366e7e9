"""The dtype table against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distckpt.layout.dtypes import dtype_info, is_castable, is_known

# Quantized tensors are refused, and "bits" types are their containers.
_NOT_STORED = ("q", "bits")
TORCH_DTYPES = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is torch.dtype
}
STORED = sorted(name for name in TORCH_DTYPES if not name.startswith(_NOT_STORED) and "quint" not in name)


def test_the_table_has_every_dtype() -> None:
    assert [name for name in STORED if not is_known(name)] == []
    assert not any(is_known(name) for name in TORCH_DTYPES if name not in STORED)


@pytest.mark.parametrize("name", STORED)
def test_sizes_and_kinds_are_those_of_torch(name: str) -> None:
    info, dtype = dtype_info(name), TORCH_DTYPES[name]
    assert info.name == name
    assert info.itemsize == dtype.itemsize == np.dtype(info.numpy).itemsize
    assert (info.kind == "complex") == dtype.is_complex
    assert (info.kind == "float") == (dtype.is_floating_point and info.kind != "packed")


@pytest.mark.parametrize("name", [name for name in STORED if dtype_info(name).fields])
def test_float_fields_decode_to_torch_values(name: str) -> None:
    """Decode bit patterns by the fields alone and compare with torch's own conversion."""
    info, fields = dtype_info(name), dtype_info(name).fields
    assert fields is not None
    bits = torch.arange(2 ** (8 * info.itemsize), dtype=torch.int64)
    mantissa = (bits >> fields.mantissa) % 2**fields.mantissa_nbits
    exponent = (bits >> fields.exponent) % 2**fields.exponent_nbits
    sign = 1 - 2 * ((bits >> fields.sign) & 1)
    normal = exponent > 0
    fraction = mantissa / 2**fields.mantissa_nbits + normal
    power = torch.where(normal, exponent, torch.ones_like(exponent)) - fields.bias
    decoded = sign * fraction.double() * torch.pow(torch.tensor(2.0, dtype=torch.float64), power)
    container = bits.to(torch.int16) if info.itemsize == 2 else bits.to(torch.uint8)
    expected = container.view(TORCH_DTYPES[name]).double()
    finite = torch.isfinite(expected)
    assert finite.float().mean() > 0.95 or name == "float8_e5m2"
    assert torch.equal(decoded[finite], expected[finite])


def test_numpy_dtypes_are_those_of_torch_where_both_have_them() -> None:
    for name in ("float64", "float32", "float16", "int64", "int8", "uint16", "uint64", "bool", "complex64"):
        assert torch.empty(0, dtype=TORCH_DTYPES[name]).numpy().dtype == np.dtype(dtype_info(name).numpy)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"float64, .*Got 'qint8'"):
        dtype_info("qint8")


@pytest.mark.parametrize(
    ("saved", "live", "castable"),
    [
        ("float32", "bfloat16", True),
        ("float8_e4m3fn", "float64", True),
        ("float8_e8m0fnu", "float32", True),
        ("int64", "uint8", True),
        ("float32", "int32", False),
        ("bool", "int8", False),
        ("bool", "bool", True),
        ("complex64", "complex128", False),
        ("float4_e2m1fn_x2", "float32", False),
        ("float4_e2m1fn_x2", "float4_e2m1fn_x2", True),
        ("int4", "int8", False),
        ("complex32", "float16", False),
    ],
)
def test_castable(saved: str, live: str, castable: bool) -> None:
    assert is_castable(saved, live) is castable
    assert is_castable(live, saved) is castable


@pytest.mark.parametrize("saved", [name for name in STORED if dtype_info(name).kind in ("float", "int")])
def test_torch_can_convert_what_is_castable(saved: str) -> None:
    source = torch.ones(3, dtype=torch.uint8).to(TORCH_DTYPES[saved])
    castable = [live for live in STORED if live != saved and is_castable(saved, live)]
    assert castable
    for live in castable:
        target = torch.zeros(3, dtype=torch.uint8).to(TORCH_DTYPES[live])
        assert torch.equal(target.copy_(source).double(), torch.ones(3).double())
