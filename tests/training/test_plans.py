"""Plans made ahead are the same on every rank, and so is every refusal."""

import pytest

from seqpar import plan_ahead, run_plan, sequence_parallel
from seqpar.planner import Cluster, CostModel, GroupKind, Options, check, problem_of
from tests.training.test_execute import one_device
from tests.training.test_wrap import batch, gradients, tiny

COSTS = CostModel(
    name="hand",
    kinds=(
        GroupKind(1, "none", 1e-6, 1e-4, 1e-3),
        GroupKind(2, "ring", 6e-7, 6e-5, 1.5e-3, message_seconds=1e-6),
        GroupKind(3, "all_to_all", 5e-7, 5e-5, 2e-3, message_seconds=1e-6),
        GroupKind(4, "ring", 4e-7, 4e-5, 2e-3, message_seconds=1e-6),
    ),
    bytes_per_token=100.0,
    state_bytes=0.0,
)
BATCHES = [(5, 1, 17, 3), (30, 2, 2, 2, 2, 2, 2), (8,) * 6, (1, 40)]
OPTIONS = Options(seconds=0.3)


def cluster_of(group, tokens=12):
    return Cluster("hand", group.size, group.size, tokens * 100)


def costs_for(group):
    kinds = tuple(kind for kind in COSTS.kinds if kind.degree <= group.size)
    return CostModel(COSTS.name, kinds, COSTS.bytes_per_token, COSTS.state_bytes)


def ahead(group, batches, lengths=tuple, **options):
    return plan_ahead(batches, lengths, group=group, costs=costs_for(group), cluster=cluster_of(group), options=OPTIONS,
                      timeout_seconds=1200.0, **options)  # fmt: skip


@pytest.mark.spmd(4)
def test_planned_batches_train_like_one_device(group):
    """Documents that need several ranks, planned, executed, and compared with one device."""
    seen = []
    for lengths, plan in ahead(group, BATCHES):
        check(problem_of(lengths, cluster_of(group), costs_for(group)), plan)
        seen.append((lengths, plan.digest))
        model = sequence_parallel(tiny(), group=group)
        tokens, labels = batch(lengths)
        loss = run_plan(model, plan, tokens, labels=labels, lengths=lengths)
        expected, gradient = one_device(lengths)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert (gradients(model) - gradient).norm() <= 1e-10 * gradient.norm()
    assert [lengths for lengths, _ in seen] == BATCHES


@pytest.mark.spmd(1, 3)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_batches_are_taken_so_far_ahead_and_no_further(group, depth):
    taken = []

    def endless():
        number = 0
        while True:
            taken.append(number)
            yield (2, 3, number + 1)
            number += 1

    for number, (lengths, plan) in enumerate(ahead(group, endless(), depth=depth)):
        assert (lengths, plan.num_tokens) == ((2, 3, number + 1), 6 + number)
        assert len(taken) == number + depth + 1
        if number == 2:
            break


@pytest.mark.spmd(2)
def test_no_batches(group):
    assert list(ahead(group, [])) == []


@pytest.mark.spmd(2, 3)
def test_ranks_with_other_batches_are_refused_on_every_rank(group):
    mine = [(3, 4), (3, 5) if group.rank == 1 else (4, 4)]
    found = []
    with pytest.raises(ValueError, match=f"rank {group.rank} of {group.size}: the batch's lengths must be the same"):
        found.extend(lengths for lengths, _ in ahead(group, mine))
    assert found == [(3, 4)], "the first batch was the same"


@pytest.mark.spmd(1, 3)
def test_a_batch_without_a_plan_is_refused_on_every_rank(group):
    tokens = 12 * group.size
    with pytest.raises(ValueError, match=f"document 1 has {tokens + 1} tokens: one device holds"):
        list(ahead(group, [(3, tokens + 1)]))
    with pytest.raises(ValueError, match="document 0: expected a whole number of tokens, at least 1, got 0"):
        list(ahead(group, [(0, 1)]))


@pytest.mark.spmd(2)
def test_what_does_not_fit_the_group(group):
    other = Cluster("hand", 3, 3, 1200)
    with pytest.raises(ValueError, match="the cluster has 3 devices, the group 2 ranks"):
        next(plan_ahead(BATCHES, tuple, group=group, costs=COSTS, cluster=other))
    with pytest.raises(ValueError, match="a depth of at least 1, got 0"):
        next(ahead(group, BATCHES, depth=0))
    costs = costs_for(group)
    with pytest.raises(ValueError, match="a time-out of at least 0 seconds, got -1"):
        next(plan_ahead(BATCHES, tuple, group=group, costs=costs, cluster=cluster_of(group), timeout_seconds=-1.0))
