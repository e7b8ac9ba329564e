"""DDP and FSDP2 over the joint mesh of data and sequence ranks: their average is the gradient of one device."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seqpar import sequence_parallel
from seqpar.collectives import group_of
from seqpar.collectives.c10d import ProcessRanks
from tests.training.test_wrap import LENGTHS, batch, gradients, one_device, tiny


def joint_mesh(group):
    """Two replicas of two sequence ranks, over all processes."""
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != 4:
        pytest.skip("needs a world of 4 processes: pytest --world processes")
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))


def expected_gradient():
    return (one_device(LENGTHS, 0)[1] + one_device(LENGTHS, 1)[1]) / 2


def step(model, replica):
    tokens, labels = batch(LENGTHS, replica)
    loss = model(tokens, labels=labels, lengths=LENGTHS).loss
    loss.backward()
    return loss


@pytest.mark.spmd(4)
def test_ddp_over_the_joint_mesh(group):
    mesh = joint_mesh(group)
    model = sequence_parallel(tiny(), group=group_of(mesh["sequence"]), sync_gradients=False)
    replica = mesh["data"].get_local_rank()
    loss = step(torch.nn.parallel.DistributedDataParallel(model), replica)
    assert abs(loss.item() - one_device(LENGTHS, replica)[0]) < 1e-12
    assert (gradients(model) - expected_gradient()).norm() <= 1e-10 * expected_gradient().norm()


@pytest.mark.spmd(4)
@pytest.mark.parametrize("over", ["data", "all"])
def test_ddp_around_a_model_that_sums_by_itself(group, over):
    """Our sums come before anything accumulates, so DDP averages whole gradients, over replicas or over all ranks."""
    mesh = joint_mesh(group)
    model = sequence_parallel(tiny(), group=group_of(mesh["sequence"]))
    process_group = mesh.get_group("data") if over == "data" else None
    step(torch.nn.parallel.DistributedDataParallel(model, process_group=process_group), mesh["data"].get_local_rank())
    assert (gradients(model) - expected_gradient()).norm() <= 1e-10 * expected_gradient().norm()


@pytest.mark.spmd(4)
def test_fsdp2_over_the_joint_mesh(group):
    mesh = joint_mesh(group)
    model, joint = tiny(), init_device_mesh("cpu", (4,))
    for part in (*model.mixers, model):
        fully_shard(part, mesh=joint)
    wrapped = sequence_parallel(model, group=group_of(mesh["sequence"]), sync_gradients=False)
    replica = mesh["data"].get_local_rank()
    loss = step(wrapped, replica)
    assert abs(loss.item() - one_device(LENGTHS, replica)[0]) < 1e-12
    with pytest.raises(ValueError, match="under FSDP2 pass sync_gradients=False"):
        sequence_parallel(model, group=group_of(mesh["sequence"]))(batch(LENGTHS)[0], lengths=LENGTHS)
    whole = torch.cat([p.grad.full_tensor().flatten() for p in wrapped.parameters()])
    assert (whole - expected_gradient()).norm() <= 1e-10 * expected_gradient().norm()


@pytest.mark.spmd(4)
@pytest.mark.parametrize("around", ["inner", "wrapped"])
def test_fsdp2_over_a_mesh_without_the_sequence_ranks_is_refused(group, around):
    """Nobody would sum over the ranks that share a sequence; their weights would drift apart."""
    mesh = joint_mesh(group)
    model, sequence = tiny(), group_of(mesh["sequence"])
    if around == "inner":
        fully_shard(model, mesh=mesh["data"])
    wrapped = sequence_parallel(model, group=sequence, sync_gradients=False)
    if around == "wrapped":
        fully_shard(wrapped, mesh=mesh["data"])
    tokens, labels = batch(LENGTHS)
    with pytest.raises(ValueError, match=r"FSDP2 reduces the gradients of .* shard over the joint mesh"):
        wrapped(tokens, labels=labels, lengths=LENGTHS)


@pytest.mark.spmd(4)
@pytest.mark.parametrize("sync", [False, True])
def test_ddp_with_a_static_graph_over_the_joint_mesh(group, sync):
    """DDP finds the tensors of what a wrapped model returns, at the first step and at later ones."""
    mesh = joint_mesh(group)
    model = sequence_parallel(tiny(), group=group_of(mesh["sequence"]), sync_gradients=sync)
    parallel = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
    for _ in range(2):
        model.zero_grad()
        step(parallel, mesh["data"].get_local_rank())
        assert (gradients(model) - expected_gradient()).norm() <= 1e-10 * expected_gradient().norm()


class Outer(torch.nn.Module):
    """A module of a user's, with a wrapped model inside."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


@pytest.mark.spmd(4)
@pytest.mark.parametrize("where", ["around", "outside", "inside"])
def test_ddp_over_ranks_that_do_not_share_the_sequence_is_refused(group, where):
    """The other face of FSDP2 over such a mesh: nobody would sum, and the weights would drift apart."""
    mesh = joint_mesh(group)
    data, parallel = mesh.get_group("data"), torch.nn.parallel.DistributedDataParallel
    model = parallel(tiny(), process_group=data) if where == "inside" else tiny()
    model = sequence_parallel(model, group=group_of(mesh["sequence"]), sync_gradients=False)
    if where != "inside":
        model = parallel(Outer(model) if where == "outside" else model, process_group=data)
    tokens, labels = batch(LENGTHS)
    with pytest.raises(ValueError, match=r"DDP averages .* but 1 of them share a sequence with me, of 2: put DDP over"):
        model(tokens, labels=labels, lengths=LENGTHS)


@pytest.mark.spmd(4)
def test_ddp_inside_over_the_joint_mesh(group):
    mesh = joint_mesh(group)
    inner = torch.nn.parallel.DistributedDataParallel(tiny())
    model = sequence_parallel(inner, group=group_of(mesh["sequence"]), sync_gradients=False)
    step(model, mesh["data"].get_local_rank())
    assert (gradients(model) - expected_gradient()).norm() <= 1e-10 * expected_gradient().norm()


@pytest.mark.spmd(4)
def test_ddp_that_one_rank_of_a_sequence_does_not_have(group):
    mesh = joint_mesh(group)
    model = sequence_parallel(tiny(), group=group_of(mesh["sequence"]))
    solo = dist.new_subgroups(group_size=1)[0]
    if mesh["sequence"].get_local_rank() == 1:
        model = torch.nn.parallel.DistributedDataParallel(model, process_group=solo)
    with pytest.raises(ValueError, match=r"what DDP averages over must be the same .* mine: (no DDP|1 of 1)"):
        model(batch(LENGTHS)[0], lengths=LENGTHS)


@pytest.mark.spmd(4)
def test_parameters_that_ddp_does_not_look_at(group):
    mesh = joint_mesh(group)
    model = sequence_parallel(tiny(), group=group_of(mesh["sequence"]), sync_gradients=False)
    parallel = torch.nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, ["module.head.weight"])
    with pytest.raises(ValueError, match=r"DDP leaves the gradient of head\.weight alone"):
        parallel(model)(batch(LENGTHS)[0], lengths=LENGTHS)
    model.module.head.weight.requires_grad_(False)
    assert parallel(model)(batch(LENGTHS)[0], lengths=LENGTHS).logits.requires_grad
