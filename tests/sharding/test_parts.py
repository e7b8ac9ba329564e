"""The one walk that every call takes finds what torch's own walks find."""

import pytest
import torch
from torch import nn

from seqpar.sharding.parts import parts_of, tensors_of


def shared():
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.ModuleDict({"first": inner, "second": nn.ModuleList([inner, nn.Linear(2, 2)]), "third": nn.Identity()})
    model["third"].inside = model["second"][1]
    model["second"][1].weight = inner[0].weight
    model.register_module("none", None)
    model.register_buffer("empty", None)
    return model


def circle():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].around = model
    return model


@pytest.mark.parametrize("make", [shared, circle, lambda: nn.GRU(2, 3, 2), lambda: nn.Linear(2, 2, device="meta")])
def test_every_module_and_tensor_is_found_once_in_torchs_order(make):
    model = make()
    assert parts_of(model) == list(model.named_modules())
    named = [*model.named_parameters(), *model.named_buffers()]
    found = list(tensors_of(parts_of(model)).items())
    assert [name for name, _ in found] == [name for name, tensor in named if not tensor.is_meta]
    assert all(mine is torchs for (_, mine), (_, torchs) in zip(found, named))


def test_a_buffer_that_is_a_parameter_too_counts_once():
    model = nn.Linear(2, 2)
    model.register_buffer("again", model.weight.detach())
    model.register_buffer("same", model.bias)
    assert list(tensors_of(parts_of(model))) == ["weight", "bias", "again"]
    assert torch.equal(tensors_of(parts_of(model))["again"], model.weight)
