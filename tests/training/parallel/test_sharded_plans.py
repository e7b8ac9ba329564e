"""Plans on a model that FSDP2 shards: any groups, idle ranks and meshes, with the numbers of one device."""

import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seqpar import run_plan, sequence_parallel
from seqpar.collectives.c10d import ProcessRanks
from tests.plans import any_plan, plan_of
from tests.training.test_wrap import TinyLM, batch, one_device, tiny

MESHES = {"4": (4,), "2 x 2": (2, 2)}


def sharded(group, shape, **options):
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != 4:
        pytest.skip("needs a world of 4 processes: pytest --world processes")
    model, mesh = tiny(), init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for part in (*model.mixers, model):
        fully_shard(part, mesh=mesh)
    return sequence_parallel(model, group=group, sync_gradients=False, **options)


def whole(model):
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


def drawn_lengths(seed):
    rng = random.Random(seed)
    return [rng.choice((0, 1, 2, 5, 9)) for _ in range(rng.randint(1, 6))] + [3]


def check_plans(group, shape, seeds):
    model = sharded(group, shape, layout="zigzag")
    for seed in seeds:
        lengths = drawn_lengths(seed)
        tokens, labels = batch(lengths)
        model.zero_grad()
        loss = run_plan(model, any_plan(lengths, 4, seed), tokens, labels=labels, lengths=lengths)
        expected, gradient = one_device(lengths)
        assert abs(loss.item() - expected) <= 1e-10 * max(1e-3, abs(expected)), seed
        assert (whole(model) - gradient).norm() <= 1e-10 * max(1e-6, gradient.norm()), seed


@pytest.mark.spmd(4)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_any_plan_gives_the_numbers_of_one_device(group, shape):
    check_plans(group, shape, range(4))


@pytest.mark.nightly
@pytest.mark.spmd(4)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_two_hundred_plans_give_the_numbers_of_one_device(group, shape):
    check_plans(group, shape, range(4, 104))


@pytest.mark.spmd(4)
def test_ranks_without_work_take_part_and_plans_evaluate_and_tile(group):
    lengths = [9, 4]
    tokens, labels = batch(lengths)
    plan = plan_of(lengths, 4, [[((1, 3), (0,))], [((2,), (1,))]])
    expected, gradient = one_device(lengths)
    for options in ({}, {"loss_tokens": 3}):
        model = sharded(group, (4,), **options)
        with torch.no_grad():
            assert abs(run_plan(model, plan, tokens, labels=labels, lengths=lengths).item() - expected) <= 1e-10
        assert abs(run_plan(model, plan, tokens, labels=labels, lengths=lengths).item() - expected) <= 1e-10
        assert (whole(model) - gradient).norm() <= 1e-10 * gradient.norm()


@pytest.mark.spmd(4)
def test_a_mesh_of_other_ranks_is_refused(group):
    lengths = [9, 4]
    tokens, labels = batch(lengths)
    sharded(group, (4,))
    model = TinyLM().double()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"])
    wrapped = sequence_parallel(model, group=group, sync_gradients=False)
    plan = plan_of(lengths, 4, [[((0, 1, 2, 3), (0, 1))]])
    with pytest.raises(ValueError, match="the plan is for ranks"):
        run_plan(wrapped, plan, tokens, labels=labels, lengths=lengths)
