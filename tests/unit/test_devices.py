"""One rank with several devices: what restore makes anew lies where its parameter lies. The devices are imitated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distckpt import Checkpoint, RestoreOptions, RNGState, load_checkpoint
from distckpt.cluster import ElasticSampler
from distckpt.graph import assignment
from distckpt.graph.sharding import new_like, new_plain
from distckpt.graph.values import replicated


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
def test_a_new_slot_lies_beside_its_parameter(device: str) -> None:
    with FakeTensorMode():
        parameter = torch.empty(3, 2, device=device)
        for shape in [(3, 2), (3, 1), ()]:  # as the parameter, as Adafactor has them, a step on the device
            tensor, value = new_like(parameter, replicated(parameter), shape, torch.float32)
            assert tensor.device == torch.device(device)
            assert value.global_shape == shape


@pytest.mark.parametrize("fused", [True, False])
def test_a_new_step_lies_where_the_options_of_the_file_want_it(
    fused: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, an optimizer that is fused has it beside its parameter, and fails otherwise; any other on the CPU."""
    on_cpu = []

    def make_plain(*args: Any) -> Any:
        on_cpu.append(args)
        return new_plain(*args)

    monkeypatch.setattr(assignment, "new_plain", make_plain)
    model, twin = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    other = torch.optim.Adam(twin.parameters(), fused=not fused)
    Checkpoint(m=twin, o=other).read(Checkpoint(m=model, o=optimizer).write(path)).assert_consumed()
    assert other.param_groups[0]["fused"] is fused
    assert len(on_cpu) == (0 if fused else 1)


def test_a_default_device_changes_nothing(path: str) -> None:
    """Nothing of what is made on the way to and from a file lies on it: "meta" stands for a GPU, and keeps no data."""
    model, twin = nn.Linear(8, 4), nn.Linear(8, 4)
    optimizer, twin_optimizer = (torch.optim.Adam(each.parameters()) for each in (model, twin))
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    cast = torch.zeros(3, dtype=torch.bfloat16)
    assert not torch.equal(twin.weight, model.weight)
    with torch.device("meta"):
        checkpoint = Checkpoint(m=model, o=optimizer, rng=RNGState(), c=model.bias.detach()[:3].clone())
        checkpoint.save(path)
        file = checkpoint.save_async(path).result()
        live = Checkpoint(m=twin, o=twin_optimizer, rng=RNGState(), c=cast)
        live.restore(file, options=RestoreOptions(cast=True)).assert_consumed()
        with load_checkpoint(file) as reader:
            rows = reader["m/weight"][::2]
        batches = list(ElasticSampler(range(8), 2))
    assert live.save_counter == 2
    assert torch.equal(twin.weight, model.weight)
    assert torch.equal(twin_optimizer.state[twin.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(cast, model.bias[:3].bfloat16())
    assert torch.equal(rows, model.weight[::2])
    assert sorted(index for batch in batches for index in batch) == list(range(8))
