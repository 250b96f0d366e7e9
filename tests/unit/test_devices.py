"""One rank with several devices: what restore makes anew lies where its parameter lies. The devices are imitated."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distckpt.graph.sharding import new_like, tensor_value


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
def test_a_new_slot_lies_beside_its_parameter(device: str) -> None:
    with FakeTensorMode():
        parameter = torch.empty(3, 2, device=device)
        for shape in [(3, 2), (3, 1), ()]:  # as the parameter, as Adafactor has them, a step on the device
            tensor, value = new_like(parameter, tensor_value(parameter), shape, torch.float32)
            assert tensor.device == torch.device(device)
            assert value.global_shape == shape
