"""Shards hold every token once, know their positions, and take and gather are inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import Shard
from seqpar.collectives import Ledger, alone, run_ranks
from tests.cutting import LAYOUTS, cut

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 8), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 5))
def test_every_token_once_with_its_position(lengths, size, layout, seed):
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    tokens = torch.arange(sum(lengths))

    def body(group):
        shard = cut(lengths, group, layout, seed)
        mine = shard.take(tokens, dim=0)
        assert torch.equal(mine, shard.indices_of(group.rank))
        assert torch.equal(shard.positions, positions[mine])
        rows = [(p.document, p.row + i) for p in shard.pieces_of(group.rank) for i in range(p.count)]
        assert [row for _, row in rows] == list(range(shard.num_local))
        assert [document for document, _ in rows] == documents[mine].tolist()
        assert torch.equal(shard.gather(mine[None]), tokens[None])
        return mine

    assert torch.equal(torch.cat(run_ranks(size, body)).sort().values, tokens)


@pytest.mark.parametrize(("layout", "expected"), [
    ("contiguous", [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]),
    ("zigzag", [[0, 8, 9], [1, 7], [2, 6], [3, 4, 5]]),
    ("striped", [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
])  # fmt: skip
def test_layouts(layout, expected):
    def body(group):
        return Shard.of([10], group, layout).indices_of(group.rank).tolist()

    assert run_ranks(4, body) == expected


@pytest.mark.spmd(1, 2, 4)
def test_gather_and_its_gradient(group):
    """What follows a gather is the same on every rank, so the gradient is my rows, once."""
    x = torch.arange(26.0).view(2, 13).double()
    for layout in ("contiguous", "zigzag", "striped"):
        shard = Shard.of([5, 0, 8], group, layout)
        mine = shard.take(x).clone().requires_grad_()
        whole = shard.gather(mine)
        assert torch.equal(whole, x)
        whole.backward(2 * x)
        assert torch.equal(mine.grad, 2 * shard.take(x))


def test_take_is_differentiable_and_sends_nothing():
    def body(group):
        ledger = Ledger(group)
        x = torch.arange(12.0).view(1, 12, 1).requires_grad_()
        Shard.of([12], ledger, "zigzag").take(x).sum().backward()
        return ledger.messages, x.grad.sum().item()

    assert run_ranks(3, body) == [(0, 4.0)] * 3


def test_uneven_gather_sends_my_rows_to_each_peer():
    def body(group):
        ledger = Ledger(group)
        shard = Shard.of([10], ledger)
        shard.gather(shard.take(torch.zeros(1, 10, 2)))
        return ledger.bytes_

    assert run_ranks(4, body) == [3 * rows * 2 * 4 for rows in (2, 3, 2, 3)]


@pytest.mark.parametrize(("arguments", "words"), [
    ({"lengths": [3, -1]}, "lengths must not be negative, document 1 has -1"),
    ({"lengths": [2.5]}, "lengths must be whole numbers"),
    ({"lengths": [3], "layout": "diagonal"}, "layout must be one of contiguous, zigzag, striped, got 'diagonal'"),
    ({"lengths": [4], "fragments": [[(0, 2)]]}, "fragments hold 2 tokens, the documents 4"),
    ({"lengths": [4], "fragments": [[(0, 2), (3, 4)]]}, "token 2 is missing"),
    ({"lengths": [4], "fragments": [[(0, 2), (1, 4)]]}, "token 1 is there twice"),
    ({"lengths": [4], "fragments": [[], [(0, 4)]]}, "fragments must list 1 ranks, got 2"),
])  # fmt: skip
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=f"rank 0 of 1: .*{words}"):
        Shard.of(group=alone(), **arguments)


def test_take_and_gather_check_the_number_of_tokens():
    shard = Shard.of([4], alone())
    with pytest.raises(ValueError, match=r"take expects 4 tokens .* in dim 1, got shape \[1, 3\]"):
        shard.take(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"gather expects my 4 tokens in dim 1, got shape \[1, 5\]"):
        shard.gather(torch.zeros(1, 5))
