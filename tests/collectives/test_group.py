"""What every group promises, whatever its ranks are: one conformance suite for threads and processes."""

import pytest
import torch
from torch import Tensor

from seqpar.collectives import Group, Ledger, connect, group_of
from seqpar.collectives.c10d import ProcessRanks

SIZES = (1, 2, 3, 4)
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int64)


def tensor_of(rank: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The tensor that ``rank`` brings: every rank can make it, so that a receiver knows what must come."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-(2**40), 2**40, shape, generator=generator).to(dtype)


def assert_same(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert torch.equal(got, expected)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def skip_unless_processes(group: Group) -> ProcessRanks:
    if not isinstance(group, ProcessRanks):
        pytest.skip("needs ranks that are processes")
    return group


@pytest.mark.spmd(*SIZES)
def test_ranks_are_numbered(group: Group) -> None:
    numbers = group.all_gather(torch.tensor(group.rank)).wait()
    assert [int(number) for number in numbers] == list(range(group.size))
    assert isinstance(group, Group)


# exchange


@pytest.mark.spmd(2, 3, 4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)], ids=str)
def test_exchange_round_a_ring(group: Group, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    mine = tensor_of(group.rank, *shape, dtype=dtype)
    got = group.exchange(mine, following, torch.empty(shape, dtype=dtype), previous).wait()
    assert_same(got, tensor_of(previous, *shape, dtype=dtype))
    assert_same(mine, tensor_of(group.rank, *shape, dtype=dtype))


@pytest.mark.spmd(*SIZES)
def test_exchange_with_absent_ends(group: Group) -> None:
    """Along a line the first rank receives nothing and the last one sends nothing."""
    last = group.rank == group.size - 1
    mine = tensor_of(group.rank, 4)
    to, source = (None if last else group.rank + 1), (group.rank - 1 if group.rank else None)
    got = group.exchange(None if last else mine, to, torch.empty(4) if group.rank else None, source).wait()
    if group.rank:
        assert_same(got, tensor_of(group.rank - 1, 4))
    else:
        assert got is None


@pytest.mark.spmd(2, 3, 4)
def test_exchanges_in_flight_keep_their_order(group: Group) -> None:
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    pendings = [
        group.exchange(tensor_of(group.rank, n + 1, seed=n), following, torch.empty(n + 1), previous) for n in range(5)
    ]
    for n in range(5):
        assert_same(pendings[n].wait(), tensor_of(previous, n + 1, seed=n))


@pytest.mark.spmd(2, 3, 4)
def test_pendings_may_be_waited_for_in_any_order(group: Group) -> None:
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    first = group.exchange(tensor_of(group.rank, 3), following, torch.empty(3), previous)
    total = group.all_reduce(torch.tensor(group.rank))
    second = group.exchange(tensor_of(group.rank, 2), following, torch.empty(2), previous)
    assert_same(second.wait(), tensor_of(previous, 2))
    assert int(total.wait()) == sum(range(group.size))
    assert_same(first.wait(), tensor_of(previous, 3))


@pytest.mark.spmd(2, 3)
def test_a_sender_does_not_wait_for_its_receiver(group: Group) -> None:
    """Rank 1 comes to the first message only after the second, which rank 0 sends when its first wait is over."""
    other = group.partition([range(group.size)])
    large = 2**20
    if group.rank == 0:
        group.exchange(torch.ones(large), 1, None, None).wait()
        other.exchange(torch.zeros(1), 1, None, None).wait()
    if group.rank == 1:
        assert_same(other.exchange(None, None, torch.empty(1), 0).wait(), torch.zeros(1))
        assert_same(group.exchange(None, None, torch.empty(large), 0).wait(), torch.ones(large))


@pytest.mark.spmd(2, 4)
def test_tensors_need_be_neither_contiguous_nor_free_of_gradients(group: Group) -> None:
    mine = tensor_of(group.rank, 3, 4).t().requires_grad_()
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    expected = tensor_of(previous, 3, 4).t()
    assert_same(group.exchange(mine, following, torch.empty(3, 4).t(), previous).wait(), expected)
    assert_same(group.all_gather(mine).wait()[previous], expected)
    received = group.all_to_all([mine] * group.size, [torch.empty(3, 4).t() for _ in range(group.size)]).wait()
    assert_same(received[previous], expected)


# all_gather, all_to_all


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 3)], ids=str)
def test_all_gather(group: Group, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gathered = group.all_gather(tensor_of(group.rank, *shape, dtype=dtype)).wait()
    assert len(gathered) == group.size
    for rank, got in enumerate(gathered):
        assert_same(got, tensor_of(rank, *shape, dtype=dtype))


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather_of_uneven_shapes(group: Group, dtype: torch.dtype) -> None:
    """Rank 1 brings nothing."""
    shapes = [(2, (rank - 1) ** 2 * 3) for rank in range(group.size)]
    gathered = group.all_gather(tensor_of(group.rank, *shapes[group.rank], dtype=dtype), shapes).wait()
    for rank, got in enumerate(gathered):
        assert_same(got, tensor_of(rank, *shapes[rank], dtype=dtype))


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_to_all(group: Group, dtype: torch.dtype) -> None:
    """From rank a to rank b go (a + 2 b) % 4 rows: some messages are empty."""

    def message(source: int, to: int) -> Tensor:
        return tensor_of(source, (source + 2 * to) % 4, 3, dtype=dtype, seed=to)

    ranks = range(group.size)
    sends = [message(group.rank, to) for to in ranks]
    receives = [torch.empty_like(message(source, group.rank)) for source in ranks]
    got = group.all_to_all(sends, receives).wait()
    for source in ranks:
        assert_same(got[source], message(source, group.rank))
    assert got[group.rank] is sends[group.rank]


# sums


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (), (0,)], ids=str)
def test_reduce_scatter_adds_in_rank_order(group: Group, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    got = group.reduce_scatter([tensor_of(group.rank, *shape, dtype=dtype, seed=to) for to in range(group.size)]).wait()
    expected = tensor_of(0, *shape, dtype=dtype, seed=group.rank)
    for rank in range(1, group.size):
        expected = expected + tensor_of(rank, *shape, dtype=dtype, seed=group.rank)
    assert_same(got, expected)


@pytest.mark.spmd(2, 3)
def test_reduce_scatter_of_uneven_parts(group: Group) -> None:
    got = group.reduce_scatter([tensor_of(group.rank, to, 2) for to in range(group.size)]).wait()
    assert_same(
        got, sum((tensor_of(rank, group.rank, 2) for rank in range(1, group.size)), tensor_of(0, group.rank, 2))
    )


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1001,), (), (0, 2)], ids=str)
def test_all_reduce(group: Group, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mine = tensor_of(group.rank, *shape, dtype=dtype)
    total = group.all_reduce(mine).wait()
    assert_same(mine, tensor_of(group.rank, *shape, dtype=dtype))
    assert (total.dtype, total.shape) == (dtype, mine.shape)
    assert total.data_ptr() != mine.data_ptr() or not mine.numel()
    for seen in group.all_gather(total).wait():
        assert_same(seen, total)
    if not dtype.is_floating_point:
        assert_same(total, sum(tensor_of(rank, *shape, dtype=dtype) for rank in range(group.size)))
    elif mine.numel():
        expected = sum(tensor_of(rank, *shape, dtype=dtype).double() for rank in range(group.size))
        assert relative_error(total, expected) <= group.size * torch.finfo(dtype).eps


# partition


@pytest.mark.spmd(4)
def test_partition_into_rows_and_columns(group: Group) -> None:
    """Data parallel times sequence parallel: summing over rows, then columns, sums over all."""
    rows = group.partition([[0, 1], [2, 3]])
    columns = group.partition([[0, 2], [1, 3]])
    assert (rows.rank, rows.size) == (group.rank % 2, 2)
    assert (columns.rank, columns.size) == (group.rank // 2, 2)
    bit = torch.tensor(2**group.rank)
    assert int(rows.all_reduce(bit).wait()) == (0b0011 if group.rank < 2 else 0b1100)
    assert int(columns.all_reduce(bit).wait()) == (0b0101 if group.rank % 2 == 0 else 0b1010)
    assert int(columns.all_reduce(rows.all_reduce(bit).wait()).wait()) == 0b1111


@pytest.mark.spmd(3, 4)
def test_partition_keeps_the_order_it_is_given(group: Group) -> None:
    everyone = list(reversed(range(group.size)))
    backwards = group.partition([everyone])
    assert backwards.rank == everyone.index(group.rank)
    assert [int(rank) for rank in backwards.all_gather(torch.tensor(group.rank)).wait()] == everyone
    to, source = (backwards.rank + 1) % group.size, (backwards.rank - 1) % group.size
    got = backwards.exchange(torch.tensor(group.rank), to, torch.empty((), dtype=torch.int64), source).wait()
    assert_same(got, torch.tensor(everyone[source]))


@pytest.mark.spmd(4)
def test_partitions_that_only_some_ranks_make_do_not_disturb_the_others(group: Group) -> None:
    halves = group.partition([[0, 1], [2, 3]])
    if group.rank < 2:
        halves.partition([[1, 0]]).all_reduce(torch.ones(1)).wait()
        assert halves.partition([[0], [1]]).size == 1
    crossed = group.partition([[0, 3], [1, 2]])
    assert int(crossed.all_reduce(torch.tensor(group.rank)).wait()) == 3
    assert group.partition([[0], [1], [2], [3]]).size == 1


@pytest.mark.spmd(4)
def test_a_subgroup_is_made_by_its_ranks_alone_and_once(group: Group) -> None:
    """Rank 3 stays away from the first, rank 0 from the second, and they are made in another order by rank 2."""
    wanted: dict[int, list[tuple[int, ...]]] = {0: [(1, 0, 2)], 1: [(1, 0, 2), (1, 3)], 2: [(1, 0, 2)], 3: [(1, 3)]}
    for ranks in wanted[group.rank]:
        part = group.subgroup(ranks)
        assert part is group.subgroup(list(ranks)), "made a second time"
        assert (part.rank, part.size) == (ranks.index(group.rank), len(ranks))
        assert [int(rank) for rank in part.all_gather(torch.tensor(group.rank)).wait()] == list(ranks)
    alone = group.subgroup([group.rank])
    assert (alone.rank, alone.size) == (0, 1)
    inner = group.subgroup((1, 0, 2)).subgroup((2, 0)) if group.rank in (1, 2) else None
    if inner is not None:
        assert [int(rank) for rank in inner.all_gather(torch.tensor(group.rank)).wait()] == [2, 1]


@pytest.mark.spmd(4)
def test_overlapping_subgroups_take_turns(group: Group) -> None:
    """As in a plan: each rank goes through its groups in the same order; those of others are not its business."""
    turns = [((0, 1), (2, 3)), ((1, 2),), ((0, 1, 2), (3,)), ((2, 3), (0, 1))] * 3
    for turn, groups in enumerate(turns):
        mine = next((ranks for ranks in groups if group.rank in ranks), None)
        if mine is not None:
            total = group.subgroup(mine).all_reduce(torch.tensor(10 * turn + group.rank)).wait()
            assert int(total) == sum(10 * turn + rank for rank in mine)


@pytest.mark.spmd(4)
def test_verbs_of_several_groups_in_flight(group: Group) -> None:
    rows, columns = group.partition([[0, 1], [2, 3]]), group.partition([[0, 2], [1, 3]])
    sums = [part.all_reduce(torch.tensor(group.rank)) for part in (rows, columns, group)]
    row, column = group.rank // 2, group.rank % 2
    assert [int(total.wait()) for total in reversed(sums)] == [6, 2 * column + 2, 4 * row + 1]


# ledger


@pytest.mark.spmd(*SIZES)
def test_a_ledger_counts_what_leaves(group: Group) -> None:
    ledger, others = Ledger(group), group.size - 1
    ledger.all_gather(torch.zeros(6)).wait()
    ledger.all_to_all([torch.zeros(2)] * group.size, [torch.empty(2) for _ in range(group.size)]).wait()
    ledger.reduce_scatter([torch.zeros(3)] * group.size).wait()
    ledger.all_reduce(torch.zeros(group.size)).wait()
    expected = {"all_gather": 24, "all_to_all": 8, "reduce_scatter": 12, "all_reduce": 8}
    assert ledger.bytes_by_verb == {verb: bytes_ * others for verb, bytes_ in expected.items() if others}
    assert ledger.messages == others * (1 + 1 + 1 + 2)


@pytest.mark.spmd(2, 4)
def test_a_ledger_counts_what_its_subgroups_send(group: Group) -> None:
    ledger = Ledger(group)
    pair = group.rank // 2 * 2
    part = ledger.subgroup((pair, pair + 1))
    part.all_gather(torch.zeros(3)).wait()
    assert part is ledger.subgroup((pair, pair + 1))
    assert (part.bytes_, part.messages) == (ledger.bytes_, ledger.messages) == (12, 1)
    ledger.all_gather(torch.zeros(1)).wait()
    assert (part.bytes_, ledger.bytes_) == (12, 12 + 4 * (group.size - 1))


# errors


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("groups", [[[0]], [[0, 1, 2, 3], [0]], [[-1, 0]], []], ids=str)
def test_a_partition_holds_each_rank_once(group: Group, groups: list[list[int]]) -> None:
    if groups == [[0]] and group.size == 1:
        return
    with pytest.raises(ValueError, match=f"ranks 0 to {group.size - 1} once, got"):
        group.partition(groups)


@pytest.mark.spmd(*SIZES)
@pytest.mark.parametrize("shift", [1, 0], ids=["without me", "twice me"])
def test_a_subgroup_holds_me_and_ranks_of_the_group_once(group: Group, shift: int) -> None:
    me, other = group.rank, (group.rank + shift) % group.size
    wrong = [[other] if shift and other != me else [me, me], [me, group.size], [-1, me], []]
    for ranks in wrong:
        with pytest.raises(ValueError, match=f"rank {me} of {group.size}: a subgroup holds ranks of 0 to"):
            group.subgroup(ranks)


@pytest.mark.spmd(1)
def test_a_lone_rank_has_no_peer(group: Group) -> None:
    with pytest.raises(ValueError, match="no peer"):
        group.exchange(torch.zeros(1), 1, None, None)


@pytest.mark.spmd(3)
def test_what_cannot_be_sent_is_refused(group: Group) -> None:
    with pytest.raises(ValueError, match=f"rank {group.rank} of {group.size}: exchange with rank 9, expected another"):
        group.exchange(torch.zeros(1), 9, None, None)
    with pytest.raises(ValueError, match=r"takes \d shapes, one per rank, got 5"):
        group.all_gather(torch.zeros(1), [[1]] * 5)
    with pytest.raises(ValueError, match="but shapes say"):
        group.all_gather(torch.zeros(1), [[2]] * group.size)
    with pytest.raises(ValueError, match="would fill one tensor from several ranks"):
        group.all_to_all([torch.zeros(1)] * 3, [torch.empty(1)] * 3)
    for verb in (lambda: group.reduce_scatter([]), lambda: group.all_to_all([], [])):
        with pytest.raises(ValueError, match="one per rank, got 0"):
            verb()


# what the user has already


@pytest.mark.spmd(4)
def test_group_of_a_mesh_or_process_group(group: Group) -> None:
    skip_unless_processes(group)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if dist.get_world_size() != 4:
        pytest.skip("a mesh spans all processes, and this test wants 4")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    for name, expected in (
        ("data", [group.rank % 2, group.rank % 2 + 2]),
        ("sequence", [group.rank // 2 * 2 + i for i in (0, 1)]),
    ):
        for ranks in (mesh[name], mesh.get_group(name)):
            part = group_of(ranks)
            assert [int(rank) for rank in part.all_gather(torch.tensor(group.rank)).wait()] == expected
    with pytest.raises(ValueError, match=r"2 dims \('data', 'sequence'\).*pick one dim, mesh\['sequence'\]"):
        group_of(mesh)
    not_mine = dist.new_group([0, 1])
    if group.rank > 1:
        with pytest.raises(ValueError, match="holds this rank"):
            group_of(not_mine)
    else:
        assert int(group_of(not_mine).partition([[1, 0]]).all_reduce(torch.tensor(1)).wait()) == 2


@pytest.mark.spmd(4)
def test_connecting_again_is_the_same_group(group: Group) -> None:
    skip_unless_processes(group)
    again = connect()
    if again.size != group.size:
        pytest.skip("this world has more ranks")
    assert [int(rank) for rank in again.all_gather(torch.tensor(again.rank)).wait()] == list(range(4))
    assert again.rank == group.rank


@pytest.mark.spmd(2, 4)
def test_many_verbs_leave_nothing_behind(group: Group) -> None:
    """Messages that were sent are kept no longer than until the next verb is over."""
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for step in range(1, 21):
        group.exchange(torch.ones(step), following, torch.empty(step), previous).wait()
    if isinstance(group, ProcessRanks):
        assert len(group.shared.sent) <= 1
