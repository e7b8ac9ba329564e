"""Maxima over a cut sequence are those of one device, bit for bit: every layout and group size."""

import math
from functools import partial

import pytest
import torch

from seqpar import Shard
from seqpar.collectives import Ledger, alone, run_ranks
from seqpar.crossing.document_sum import documents_here
from seqpar.crossing.running_max import document_max, running_max
from tests.cutting import LAYOUTS, cut, lengths_around, tensors

SIZES = (1, 2, 3, 5)
PACKED = [5, 0, 1, 21, 12, 1]


def bounds(lengths):
    """Where each document starts and stops."""
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


def expected(x, lengths, initial=None):
    """``before, upto, final``, token by token."""
    nothing = torch.full_like(x[:, 0], -math.inf) if x.shape[1] else x.new_full((x.shape[0], *x.shape[2:]), -math.inf)
    before, upto, reached = [x[:, :0]], [x[:, :0]], nothing
    for document, (start, stop) in enumerate(bounds(lengths)):
        reached = initial if document == 0 and initial is not None else nothing
        for token in range(start, stop):
            before.append(reached[:, None])
            reached = torch.where(x[:, token] > reached, x[:, token], reached)
            upto.append(reached[:, None])
    return torch.cat(before, 1), torch.cat(upto, 1), reached


def body(group, lengths, layout, x, initial):
    shard = cut(lengths, group, layout)
    found, final = running_max(shard.take(x), shard=shard, group=group, initial=initial, return_final=True)
    alike = running_max(shard.take(x), shard=shard, group=group, initial=initial)
    return shard, found, final, alike


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_one_device_bit_for_bit(size, layout):
    for lengths in [PACKED, *lengths_around(size)]:
        x, start = tensors(len(lengths), (2, sum(lengths), 3, 2), (2, 3, 2))
        for initial in (None, start):
            before, upto, last = expected(x, lengths, initial)
            for shard, found, final, alike in run_ranks(size, body, lengths, layout, x, initial):
                assert torch.equal(found.before, shard.take(before))
                assert torch.equal(found.upto, shard.take(upto))
                assert torch.equal(final, last)
                assert torch.equal(alike.upto, found.upto)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_maximum_of_its_documents(layout):
    lengths = PACKED
    x = tensors(1, (2, sum(lengths), 4))[0]

    def whole(group):
        shard = cut(lengths, group, layout)
        return documents_here(shard), document_max(shard.take(x), shard=shard, group=group)

    places = list(bounds(lengths))
    for size in (1, 3, 8):
        for documents, maxima in run_ranks(size, whole):
            assert len(documents) == maxima.shape[1]
            for place, document in enumerate(documents):
                start, stop = places[document]
                assert torch.equal(maxima[:, place], x[:, start:stop].amax(1))


def test_only_documents_that_cross_send_their_maximum_and_once():
    def sent(group, lengths, call):
        ledger = Ledger(group)
        shard = Shard.of(lengths, ledger)
        call(torch.zeros(1, shard.num_local, 5), shard=shard, group=ledger)
        return ledger.bytes_

    counted = partial(run_ranks, 3, sent)
    assert counted([12], running_max) == [2 * 4 * 5, 2 * 4 * 5, 0]
    assert counted([4, 4, 4], running_max) == [0, 0, 0]
    assert counted([4, 5, 3], running_max) == [0, 2 * 4 * 5, 0]
    assert counted([12], document_max) == [2 * 4 * 5] * 3
    assert counted([4, 4, 4], document_max) == [0, 0, 0]


def test_has_no_gradient():
    x = torch.randn(1, 4, 2, requires_grad=True)
    shard = Shard.of([4], alone())
    assert not running_max(x, shard=shard, group=alone()).upto.requires_grad
    assert not document_max(x, shard=shard, group=alone()).requires_grad


def test_wrong_shapes_are_named():
    shard = Shard.of([4], alone())
    with pytest.raises(ValueError, match=r"x must hold my 4 tokens, got \[1, 3, 2\]"):
        running_max(torch.zeros(1, 3, 2), shard=shard, group=alone())
    with pytest.raises(ValueError, match=r"initial must be \[1, 2\], got \[2\]"):
        running_max(torch.zeros(1, 4, 2), shard=shard, group=alone(), initial=torch.zeros(2))
    with pytest.raises(ValueError, match="the shard was cut for rank 0 of 2"):
        document_max(torch.zeros(1, 2, 2), shard=run_ranks(2, lambda g: Shard.of([4], g))[0], group=alone())
