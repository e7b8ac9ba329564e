"""The ring brings everyone every block, and gradients home; nothing more is sent than somebody needs."""

import pytest
import torch

from seqpar.collectives import Ledger, run_ranks
from seqpar.collectives.ring import Hop, ring, ring_gradients
from seqpar.collectives.rows import count, pick, subtract, union, within

ROWS = (3, 0, 2, 4)


def whole_block_hops(rank, rows):
    """The hops of a ring in which every rank needs every row; ``rows[r]`` is the size of the block of rank ``r``."""
    size = len(rows)
    hops = []
    for index in range(size):
        source, last = (rank - index) % size, index == size - 1
        all_of = tuple(((0, number),) if number else () for number in rows)
        onward, ending = ((), all_of[source]) if last else (all_of[source], ())
        hops.append(Hop(source, rows[source], onward, ending, all_of[rank] if last else ()))
    return tuple(hops)


def block_of(rank, rows):
    return torch.arange(2 * rows * 5, dtype=torch.float64).view(2, rows, 5) + 1000 * rank


@pytest.mark.spmd(1, 2, 4)
def test_everyone_sees_every_block(group):
    rows = ROWS[: group.size]
    hops = whole_block_hops(group.rank, rows)
    for index, held in enumerate(ring(block_of(group.rank, rows[group.rank]), group, hops)):
        source = (group.rank - index) % group.size
        assert hops[index].source == source
        assert torch.equal(held, block_of(source, rows[source]))


@pytest.mark.spmd(1, 2, 4)
def test_gradients_come_home_summed(group):
    """Rank r adds (r + 1) to the gradient of every row it sees."""
    rows = ROWS[: group.size]

    def visit(_, held):
        return torch.full_like(held, group.rank + 1)

    home = ring_gradients(block_of(group.rank, rows[group.rank]), group, whole_block_hops(group.rank, rows), visit)
    assert torch.equal(home, torch.full_like(home, sum(range(1, group.size + 1))))
    assert home.shape[1] == rows[group.rank]


def test_rows_that_nobody_needs_stay_behind():
    """Rank 0's block: rank 1 needs rows 1 to 3, rank 2 only row 2; gradients go home from where rows end."""
    hops = {
        0: (Hop(0, 4, ((1, 4),), (), ()), Hop(2, 0, (), (), ((1, 2), (3, 4))), Hop(1, 0, (), (), ((2, 3),))),
        1: (Hop(1, 0, (), (), ()), Hop(0, 3, ((1, 2),), ((0, 1), (2, 3)), ()), Hop(2, 0, (), (), ())),
        2: (Hop(2, 0, (), (), ()), Hop(1, 0, (), (), ()), Hop(0, 1, (), ((0, 1),), ())),
    }

    def body(group):
        ledger = Ledger(group)
        block = torch.arange(4 if group.rank == 0 else 0, dtype=torch.float32).view(1, -1, 1)
        seen = []

        def visit(index, held):
            seen.append(held.flatten().tolist())
            return torch.full_like(held, 10.0**group.rank)

        home = ring_gradients(block, ledger, hops[group.rank], visit)
        return seen, home.flatten().tolist(), ledger.bytes_

    (own, home, sent0), (seen1, _, sent1), (seen2, _, sent2) = run_ranks(3, body)
    assert own == [[0, 1, 2, 3], [], []]
    assert seen1 == [[], [1, 2, 3], []]
    assert seen2 == [[], [], [2]]
    assert home == [1, 11, 111, 11]
    assert (sent0, sent1, sent2) == (3 * 4, (1 + 1 + 2) * 4, 1 * 4)


def test_ranges():
    assert union([(4, 6), (0, 2), (2, 3), (5, 9)]) == ((0, 3), (4, 9))
    assert subtract(((0, 9),), ((2, 3), (5, 9))) == ((0, 2), (3, 5))
    assert within(((2, 3), (6, 8)), ((2, 4), (6, 9))) == ((0, 1), (2, 4))
    assert count(((0, 3), (4, 9))) == 8
    x = torch.arange(10).view(1, 10)
    assert pick(x, ((1, 3), (8, 9))).tolist() == [[1, 2, 8]]
    assert pick(x, ()).shape == (1, 0)
    assert pick(x, ((2, 5),)).data_ptr() == x[:, 2:].data_ptr(), "one range is a view"
