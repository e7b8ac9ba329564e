"""Attention to another sequence: on any ranks, in any layouts, what one device computes document by document."""

import pytest
import torch
from torch.nn import functional

from seqpar import Shard, attention
from seqpar.collectives import Ledger, run_ranks
from seqpar.crossing.attending.cross import cross_plan
from seqpar.crossing.attention import TRANSPORTS

LAYOUTS = (("contiguous", "contiguous"), ("zigzag", "striped"), ("striped", "zigzag"))
QUERIES, KEYS = [5, 0, 9, 1, 7], [3, 4, 11, 6, 2]


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(heads=4, kv_heads=2):
    q, k = numbers(2, sum(QUERIES), heads, 6, seed=1), numbers(2, sum(KEYS), kv_heads, 6, seed=2)
    v, up = numbers(2, sum(KEYS), kv_heads, 5, seed=3), numbers(2, sum(QUERIES), heads, 5, seed=4)
    return [x.requires_grad_() for x in (q, k, v)], up


def one_device():
    (q, k, v), up = drawn()
    parts = []
    for x, y, z in zip(q.split(QUERIES, 1), k.split(KEYS, 1), v.split(KEYS, 1)):
        x, y, z = (each.transpose(1, 2) for each in (x, y, z))
        y, z = (each.repeat_interleave(2, 1) for each in (y, z))
        parts.append(functional.scaled_dot_product_attention(x, y, z).transpose(1, 2))
    out = torch.cat(parts, 1)
    return out, torch.autograd.grad(out, (q, k, v), up)


def close(mine, expected):
    return (mine - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("layout", "of_keys"), [("contiguous", "contiguous"), ("zigzag", "striped"), ("striped", "zigzag")]
)
def test_every_query_sees_all_keys_of_its_document_there(group, transport, layout, of_keys):
    shard, keys = Shard.of(QUERIES, group, layout), Shard.of(KEYS, group, of_keys)
    (q, k, v), up = drawn()
    mine = [cut.take(x).detach().requires_grad_() for cut, x in zip((shard, keys, keys), (q, k, v))]
    out = attention(*mine, shard=shard, group=group, key_shard=keys, causal=False, transport=transport)
    found = torch.autograd.grad(out, mine, shard.take(up))
    expected, gradients = one_device()
    assert close(shard.gather(out), expected)
    for cut, x, y in zip((shard, keys, keys), found, gradients):
        assert close(cut.gather(x), y)


def test_keys_that_nobody_here_sees_do_not_come():
    """Two ranks, a document each on both sides: nothing is sent."""

    def body(group):
        ledger = Ledger(group)
        shard, keys = Shard.of([4, 4], ledger), Shard.of([6, 6], ledger)
        q, kv = numbers(1, 4, 1, 2).requires_grad_(), numbers(1, 6, 1, 2)
        attention(q, kv, kv, shard=shard, group=ledger, key_shard=keys, causal=False).sum().backward()
        return ledger.bytes_

    assert run_ranks(2, body) == [0, 0]


def test_what_cannot_be_seen_is_refused():
    def body(group):
        shard, keys = Shard.of([8], group), Shard.of([3, 3], group)
        q, kv = numbers(1, shard.num_local, 1, 2), numbers(1, keys.num_local, 1, 2)
        with pytest.raises(ValueError, match="pass causal=False"):
            attention(q, kv, kv, shard=shard, group=group, key_shard=keys)
        with pytest.raises(ValueError, match="same number of documents, got 1 of queries and 2 of keys"):
            attention(q, kv, kv, shard=shard, group=group, key_shard=keys, causal=False)
        with pytest.raises(ValueError, match="q, k and v must hold my 4, 3 and 3 tokens"):
            attention(q, kv[:, 1:], kv, shard=shard, group=group, key_shard=keys, causal=False)

    run_ranks(2, body)


def test_plans_of_many_documents_grow_with_them_and_not_with_their_square():
    """Tiles and ranges of ten thousand documents on 64 ranks: as many as there are pieces, not pairs of them."""

    def body(group):
        shard, keys = Shard.of([7] * 10_000, group, "zigzag"), Shard.of([3] * 10_000, group)
        plan = cross_plan(shard, keys)
        return len(plan.tiles), sum(map(len, plan.sends))

    (found,) = [body(each) for each in [_Rank(5, 64)]]
    assert found[0] <= 10_000 // 64 and found[1] <= 64


class _Rank:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size
