"""Weights split by heads and channels beside a sequence that is cut: two meshes, the numbers of one device."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from seqpar import run_plan, sequence_parallel
from seqpar.collectives import alone, group_of
from seqpar.collectives.c10d import ProcessRanks
from seqpar.models import Decoder, DecoderConfig
from tests.plans import any_plan

LENGTHS = [9, 1, 14]
SPLIT = {
    "mlp": {"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()},
    "attention": {"mixer.q": ColwiseParallel(), "mixer.k": ColwiseParallel(), "mixer.v": ColwiseParallel(),
                  "mixer.out": RowwiseParallel()},
}  # fmt: skip


def decoder(pattern="softmax"):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(pattern, dim=16, heads=4)).double()


def batch():
    return torch.randint(256, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def two_meshes(group):
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != 4:
        pytest.skip("needs a world of 4 processes: pytest --world processes")
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "tensor"))


def split(model: nn.Module, mesh, *parts):
    for block in model.blocks:
        for part in parts:
            parallelize_module(block, mesh["tensor"], copy.deepcopy(SPLIT[part]))
    return model


def loss_of(model):
    return model(batch(), labels=batch(), lengths=LENGTHS).loss


@pytest.mark.spmd(4)
@pytest.mark.parametrize("parts", [("mlp",), ("mlp", "attention")], ids=["mlp", "both"])
def test_gradients_are_those_of_one_device(group, parts):
    mesh, whole = two_meshes(group), sequence_parallel(decoder(), group=alone())
    model = sequence_parallel(split(decoder(), mesh, *parts), group=group_of(mesh["sequence"]))
    expected, found = loss_of(whole), loss_of(model)
    expected.backward()
    found.backward()
    assert abs(found.item() - expected.item()) <= 1e-12
    for (name, mine), right in zip(model.named_parameters(), whole.parameters()):
        grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        assert (grad - right.grad).norm() <= 1e-10 * right.grad.norm().clamp(min=1e-12), name


@pytest.mark.spmd(4)
def test_what_would_be_wrong_is_refused(group):
    mesh = two_meshes(group)
    sequence = group_of(mesh["sequence"])
    with pytest.raises(ValueError, match="nobody sums the gradients of tensor-parallel weights"):
        loss_of(sequence_parallel(split(decoder(), mesh, "mlp"), group=sequence, sync_gradients=False))
    with pytest.raises(ValueError, match=r"blocks.0.mixer \(GLA\) counts its heads"):
        loss_of(sequence_parallel(split(decoder("gla"), mesh, "attention"), group=sequence))
    with pytest.raises(
        ValueError, match="plans are for whole weights or those of FSDP2, and these are tensor-parallel"
    ):
        model = sequence_parallel(split(decoder(), mesh, "mlp"), group=sequence)
        run_plan(model, any_plan(LENGTHS, 2, 0), batch(), labels=batch(), lengths=LENGTHS)
