"""``group=`` takes a group, a dim of a mesh or a process group as it is, and nothing else."""

from typing import Any

import pytest
import torch

from seqpar import Shard, plan_ahead, sequence_parallel, verify
from seqpar.collectives import Group, Ledger, alone, group_of
from seqpar.collectives.c10d import ProcessRanks
from seqpar.estimates.calibrate import calibrate
from seqpar.planner import Cluster, CostModel, GroupKind
from tests.verification.broken_models import Tiny, batch


@pytest.mark.spmd(4)
def test_a_mesh_or_process_group_is_a_group_for_every_function_that_takes_one(group: Group) -> None:
    if not isinstance(group, ProcessRanks):
        pytest.skip("needs ranks that are processes")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if dist.get_world_size() != 4:
        pytest.skip("a mesh spans all processes, and this test wants 4")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    costs = CostModel("m", (GroupKind(1, "none", 1e-6, 1e-4, 1e-3), GroupKind(2, "ring", 6e-7, 6e-5, 2e-3)), 1.0, 0.0)
    for ranks in (mesh["sequence"], mesh.get_group("sequence")):
        model = sequence_parallel(Tiny(), group=ranks)
        assert model.group.size == 2
        data = batch()
        assert model(data.tokens, labels=data.labels, lengths=data.lengths).loss.isfinite()
        assert verify(Tiny(), data, ranks).ok
        plans = plan_ahead([[50, 9]], list, group=ranks, costs=costs, cluster=Cluster("c", 2, 2, 40))
        assert [plan.num_documents for _, plan in plans] == [2]
        assert calibrate(Tiny(), ranks, lengths=(32, 64), repeats=1).cluster.devices == 2


@pytest.mark.parametrize("wrong", ["ranks", 2, [0, 1], torch.nn.Linear(1, 1), object()], ids=lambda x: type(x).__name__)
def test_what_is_no_group_is_refused_with_what_to_pass(wrong: Any) -> None:
    message = r"group must be a Group \(seqpar.connect\(\)\), one dim of a mesh \(mesh\['sp'\]\) or a process group"
    for call in (
        lambda: group_of(wrong),
        lambda: sequence_parallel(Tiny(), group=wrong),
        lambda: verify(Tiny(), batch(), wrong),
        lambda: next(plan_ahead([], list, group=wrong, costs=None, cluster=None)),
        lambda: calibrate(Tiny(), wrong, lengths=(32, 64)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"a shard takes a Group: seqpar.group_of makes one"):
        Shard.of([3], wrong)


def test_a_group_is_taken_as_it_is() -> None:
    for group in (alone(), Ledger(alone())):
        assert group_of(group) is group and sequence_parallel(Tiny(), group=group).group is group
