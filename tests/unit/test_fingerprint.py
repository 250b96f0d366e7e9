"""Fingerprints: the same for the same elements wherever and however they lie, and another one when they change."""

from __future__ import annotations

import pytest
import torch
import xxhash

from distckpt.graph import fingerprint as graph_fingerprint
from distckpt.graph.fingerprint import fingerprint
from distckpt.tensor_bytes import bytes_of

#: Elements of 8 bytes: hashed whole up to 8,192.
SIZES = [0, 1, 8_192, 8_193, 100_003]


def of_size(numel: int) -> torch.Tensor:
    return torch.view_as_complex(torch.arange(2 * numel, dtype=torch.float32).view(numel, 2))


def test_a_small_tensor_is_hashed_whole() -> None:
    tensor = of_size(8_192)
    assert fingerprint(tensor, whole=False) == xxhash.xxh3_64_intdigest(bytes_of(tensor))


def test_of_a_large_tensor_16_blocks_are_hashed() -> None:
    tensor = of_size(100_003)
    data = bytes_of(tensor)
    step = (100_003 - 512) // 15 * 8
    blocks = b"".join(data[start : start + 4096] for start in range(0, 16 * step, step))
    assert len(blocks) == 64 << 10
    assert fingerprint(tensor, whole=False) == xxhash.xxh3_64_intdigest(blocks)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("numel", SIZES)
def test_a_lazy_view_has_the_fingerprint_of_its_elements(numel: int, whole: bool) -> None:
    """What is not in memory as it is stored goes another way than what is, and has to come out the same."""
    lazy = of_size(numel).conj()
    assert fingerprint(lazy, whole=whole) == fingerprint(lazy.resolve_conj(), whole=whole)
    if numel > 1:
        assert fingerprint(lazy, whole=whole) != fingerprint(lazy.conj().resolve_conj(), whole=whole)


@pytest.mark.parametrize("numel", SIZES[1:])
@pytest.mark.parametrize("index", [0, -1])
def test_a_change_at_either_end_is_seen(numel: int, index: int) -> None:
    """Sizes for which the blocks end just there."""
    numel -= (numel - 512) % 15 if numel > 8_192 else 0
    before, after = of_size(numel), of_size(numel)
    after[index] += 1
    assert fingerprint(before, whole=False) != fingerprint(after, whole=False)


@pytest.mark.parametrize("numel", SIZES[1:])
def test_strides_make_no_difference_to_the_whole(numel: int) -> None:
    spread = torch.zeros(2 * numel, dtype=torch.complex64)[::2]
    spread.copy_(of_size(numel))
    assert fingerprint(spread, whole=True) == fingerprint(of_size(numel), whole=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(700, 1100), (40, 50, 300), (3, 100_003)])
def test_strides_make_no_difference_to_a_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A replica may be laid out otherwise on another rank, such as with its channels last."""
    packed = torch.randn(shape).to(dtype)
    strided = packed.view(torch.uint8) if packed.element_size() == 1 else packed
    strided = strided.movedim(0, -1).contiguous().movedim(-1, 0).view(dtype)
    assert not strided.is_contiguous()
    assert fingerprint(strided, whole=False) == fingerprint(packed, whole=False)


def test_the_end_of_a_strided_tensor_is_sampled() -> None:
    before, after = torch.zeros(4096, 2048).t(), torch.zeros(4096, 2048).t()
    after[-1, -20:] = 1
    assert fingerprint(before, whole=False) != fingerprint(after, whole=False)


def test_a_large_tensor_is_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(3, 1_500_000)
    expected = fingerprint(whole, whole=True)
    strided = torch.zeros(3, 3_000_000)[:, ::2]
    strided.copy_(whole)
    sizes = []

    def measured(tensor: torch.Tensor) -> memoryview:
        sizes.append(tensor.nbytes)
        return bytes_of(tensor)

    monkeypatch.setattr(graph_fingerprint, "bytes_of", measured)
    assert fingerprint(strided, whole=True) == expected
    assert sum(sizes) == whole.nbytes
    assert max(sizes) <= 4 << 20


def test_it_is_never_what_means_not_computed() -> None:
    assert fingerprint(of_size(0), whole=False) != 0
