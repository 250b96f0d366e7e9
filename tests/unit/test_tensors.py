"""Tensors, NumPy arrays and generators: every dtype, shape and stride comes back bit for bit, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distckpt import (
    Checkpoint,
    CheckpointWarning,
    CollectiveError,
    LayoutError,
    RestoreMismatchError,
    RestoreOptions,
    RNGState,
)
from distckpt.graph.adapters import rng
from distckpt.graph.memory import overlaps_itself
from distckpt.layout.dtypes import _DTYPES
from distckpt.layout.records import Manifest
from distckpt.tensor_bytes import bytes_of

DTYPES = [getattr(torch, name) for name in _DTYPES if hasattr(torch, name)]  # bcomplex32 came with torch 2.15
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (3, 5), (2, 3, 4, 5)]


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements in logical order."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size())
    packed = tensor.detach() if words is None else tensor.detach().view(words)  # torch cannot copy every dtype
    packed = packed.contiguous()
    return bytes(bytes_of(packed))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of random bytes: NaN payloads, infinities and denormal numbers among them."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, path: str) -> None:
    saved = {str(i): random_bits(shape, dtype) for i, shape in enumerate(SHAPES)}
    live = {str(i): zeros(shape, dtype) for i, shape in enumerate(SHAPES)}
    assert bits(live["6"]) != bits(saved["6"])
    file = Checkpoint(t=saved).write(path)
    checkpoint = Checkpoint(t=live)
    checkpoint.read(file).assert_consumed()
    for name, tensor in saved.items():
        assert bits(live[name]) == bits(tensor)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_strides(dtype: torch.dtype, path: str) -> None:
    saved, live = random_bits((6, 300), dtype)[::2, 7:], zeros((6, 300), dtype)[::2, 7:]
    assert bits(live) != bits(saved)
    Checkpoint(t=live).read(Checkpoint(t=saved).write(path))
    assert bits(live) == bits(saved)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_transposed(dtype: torch.dtype, path: str) -> None:
    """Torch transposes what is not tiny by another way than it copies, which not every dtype has."""
    for save in (Checkpoint.write, Checkpoint.save, lambda checkpoint, path: checkpoint.save_async(path).result()):
        saved, live = random_bits((60, 64), dtype).t(), zeros((64, 120), dtype)[:, ::2]
        assert bits(live) != bits(saved)
        Checkpoint(t=live).read(save(Checkpoint(t=saved), path)).assert_consumed()
        assert bits(live) == bits(saved)


def test_numbers_that_are_none_keep_their_bits(path: str) -> None:
    patterns = [0x7FC00000, 0x7FC00123, 0x7F800001, -0x400000, -0x7FFFFF, 0x7F800000, -0x80000000, 1]
    saved = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    live = torch.zeros(8)
    Checkpoint(t=live).read(Checkpoint(t=saved).write(path))
    assert live.view(torch.int32).tolist() == patterns


def test_a_tensor_is_restored_in_place(path: str) -> None:
    file = Checkpoint(w=nn.Parameter(torch.ones(3))).write(path)
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 5.0)
    address, version = parameter.data_ptr(), parameter._version
    Checkpoint(w=parameter).read(file)
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.data_ptr() == address
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert parameter.grad.tolist() == [5, 5, 5]
    assert parameter._version > version


def test_a_backward_pass_that_needs_old_values_fails_after_a_restore(path: str) -> None:
    file = Checkpoint(w=torch.ones(3)).write(path)
    w = torch.zeros(3, requires_grad=True)
    loss = (w.exp() * w).sum()
    with torch.no_grad():
        Checkpoint(w=w).read(file)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode(path: str) -> None:
    with torch.inference_mode():
        saved, live = torch.arange(4.0), torch.zeros(4)
        Checkpoint(w=live).read(Checkpoint(w=saved).write(path))
        assert live.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cast", [False, True])
def test_tensors_of_inference_mode_are_restored_outside_of_it(path: str, cast: bool) -> None:
    saved = torch.randn(5, 4).t()
    file = Checkpoint(w=saved).write(path)
    with torch.inference_mode():
        live = torch.zeros(5, 4, dtype=torch.float64 if cast else torch.float32).t()
    Checkpoint(w=live).read(file, options=RestoreOptions(cast=cast)).assert_consumed()
    assert torch.equal(live, saved.to(live.dtype))


_VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.t(),
    "every other row": lambda t: t[::2],
    "every other column": lambda t: t[:, ::2],
    "one column": lambda t: t[:, 3],
    "inner block": lambda t: t[2:5, 1:7],
    "diagonal": lambda t: t.diagonal(),
    "channels last": lambda t: t.reshape(2, 3, 4, 5)[:, :, :, :].contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.reshape(2, 3, 4, 5).permute(3, 1, 0, 2),
    "one element": lambda t: t[3, 4],
    "empty": lambda t: t[:, 4:4],
}


@pytest.mark.parametrize("view", _VIEWS)
def test_strides_do_not_matter(view: str, path: str) -> None:
    """A view is saved in logical order, and restored into any other strides without touching what is around it."""
    saved = _VIEWS[view](torch.randn(10, 12))
    file = Checkpoint(t=saved).write(path)
    around = torch.full((10, 12), -1.0)
    live = _VIEWS[view](around)
    assert live.numel() == 0 or bits(live) != bits(saved)
    Checkpoint(t=live).read(file).assert_consumed()
    assert torch.equal(live, saved)
    if live.data_ptr() != 0 and live._base is not None:
        assert int((around == -1).sum()) == 120 - live.numel()
    plain = torch.zeros(saved.shape)
    Checkpoint(t=plain).read(file)
    assert torch.equal(plain, saved)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_strides(path: str, data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=ndim, max_size=ndim))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    order = data.draw(st.permutations(range(ndim)))

    def view(base: torch.Tensor) -> torch.Tensor:
        for axis, step in enumerate(steps):
            base = base.narrow(axis, 0, sizes[axis] * step).unfold(axis, 1, step).squeeze(-1) if sizes[axis] else base
        return base.permute(*order)

    shape = [max(1, size) * step if size else 0 for size, step in zip(sizes, steps, strict=True)]
    saved, live = view(torch.randn(shape)), view(torch.zeros(shape))
    Checkpoint(t=live).read(Checkpoint(t=saved).write(path))
    assert torch.equal(live, saved)


def test_lazily_conjugated_and_negated_views(path: str) -> None:
    numbers = torch.randn(4, 5, dtype=torch.complex64)
    saved = {
        "conj": numbers.conj(),
        "neg": numbers.conj().imag,
        "big": torch.randn(20_000, dtype=torch.complex64).conj(),
    }
    assert saved["conj"].is_conj()
    assert saved["neg"].is_neg()
    with pytest.warns(CheckpointWarning, match="t/conj and t/neg"):
        file = Checkpoint(t=saved).write(path)
    plain = {name: torch.zeros_like(value.resolve_conj().resolve_neg()) for name, value in saved.items()}
    Checkpoint(t=plain).read(file).assert_consumed()
    lazy = {name: torch.zeros(value.shape, dtype=torch.complex64).conj() for name, value in saved.items()}
    lazy["neg"] = lazy["neg"].imag
    assert all(value.is_conj() or value.is_neg() for value in lazy.values())
    Checkpoint(t=lazy).read(file).assert_consumed()
    for live in (plain, lazy):
        assert all(torch.equal(tensor, saved[name]) for name, tensor in live.items())


@pytest.mark.parametrize("columns", [slice(None), slice(0, 1500)], ids=["contiguous", "strided"])
def test_tensors_of_several_pieces(columns: slice, path: str) -> None:
    saved, live = torch.randn(3000, 2000)[:, columns], torch.zeros(3000, 2000)[:, columns]
    assert not torch.equal(live, saved)
    Checkpoint(t=live).read(Checkpoint(t=saved).write(path))
    assert torch.equal(live, saved)


def test_sixteen_megabytes_and_an_odd_byte(path: str) -> None:
    saved, live = torch.randint(0, 256, ((16 << 20) + 1,), dtype=torch.uint8), torch.zeros((16 << 20) + 1).byte()
    Checkpoint(t=live).read(Checkpoint(t=saved).write(path))
    assert torch.equal(live, saved)


# ---- shared and overlapping memory -------------------------------------------------------------------------------


def test_views_are_variables_of_their_own_with_one_warning(path: str, keys_of: Callable[[str], set[str]]) -> None:
    whole = torch.arange(6.0)
    checkpoint = Checkpoint(whole=whole, half=whole[:3], other=torch.zeros(1))
    with pytest.warns(CheckpointWarning, match="share memory.*half and whole"):
        file = checkpoint.write(path)
    checkpoint.write(path)  # a second warning would be an error
    assert keys_of(file) == {"whole", "half", "other"}
    live = Checkpoint(whole=torch.zeros(6), half=torch.zeros(3), other=torch.zeros(1))
    live.read(file).assert_consumed()
    assert live.half.tolist() == [0, 1, 2]
    assert live.whole.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("verify", [False, True])
def test_of_views_of_the_same_memory_the_last_one_wins(path: str, verify: bool) -> None:
    """Neighbours in the file are read with one call: one of them into its memory at once, the other one later."""
    file = Checkpoint(a=torch.full((50,), 1.0), b=torch.full((100,), 2.0), c=torch.full((10,), 3.0)).write(path)
    memory = torch.zeros(100)
    live = Checkpoint(a=memory[::2], b=memory, c=memory[1:20:2])
    live.read(file, options=RestoreOptions(verify=verify)).assert_consumed()
    assert torch.equal(live.c, torch.full((10,), 3.0))
    live.c.fill_(2)
    assert torch.equal(memory, torch.full((100,), 2.0))


def test_parts_of_one_storage_that_do_not_overlap_are_no_reason_to_warn(path: str) -> None:
    flat = torch.arange(6.0)
    Checkpoint(a=flat[:3], b=flat[3:], empty=flat[2:2]).write(path)


@pytest.mark.parametrize(
    "expand",
    [
        lambda t: t[:1].expand(4),
        lambda t: t.unfold(0, 3, 1),
        lambda t: t.as_strided((2, 2), (1, 1)),
        lambda t: t[:2].unsqueeze(0).expand(3, 2),
    ],
    ids=["expand", "unfold", "as_strided", "broadcast rows"],
)
def test_restoring_into_memory_that_overlaps_itself_is_refused(
    expand: Callable[[torch.Tensor], torch.Tensor], path: str
) -> None:
    saved = expand(torch.arange(6.0))
    file = Checkpoint(a=torch.ones(2), t=saved).write(path)
    live = Checkpoint(a=torch.zeros(2), t=expand(torch.zeros(6)))
    with pytest.raises(RestoreMismatchError, match=r"(?s)t: saved .* share memory.*"):
        live.read(file)
    assert live.a.tolist() == [0, 0]
    assert not live.t.any()
    plain = torch.zeros(saved.shape)
    Checkpoint(a=torch.zeros(2), t=plain).read(file)
    assert torch.equal(plain, saved)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=4))
def test_internal_overlap_is_found_exactly(dims: list[tuple[int, int]]) -> None:
    tensor = torch.arange(200).as_strided([size for size, _ in dims], [stride for _, stride in dims])
    assert overlaps_itself(tensor) == (len(tensor.unique()) < tensor.numel())


# ---- what cannot be saved ----------------------------------------------------------------------------------------


def _quantized() -> torch.Tensor:
    return torch._empty_affine_quantized([3], scale=0.1, zero_point=0, dtype=torch.qint8)


_REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: torch.zeros(3, device="meta"), "meta device.*to_empty"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "not dense.*to_dense"),
    "compressed": (lambda: torch.eye(3).to_sparse_coo().coalesce(), "not dense.*to_dense"),
    "quantized": (_quantized, "not dense.*dequantize"),
    "bits": (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "bits8 cannot be stored"),
    "nested": (lambda: torch.nested.as_nested_tensor([torch.ones(2)]), "nested tensor"),
    "33 dimensions": (lambda: torch.zeros((1,) * 33), "33 dimensions"),
    "object array": (lambda: np.array([None, 1]), "NumPy array of dtype object"),
    "structured array": (lambda: np.zeros(2, "i4,f4"), "NumPy array of dtype"),
    "text array": (lambda: np.array(["a"]), "NumPy array of dtype <U1"),
    "date array": (lambda: np.zeros(2, "M8[s]"), "NumPy array of dtype datetime64"),
    "foreign byte order": (lambda: np.zeros(2, ">f4"), "NumPy array of dtype >f4"),
    "negative stride": (lambda: np.arange(3.0)[::-1], "negative.*copy"),
    "long double": (lambda: np.zeros(2, np.longdouble), "NumPy array of dtype float128"),
}


@pytest.mark.parametrize("kind", _REFUSED)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|[Ss]parse|quantize_per_tensor).*:UserWarning")
def test_what_has_no_plain_bytes_is_refused_by_name_before_anything_is_written(
    kind: str, path: str, tmp_path: Any
) -> None:
    make, message = _REFUSED[kind]
    checkpoint = Checkpoint(fine=torch.ones(2), model={"a/b": make()})
    with pytest.raises(LayoutError, match=rf"model/a\.Sb: .*{message}") as caught:
        checkpoint.save(path)
    assert isinstance(caught.value, ValueError)
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.save_counter == 0
    checkpoint.model.clear()
    assert checkpoint.save(path).endswith("state-1.h5")


def test_all_that_cannot_be_saved_is_named_at_once(path: str) -> None:
    checkpoint = Checkpoint(a=torch.zeros(2, device="meta"), b={"x": {(1,): torch.ones(1)}}, c=np.array([None]))
    with pytest.raises(LayoutError, match=r"(?s)3 problem.*a: .*c: .*b/x: a dict key of type tuple"):
        checkpoint.write(path)


# ---- uninitialised parameters ------------------------------------------------------------------------------------


def test_an_uninitialised_parameter_is_a_node_without_a_value(
    path: str, manifest_of: Callable[[str], Manifest]
) -> None:
    manifest = manifest_of(Checkpoint(m=nn.LazyLinear(2)).write(path))
    assert [len(node.attributes) for node in manifest.object_graph.nodes] == [0, 0, 0, 0]
    assert [child.local_name for child in manifest.object_graph.nodes[1].children] == ["weight", "bias"]
    model = nn.Linear(3, 2)
    status = Checkpoint(m=model).read(path, options=RestoreOptions(expect_partial=True))
    assert status.missing == ("m/bias", "m/weight")
    assert status.unexpected == ()


@pytest.mark.parametrize("dims", [1, 2])
def test_a_lazy_module_is_initialised_by_a_restore(dims: int, path: str) -> None:
    trained = [nn.Linear(3, 4), nn.BatchNorm1d(4)] if dims == 1 else [nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)]
    lazy = [nn.LazyLinear(4), nn.LazyBatchNorm1d()] if dims == 1 else [nn.LazyConv2d(4, 2), nn.LazyBatchNorm2d()]
    source, target = nn.Sequential(*trained), nn.Sequential(*lazy)
    batch = torch.randn(5, 3) if dims == 1 else torch.randn(5, 3, 6, 6)
    source(batch)
    checkpoint = Checkpoint(m=target)
    weight = target[0].weight
    checkpoint.read(Checkpoint(m=source).write(path)).assert_consumed()
    assert target[0].weight is weight  # an optimizer made before still has the right object
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[1].running_mean, source[1].running_mean)
    assert torch.equal(target.eval()(batch), source.eval()(batch))


def test_a_lazy_module_with_an_optimizer(path: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    file = Checkpoint(m=model, o=optimizer).write(path)
    lazy = nn.LazyLinear(2)
    twin = Checkpoint(m=lazy, o=torch.optim.Adam(lazy.parameters()))
    twin.read(file).assert_consumed()
    assert torch.equal(twin.o.state[lazy.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_a_lazy_module_is_initialised_whole_or_not_at_all(path: str) -> None:
    """Only some of its parameters would break the first forward."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    file = Checkpoint(m=model, o=optimizer).write(path)
    lazy = nn.LazyLinear(2)
    checkpoint = Checkpoint(m=lazy, o=torch.optim.SGD(lazy.parameters(), momentum=0.9, lr=0.1))
    with pytest.warns(CheckpointWarning, match="other members than saved"):
        status = checkpoint.read(file, options=RestoreOptions(expect_partial=True))
    assert status.pending == ("m/weight", "o/.slots/m/weight/momentum_buffer")
    assert isinstance(lazy.weight, nn.UninitializedParameter)
    lazy(torch.ones(3))
    assert not torch.equal(lazy.weight, model.weight)
    assert checkpoint.retry_pending() == 2
    assert torch.equal(lazy.weight, model.weight)
    assert torch.equal(checkpoint.o.state[lazy.weight]["momentum_buffer"], torch.ones(2, 3))
    with pytest.raises(AssertionError, match="m/bias"):
        status.assert_existing_objects_matched()


def test_the_dtype_of_a_lazy_module_counts(path: str) -> None:
    file = Checkpoint(m=nn.Linear(3, 2)).write(path)
    lazy = nn.LazyLinear(2, dtype=torch.float64)
    with pytest.raises(RestoreMismatchError, match=r"m/weight: saved .*float32, live an uninitialised .*float64"):
        Checkpoint(m=lazy).read(file)
    assert isinstance(lazy.weight, nn.UninitializedParameter)
    Checkpoint(m=lazy).read(file, options=RestoreOptions(cast=True))
    assert lazy.weight.dtype is torch.float64
    assert lazy.weight.shape == (2, 3)


# ---- NumPy arrays and generators ---------------------------------------------------------------------------------


_NUMPY_DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "Q", "f2", "f4", "f8", "c8", "c16"]


@pytest.mark.parametrize("dtype", _NUMPY_DTYPES)
def test_numpy_arrays(dtype: str, path: str, manifest_of: Callable[[str], Manifest]) -> None:
    rng = np.random.default_rng(0)
    saved = rng.integers(0, 2 if dtype == "?" else 100, (4, 6)).astype(dtype)
    scalar = np.array(saved[0, 0])
    file = Checkpoint(a=saved, scalar=scalar, empty=saved[:0].copy(), part=saved[1:3, ::2].copy()).write(path)
    assert all(variable.numpy for variable in manifest_of(file).variables)
    live = np.full((4, 6), 1, dtype, order="F")
    assert not np.array_equal(live, saved)
    around = np.zeros((4, 6), dtype)
    scalar = np.full((), 1, dtype)
    Checkpoint(a=live, scalar=scalar, empty=saved[:0].copy(), part=around[1:3, ::2]).read(file).assert_consumed()
    assert np.array_equal(live, saved)
    assert scalar == saved[0, 0]
    assert np.array_equal(around[1:3, ::2], saved[1:3, ::2])
    assert not around[0].any()


def test_a_read_only_array_is_saved_but_not_restored(path: str) -> None:
    saved, live = np.arange(3.0), np.zeros(3)
    saved.setflags(write=False)
    live.setflags(write=False)
    file = Checkpoint(a=saved, other=torch.ones(2)).write(path)
    checkpoint = Checkpoint(a=live, other=torch.zeros(2))
    with pytest.raises(RestoreMismatchError, match=r"a: saved .*, live a read-only NumPy array"):
        checkpoint.read(file)
    assert checkpoint.other.tolist() == [0, 0]
    live.setflags(write=True)
    checkpoint.read(file).assert_consumed()
    assert live.tolist() == [0, 1, 2]


def test_arrays_and_tensors_restore_one_another(path: str) -> None:
    file = Checkpoint(a=np.arange(3.0), b=torch.arange(3)).write(path)
    live = Checkpoint(a=torch.zeros(3, dtype=torch.float64), b=np.zeros(3, np.int64))
    live.read(file).assert_consumed()
    assert live.a.tolist() == [0, 1, 2]
    assert live.b.tolist() == [0, 1, 2]


def test_a_generator_goes_on_where_it_was(path: str) -> None:
    saved, live = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    torch.rand(5, generator=saved)
    file = Checkpoint(g=saved).write(path)
    expected = torch.rand(5, generator=saved)
    assert not torch.equal(torch.rand(5, generator=live), expected)
    Checkpoint(g=live).read(file).assert_consumed()
    assert torch.equal(torch.rand(5, generator=live), expected)


@pytest.mark.parametrize(
    "saved",
    [torch.ones(3), torch.ones(16, dtype=torch.uint8), np.ones(5056, np.uint8)],
    ids=["tensor", "cuda", "array"],
)
def test_what_is_no_state_of_a_generator_is_a_mismatch(saved: Any, path: str) -> None:
    """Found before anything is changed: torch would refuse it when the other tensors have been read."""
    file = Checkpoint(g=saved, other=torch.ones(2)).write(path)
    generator, other = torch.Generator().manual_seed(1), torch.zeros(2)
    before = generator.get_state()
    with pytest.raises(RestoreMismatchError, match=r"g: saved a tensor of shape .* live a tensor .* of a Generator"):
        Checkpoint(g=generator, other=other).read(file)
    assert other.tolist() == [0, 0]
    with pytest.warns(CheckpointWarning, match="g skipped"):
        Checkpoint(g=generator, other=other).read(file, options=RestoreOptions(on_mismatch="skip"))
    assert other.tolist() == [1, 1]
    assert torch.equal(generator.get_state(), before)


def test_random_state_of_another_length_is_a_mismatch(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rng, "_states", lambda: {"torch": torch.ones(16, dtype=torch.uint8)})
        file = Checkpoint(rng=RNGState(), other=torch.ones(2)).write(path)
    live = Checkpoint(rng=RNGState(), other=torch.zeros(2))
    with pytest.raises(RestoreMismatchError, match=r"rng/\.rank/0/torch: saved .* live .* of a RNGState"):
        live.read(file)
    assert live.other.tolist() == [0, 0]


class _OfATensor:
    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"save_counter": torch.ones(2)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        raise AssertionError(state)


def test_a_counter_that_is_no_integer_is_a_mismatch(path: str) -> None:
    file = Checkpoint(_OfATensor(), other=torch.ones(2)).write(path)
    live = Checkpoint(other=torch.zeros(2))
    with pytest.raises(RestoreMismatchError, match="save_counter: saved a tensor of shape"):
        live.restore(file)
    assert live.save_counter == 0
    assert live.other.tolist() == [0, 0]


def test_saving_takes_no_number_from_any_generator(path: str) -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state(), generator.get_state(), np.random.get_state()[1].copy()
    Checkpoint(g=generator, m=torch.ones(3)).write(path)
    Checkpoint(m=torch.ones(3)).read(path, options=RestoreOptions(expect_partial=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_a_tensor_without_memory_of_its_own_is_refused(path: str) -> None:
    """As quantized weights are, and tensors that only pretend: reading them would end the process."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls: Any, inner: torch.Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return NotImplemented

    with FakeTensorMode():
        fake = torch.ones(3)
    for tensor, name in ((Wrapper(torch.ones(3)), "Wrapper"), (fake, "FakeTensor")):
        for live in ({"w": tensor}, {"w": {"a": [tensor]}}, {"w": _Stateful(tensor)}):
            with pytest.raises(LayoutError, match=f"w.*: a .*{name} has no memory of its own"):
                Checkpoint(**live).write(path)


def _freed() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("make", [_freed, lambda: torch._efficientzerotensor(3)], ids=["freed", "zeros"])
@pytest.mark.parametrize("wrap", [lambda t: t, torch.nn.Parameter, lambda t: [t]], ids=["tensor", "parameter", "list"])
def test_a_tensor_whose_storage_was_freed_is_refused(path: str, make: Any, wrap: Any) -> None:
    """As sharding and offloading do between steps. Reading its memory would end the process."""
    file = Checkpoint(w=wrap(torch.ones(3)), other=torch.ones(2)).write(path)
    other = torch.zeros(2)
    live = Checkpoint(w=wrap(make()), other=other)
    for save in (live.save, live.write, live.save_async):
        with pytest.raises(LayoutError, match=r"w.*: a tensor without memory"):
            save(path)
    with pytest.raises(RestoreMismatchError, match=r"w.*: .*tensor without memory"):
        live.read(file)
    assert not other.any()


def test_new_tensors_without_memory_are_refused(path: str) -> None:
    """As above: the tensors are real, but what a save or restore makes beside them would not be."""
    live = Checkpoint(w=torch.ones(3, 4).t())
    file = live.save(path)
    live.w.zero_()
    calls = (live.save, live.write, live.save_async, lambda _: live.restore(file), lambda _: live.read(file))
    for call in calls:
        with (
            FakeTensorMode(),
            pytest.raises(CollectiveError, match=r"makes each new tensor a FakeTensor.*outside of it"),
        ):
            call(path)
    assert not live.w.any()
    live.restore(file).assert_consumed()
    assert live.w.all()


class _Stateful:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["x"]
