"""Saves and restores of tensors on real GPUs, by one rank. See test_device_copies.py for the order of the copies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.layout.box import MAX_PIECE_NBYTES, Box
from distckpt.storage.reading import read
from distckpt.storage.transfer import ReadJob, WriteJob
from distckpt.storage.writing import write_posix
from tests.checkpoint_files import bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


View = Callable[[torch.Tensor], torch.Tensor]

#: Shape and dtype of the memory, and the view of it that is saved.
KINDS: dict[str, tuple[tuple[int, ...], torch.dtype, View]] = {
    "large": ((5 << 20,), torch.float32, lambda memory: memory),
    "columns": ((3000, 2000), torch.float32, lambda memory: memory[:, 3:1700]),
    "transposed": ((300, 200), torch.float32, lambda memory: memory.T),
    "conjugate": ((1 << 20,), torch.complex64, lambda memory: memory.conj()),
    "negative": ((1 << 20,), torch.complex64, lambda memory: memory.conj().imag),
    "scalar": ((), torch.float32, lambda memory: memory),
    "bfloat16": ((77,), torch.bfloat16, lambda memory: memory),
} | {f"small{i}": ((33,), torch.float32, lambda memory: memory) for i in range(500)}


def make(device: str, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of all kinds; "cuda": on all GPUs by turns."""
    torch.manual_seed(seed)
    made = {}
    for number, (name, (shape, dtype, view)) in enumerate(KINDS.items()):
        place = f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device
        made[name] = view(torch.randn(shape, dtype=dtype).to(place))
    return made


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name].cpu(), right[name].cpu()) for name in left)


def data_of(path: str) -> dict[str, bytes]:
    with distckpt.load_checkpoint(path) as reader:
        return {key: bits(reader[key][...]) for key in reader.keys() if key.startswith("tensors/")}  # noqa: SIM118


@pytest.mark.parametrize("background", [False, True])
def test_the_file_is_that_of_the_cpu(tmp_path: Path, background: bool) -> None:
    on_gpu, on_cpu = make("cuda", 1), make("cpu", 1)
    ckpt = distckpt.Checkpoint(tensors=on_gpu)
    path = ckpt.save_async(tmp_path / "gpu").result() if background else ckpt.save(tmp_path / "gpu")
    expected = data_of(distckpt.Checkpoint(tensors=on_cpu).save(tmp_path / "cpu"))
    assert len(expected) == len(on_cpu)
    assert data_of(path) == expected


@pytest.mark.parametrize(("saved", "restored"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_restore_into_live_tensors(tmp_path: Path, saved: str, restored: str) -> None:
    tensors, twins = make(saved, 1), make(restored, 2)
    assert not same(tensors, twins)
    addresses = [tensor.untyped_storage().data_ptr() for tensor in twins.values()]
    path = distckpt.Checkpoint(tensors=tensors).save(tmp_path / "ckpt")
    distckpt.Checkpoint(tensors=twins).restore(path).assert_consumed()
    assert same(tensors, twins)
    assert [tensor.untyped_storage().data_ptr() for tensor in twins.values()] == addresses


def test_work_that_was_begun_before_a_save_is_in_it(tmp_path: Path) -> None:
    weight = torch.zeros(4 << 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        weight += 1
        path = distckpt.Checkpoint(weight=weight).save(tmp_path / "ckpt")
    assert bool((distckpt.load_variable(path, "weight") == 1).all())


def test_work_that_was_begun_before_a_restore_does_not_undo_it(tmp_path: Path) -> None:
    weight = torch.ones(4 << 20, device="cuda")
    ckpt = distckpt.Checkpoint(weight=weight)
    path = ckpt.save(tmp_path / "ckpt")
    torch.cuda._sleep(200_000_000)
    weight.zero_()
    ckpt.restore(path).assert_consumed()
    assert bool((weight == 1).all())


def test_two_buffers_are_pinned_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distckpt import device
    from distckpt.storage import room

    asked: list[int] = []

    def counted(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        return device.pinned_memory(nbytes)

    monkeypatch.setattr(room, "pinned_memory", counted)
    shape = (64 << 20,)
    tensor = torch.ones(shape, device="cuda")
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_posix(fd, [WriteJob("w", 0, shape, Box.whole(shape), tensor, 0)], checksums=True)
    assert asked == [MAX_PIECE_NBYTES] * 2
    tensor.zero_()
    read(fd, [ReadJob("w", 0, shape, Box.whole(shape), tensor)], verify=True)
    os.close(fd)
    assert asked == [MAX_PIECE_NBYTES] * 4
    assert bool((tensor == 1).all())


@pytest.mark.parametrize("overlap", [False, True])
def test_saves_while_training(tmp_path: Path, overlap: bool) -> None:
    """Each of many saves has the values of its moment, though the next steps are queued at once."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 7)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    batch = torch.randn(64, 2048, device="cuda")
    moments = []
    for _ in range(10):
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle = checkpoint.save_async(tmp_path / "c", options=distckpt.SaveOptions(overlap=overlap, durable=False))
        moments.append((handle, {key: value.clone() for key, value in tensors_of(model, optimizer).items()}))
    twin = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 7)).cuda()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.02, fused=True)
    live = distckpt.Checkpoint(model=twin, optimizer=twin_optimizer)
    for handle, expected in moments:
        assert not torch.equal(twin[0].weight, expected["0.weight"])
        live.restore(handle.result()).assert_consumed()
        restored = tensors_of(twin, twin_optimizer)
        assert same(restored, expected)
        assert all(tensor.is_cuda for tensor in restored.values())


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and slots, which the optimizer has on their device, the step among them."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{slot}": value for slot, value in optimizer.state[parameter].items()}
    return found


def test_what_changes_after_it_was_staged_is_not_in_the_save(tmp_path: Path) -> None:
    model = torch.nn.Linear(4096, 4096).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    handle = checkpoint.save_async(tmp_path / "c", options=distckpt.SaveOptions(overlap=True))
    handle.wait_staged()
    with torch.no_grad():
        model.weight.zero_()
    assert bool((distckpt.load_variable(handle.result(), "model/weight") != 0).any())


def test_generators(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(rng=distckpt.RNGState(), generator=torch.Generator(device="cuda").manual_seed(5))
    torch.cuda.manual_seed(3)

    def numbers() -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.rand(5, device="cuda", generator=checkpoint.generator)
        return torch.rand(5, device="cuda"), own

    path = checkpoint.save(tmp_path / "c")
    expected = numbers()
    assert not any(torch.equal(a, b) for a, b in zip(numbers(), expected, strict=True))
    checkpoint.restore(path).assert_consumed()
    assert all(torch.equal(a, b) for a, b in zip(numbers(), expected, strict=True))


def test_a_cast_restore(tmp_path: Path) -> None:
    saved = torch.randn(3000, 1000, device="cuda")
    path = distckpt.Checkpoint(w=saved).save(tmp_path / "c")
    live = torch.zeros(3000, 1000, dtype=torch.bfloat16, device="cuda")
    distckpt.Checkpoint(w=live).restore(path, options=distckpt.RestoreOptions(cast=True)).assert_consumed()
    assert torch.equal(live, saved.bfloat16())


def test_memory_of_a_process_that_ends_is_unpinned_in_order(tmp_path: Path) -> None:
    """Buffers are pinned until they are given up: a save after a smaller one, and the end of the Checkpoint."""
    for numel in (1 << 10, 40 << 20, 1 << 20):
        weight = torch.full((numel,), 3.0, device="cuda")
        checkpoint = distckpt.Checkpoint(weight=weight)
        for _ in range(3):
            path = checkpoint.save_async(tmp_path / "c").result()
        assert bool((distckpt.load_variable(path, "weight") == 3).all())
        del checkpoint
