"""The halo is what one device would cut out of the padded documents, and its gradient goes to the owners."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import Shard
from seqpar.collectives import Ledger, Span, halo, run_ranks
from tests.cutting import LAYOUTS, cut, relative_error, tensors


def padded_pieces(x, lengths, shard, rank, left, right):
    """Each span of ``rank``, token by token out of its own document, zeros where the document has none."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = []
    for span in shard.spans[rank]:
        for position in range(span.first - left, span.first + span.count + right):
            inside = 0 <= position < lengths[span.document]
            rows.append(x[:, starts[span.document] + position] if inside else torch.zeros_like(x[:, 0]))
    return torch.stack(rows, 1) if rows else x[:, :0]


def pairs(group, lengths, layout, left, right, seed):
    """(got, expected): the halo, and the gradient of my tokens."""
    (x,) = tensors(seed, (2, sum(lengths), 3))
    x.requires_grad_()
    shard = cut(lengths, group, layout, seed)
    wholes = [padded_pieces(x, lengths, shard, rank, left, right) for rank in range(group.size)]
    upstreams = [tensors(seed + 1 + rank, whole.shape)[0] for rank, whole in enumerate(wholes)]
    (gradient,) = torch.autograd.grad(sum((w * u).sum() for w, u in zip(wholes, upstreams)), x)
    mine = shard.take(x.detach()).clone().requires_grad_()
    got = halo(mine, group, shard.spans, left=left, right=right)
    got.backward(upstreams[group.rank])
    return [(got.detach(), wholes[group.rank].detach()), (mine.grad, shard.take(gradient))]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=5).filter(lambda n: sum(n) > 0),
    size=st.integers(1, 7),
    layout=st.sampled_from(LAYOUTS),
    left=st.integers(0, 9),
    right=st.integers(0, 9),
    seed=st.integers(0, 5),
)
def test_equals_one_device_even_deeper_than_a_rank(lengths, size, layout, left, right, seed):
    ranks = run_ranks(size, pairs, lengths, layout, left, right, seed)
    for parts in zip(*ranks):
        whole = torch.cat([expected.flatten() for _, expected in parts])
        assert relative_error(parts, whole) < 1e-12


@pytest.mark.spmd(1, 2, 4)
def test_in_every_world(group):
    for got, expected in pairs(group, [3, 0, 10], "contiguous", 4, 2, 0):
        assert (got - expected).norm() < 1e-12


def test_sends_only_the_rows_that_are_missing_there():
    """A causal convolution of width 4 on one document: 3 rows over each cut, forward and (in fp32) backward."""

    def body(group, lengths):
        ledger, shard = Ledger(group), Shard.of(lengths, group)
        x = torch.zeros(1, shard.num_local, 2, requires_grad=True)
        out = halo(x, ledger, shard.spans, left=3)
        forward = ledger.bytes_
        ledger.clear()
        out.sum().backward()
        return forward, ledger.bytes_

    row = 2 * 4
    assert run_ranks(4, body, [32]) == [(3 * row, 0), (3 * row, 3 * row), (3 * row, 3 * row), (0, 3 * row)]
    assert run_ranks(4, body, [8, 8, 8, 8]) == [(0, 0)] * 4
    assert run_ranks(4, body, [4]) == [(3 * row, 0), (2 * row, row), (row, 2 * row), (0, 3 * row)], "deeper than a rank"


def test_bad_input():
    def body(group):
        spans = Shard.of([8], group).spans
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: a halo is not negative, got left=-1"):
            halo(torch.zeros(1, 4), group, spans, left=-1)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: my spans hold 4 tokens, x has shape \[1, 5\]"):
            halo(torch.zeros(1, 5), group, spans, left=1)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: spans must list 2 ranks, got 1"):
            halo(torch.zeros(1, 4), group, [[Span(0, 0, 4)]], left=1)

    run_ranks(2, body)
