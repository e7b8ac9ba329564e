"""Sums over whole documents of a cut sequence, and their gradients, are those of one device."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from seqpar import Cut, Shard
from seqpar.collectives import Ledger, alone, run_ranks
from seqpar.crossing.document_memory import document_memories
from seqpar.crossing.document_sum import document_index, document_sum, documents_here
from seqpar.sharding.exchanged import Exchanged
from tests.cutting import LAYOUTS, cut, leaves, lengths_around, relative_error, spread, tensors

SIZES = (1, 2, 3, 5, 8)
PACKED = [5, 0, 1, 21, 12, 1]


def expected(q, k, v, lengths):
    """Each token's ``q_t sum_s k_s v_s'`` and ``sum_s k_s`` over its document, token by token."""
    outputs, sums, start = [], [], 0
    for length in lengths:
        rows = range(start, start + length)
        state = sum(k[:, s, :, :, None] * v[:, s, :, None] for s in rows)
        total = sum(k[:, s] for s in rows)
        outputs += [(q[:, t, :, :, None] * state).sum(-2) for t in rows]
        sums += [total for _ in rows]
        start += length
    return torch.stack(outputs, 1), torch.stack(sums, 1)


def ours(q, k, v, shard, group, slot=None):
    (memory,) = document_memories([(k, v)], shard=shard, group=group, slot=slot)
    sums = document_sum(k, shard=shard, group=group, slot=slot)
    return memory.read(q), sums[:, document_index(shard, sums.device)]


def inputs_of(lengths):
    tokens = sum(lengths)
    return tensors(tokens, *[(2, tokens, 2, 3)] * 2, (2, tokens, 2, 4), (2, tokens, 2, 4), (2, tokens, 2, 3))


def body(group, lengths, layout, truth):
    *inputs, d_out, d_sum = inputs_of(lengths)
    shard = cut(lengths, group, layout)
    mine = leaves(shard, *inputs)
    out = ours(*mine, shard, group)
    torch.autograd.backward(out, [shard.take(d_out), shard.take(d_sum)])
    got = [*out, *(x.grad for x in mine)]
    return [(part.detach(), shard.take(of)) for part, of in zip(got, truth)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_one_device(size, layout):
    for lengths in [PACKED, *lengths_around(size, per_rank=3)]:
        *inputs, d_out, d_sum = inputs_of(lengths)
        inputs = [x.requires_grad_() for x in inputs]
        out = expected(*inputs, lengths)
        truth = [*(y.detach() for y in out), *torch.autograd.grad(out, inputs, [d_out, d_sum])]
        for parts, whole in zip(spread(run_ranks(size, body, lengths, layout, truth)), truth):
            assert relative_error(parts, whole) < 1e-12


def test_only_documents_that_cross_are_summed_over_ranks():
    def sent(group, lengths):
        ledger = Ledger(group)
        shard = Shard.of(lengths, ledger)
        x = torch.zeros(1, shard.num_local, 5, requires_grad=True)
        document_sum(x, shard=shard, group=ledger).sum().backward()
        return ledger.bytes_

    assert run_ranks(2, sent, [4, 4]) == [0, 0]
    assert run_ranks(2, sent, [8]) == [2 * 4 * 5] * 2  # forward, and backward the same
    assert run_ranks(2, sent, [3, 2, 3]) == [2 * 4 * 5] * 2


def test_sums_of_bfloat16_are_fp32_and_of_every_document_here():
    def sums(group):
        shard = Shard.of([3, 0, 600], group)
        x = torch.ones(1, shard.num_local, 1, dtype=torch.bfloat16)
        return documents_here(shard), document_sum(x, shard=shard, group=group)

    (first, sums_of_first), (second, sums_of_second) = run_ranks(2, sums)
    assert (first, second) == ((0, 2), (2,))
    assert sums_of_first.dtype == torch.float32
    assert sums_of_first.flatten().tolist() == [3, 600]  # bfloat16 would stop at 256
    assert sums_of_second.flatten().tolist() == [600]


def test_checkpointing_sends_nothing_again():
    *inputs, d_out, d_sum = inputs_of(PACKED)

    def sent(group, again):
        ledger, layer = Ledger(group), torch.nn.Identity()
        shard, exchanged = Shard.of(PACKED, ledger), Exchanged()
        mine = leaves(shard, *inputs)

        def call(*tensors):
            return ours(*tensors, shard, ledger, exchanged.slot(layer))

        out = checkpoint(call, *mine, use_reentrant=False) if again else call(*mine)
        torch.autograd.backward(out, [shard.take(d_out), shard.take(d_sum)])
        return ledger.bytes_, [x.grad for x in mine]

    for (bytes_, grads), (bytes_again, grads_again) in zip(run_ranks(3, sent, False), run_ranks(3, sent, True)):
        assert bytes_ == bytes_again > 0
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_again))


def test_wrong_shapes_are_named():
    cut = Cut.whole([4])
    with pytest.raises(ValueError, match=r"tensors must hold my 4 tokens, got \[1, 3, 2\]"):
        document_sum(torch.zeros(1, 3, 2), shard=cut.shard, group=cut.group)
    other = run_ranks(2, lambda g: Shard.of([4], g))[0]
    with pytest.raises(ValueError, match="the shard was cut for rank 0 of 2"):
        document_sum(torch.zeros(1, 2, 2), shard=other, group=alone())
