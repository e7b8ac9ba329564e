"""A group that was closed has given everything back, and says so."""

import os
from collections.abc import Callable

import pytest
import torch

from seqpar.collectives import Group, Ledger, alone, connect, run_ranks
from seqpar.collectives.c10d import ProcessRanks
from seqpar.collectives.group import VERBS

SIZES = (1, 2, 3)


def verbs(group: Group) -> dict[str, Callable[[], object]]:
    """A call of every verb, by its name; of ``close`` too."""
    one, ranks = torch.zeros(1), range(group.size)
    return {
        "exchange": lambda: group.exchange(None, None, None, None),
        "all_gather": lambda: group.all_gather(one, shapes=[[1]] * group.size),
        "all_to_all": lambda: group.all_to_all([one] * group.size, [torch.empty(1) for _ in ranks]),
        "reduce_scatter": lambda: group.reduce_scatter([one] * group.size),
        "all_reduce": lambda: group.all_reduce(one),
        "subgroup": lambda: group.subgroup([group.rank]),
        "partition": lambda: group.partition([[rank] for rank in ranks]),
        "close": group.close,
    }


def assert_closed(group: Group) -> None:
    assert set(verbs(group)) == set(VERBS)
    for verb, call in verbs(group).items():
        if verb == "close":
            call()
            continue
        with pytest.raises(ValueError, match=rf"rank {group.rank} of {group.size}: {verb} in a group that was closed"):
            call()


def everyone(group: Group) -> Group:
    """A group of all these ranks that may be closed: the world's own is for the next test too."""
    return group.subgroup(range(group.size))


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("counted", [False, True], ids=["plain", "ledger"])
def test_every_verb_of_a_closed_group_is_refused(group: Group, counted: bool) -> None:
    part = Ledger(everyone(group)) if counted else everyone(group)
    inner = part.subgroup(range(part.size))
    alone_in_it = part.subgroup([part.rank])
    inner.all_reduce(torch.ones(1)).wait()
    part.close()
    for closed in (part, inner, alone_in_it):
        assert_closed(closed)
    assert int(group.all_reduce(torch.tensor(1)).wait()) == group.size, "the group it was made of goes on"


@pytest.mark.spmd(2, 3)
def test_a_subgroup_is_made_anew_once_it_was_closed(group: Group) -> None:
    """Whatever the first one left on its way does not reach the second."""
    for counted in (group, Ledger(group)):
        for step in range(3):
            part = counted.subgroup(range(group.size))
            assert part is counted.subgroup(range(group.size))
            if part.rank == 0:
                part.exchange(torch.full((2,), step), 1, None, None)  # closing waits for it to arrive
            if part.rank == 1:
                got = part.exchange(None, None, torch.empty(2, dtype=torch.int64), 0).wait()
                assert got is not None and got.tolist() == [step, step]
            assert int(part.all_reduce(torch.tensor(step)).wait()) == step * group.size
            part.close()


@pytest.mark.spmd(3)
def test_overlapping_subgroups_close_in_one_order(group: Group) -> None:
    """The ranks made them in different orders; closing their maker waits for nobody who waits."""
    part = everyone(group)
    orders = {0: [(0, 1), (0, 2)], 1: [(0, 1), (1, 2)], 2: [(0, 2), (1, 2)]}
    for ranks in orders[part.rank]:
        part.subgroup(ranks)
    part.close()


def test_alone_can_be_closed() -> None:
    group = alone()
    inner = group.subgroup([0])
    inner.close()
    group.all_reduce(torch.ones(1)).wait()
    assert group.subgroup([0]) is not inner
    group.close()
    assert_closed(group)
    alone().all_reduce(torch.ones(1)).wait()


def test_closing_while_an_error_is_raised_waits_for_nobody() -> None:
    def body(group: Group) -> None:
        if group.rank == 0:
            try:
                raise ValueError("boom 17")
            finally:
                group.close()
        group.all_reduce(torch.ones(1)).wait()

    with pytest.raises(ValueError, match="boom 17"):
        run_ranks(2, body)


def count(what: str) -> int:
    return len(os.listdir(f"/proc/self/{what}"))


@pytest.mark.spmd(4)
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")
def test_closed_groups_give_their_threads_and_descriptors_back(group: Group) -> None:
    if not isinstance(group, ProcessRanks):
        pytest.skip("threads have none")
    seen = []
    for _ in range(4):
        again = connect()
        if again.size != group.size:
            pytest.skip("this world has more ranks")
        again.subgroup(range(again.size)).all_reduce(torch.ones(1)).wait()
        again.close()
        seen.append((count("task"), count("fd")))
    assert seen[1:] == seen[:1] * 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")
def test_the_threads_of_ranks_are_gone_when_run_ranks_returns() -> None:
    """What torch keeps for each thread must not be taken down beside the end of the interpreter."""

    def body(group: Group) -> None:
        weights = torch.ones(4, requires_grad=True)
        (weights * group.all_reduce(torch.ones(4)).wait()).sum().backward()

    run_ranks(4, body)
    before = count("task")
    for _ in range(5):
        run_ranks(4, body)
        assert count("task") == before
