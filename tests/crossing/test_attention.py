"""Softmax attention over a cut sequence is that of one device: every transport, layout, mask and group size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import Shard, attention
from seqpar.collectives import Ledger, run_ranks
from seqpar.crossing.attention import TRANSPORTS
from tests.cutting import LAYOUTS, SIZES, cut, leaves, lengths_around, relative_error, spread, tensors
from tests.oracles.softmax import softmax_attention

HEADS = ((4, 4), (4, 2), (6, 1), (3, 3))
K_DIM, V_DIM = 6, 4


def one_device(lengths, heads, causal, window, seed):
    """Inputs, upstream gradient, output and gradients of the oracle."""
    tokens = sum(lengths)
    shapes = [
        (2, tokens, n, d) for n, d in ((heads[0], K_DIM), (heads[1], K_DIM), (heads[1], V_DIM), (heads[0], V_DIM))
    ]
    q, k, v, upstream = tensors(seed, *shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = softmax_attention(*inputs, lengths, causal, window)
    grads = torch.autograd.grad((out * upstream).sum(), inputs)
    return [x.detach() for x in inputs], upstream, [out.detach(), *grads]


def cut_attention(group, lengths, layout, seed, expected, dtype, options):
    """Pairs (got, expected) of my rows: output and the gradients of q, k and v."""
    inputs, upstream, results = expected
    shard = cut(lengths, group, layout, seed)
    mine = leaves(shard, *inputs, dtype=dtype)
    out = attention(*mine, shard=shard, group=group, **options)
    grads = torch.autograd.grad((out * shard.take(upstream).to(dtype)).sum(), mine)
    assert out.dtype == dtype
    return [(got.detach(), shard.take(whole)) for got, whole in zip((out, *grads), results)]


def errors(size, lengths, layout, heads, causal, window, transport, dtype=torch.float64, seed=0):
    expected = one_device(lengths, heads, causal, window, seed)
    options = {"causal": causal, "window": window, "transport": transport}
    ranks = run_ranks(size, cut_attention, lengths, layout, seed, expected, dtype, options)
    return [relative_error(parts, whole) for parts, whole in zip(spread(ranks), expected[2])]


def assert_exact(found):
    assert found[0] < 1e-12
    assert max(found[1:]) < 1e-10


@pytest.mark.sampled(6)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_equals_one_device(transport, layout, size):
    lengths = [7, 0, 1, 23, 12]
    for number, (causal, window) in enumerate([(True, None), (False, None), (True, 5), (False, 9)]):
        assert_exact(errors(size, lengths, layout, HEADS[number], causal, window, transport, seed=number))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_around_every_edge(layout, size):
    for number, lengths in enumerate(lengths_around(size)):
        transport = TRANSPORTS[number % 3]
        assert_exact(errors(size, lengths, layout, HEADS[1], True, (None, 4)[number % 2], transport, seed=number))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda x: sum(x) > 0),
    size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    transport=st.sampled_from(TRANSPORTS),
    heads=st.sampled_from(HEADS),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 2, 7, 40]),
    seed=st.integers(0, 9),
)
def test_any_lengths_ranks_and_options(lengths, size, layout, transport, heads, causal, window, seed):
    assert_exact(errors(size, lengths, layout, heads, causal, window, transport, seed=seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_float32(transport, layout):
    for window in (None, 9):
        assert max(errors(4, [40, 3, 0, 85], layout, (4, 2), True, window, transport, torch.float32)) < 1e-5


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bfloat16_error_of_eight_ranks_is_near_that_of_one(transport):
    """torch's fused blocks round their partial outputs; what is merged and summed here is fp32."""
    one = errors(1, [256], "contiguous", (4, 2), True, None, "ring", torch.bfloat16)
    eight = errors(8, [256], "contiguous", (4, 2), True, None, transport, torch.bfloat16)
    assert all(e < 1.5 * o for e, o in zip(eight, one)), (eight, one)


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_in_every_world(group, transport):
    lengths = [9, 0, 17]
    for layout, window in (("contiguous", None), ("zigzag", None), ("striped", 4)):
        expected = one_device(lengths, (4, 2), True, window, 0)
        options = {"window": window, "transport": transport}
        for got, part in cut_attention(group, lengths, layout, 0, expected, torch.float64, options):
            assert (got - part).norm() <= 1e-10 * (1 + part.norm())


def test_most_of_what_the_last_rank_sees_is_far():
    """Dropping every rank but the neighbour would be noticed: the weights reach all of the document."""
    inputs, _, (out, *_) = one_device([64], (4, 4), True, None, 0)
    near = softmax_attention(*[x[:, 48:] for x in inputs], [16])
    assert (out[:, 56:] - near[:, 8:]).norm() > 0.5 * out[:, 56:].norm()


# --- what is sent ----------------------------------------------------------------------------------------------------


def sent(group, lengths, layout, options, backward):
    """Bytes and messages of one call, forward or backward, in fp32."""
    ledger, shard = Ledger(group), Shard.of(lengths, group, layout)
    q, k, v = leaves(shard, *tensors(0, *[(1, sum(lengths), h, 8) for h in (4, 2, 2)]), dtype=torch.float32)
    out = attention(q, k, v, shard=shard, group=ledger, **options)
    if backward:
        ledger.clear()
        out.sum().backward()
    return ledger.bytes_, ledger.messages


ROW = 2 * (8 + 8) * 4  # bytes of one token's keys and values: g heads, k + v dims, fp32


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ring_sends_the_published_volume(size):
    """Full attention: (n - 1) blocks forward; the same again, with their fp32 gradients, backward."""
    tokens, options = 8 * size, {"causal": False}
    block = 8 * ROW
    for forward in run_ranks(size, sent, [tokens], "contiguous", options, False):
        assert forward == ((size - 1) * block, size - 1)
    for backward in run_ranks(size, sent, [tokens], "contiguous", options, True):
        assert backward == (2 * (size - 1) * block, 2 * (size - 1))


def test_a_causal_ring_passes_on_only_what_later_ranks_need():
    """Contiguous: rank r passes on blocks 0 to r, the last rank nothing: half the volume of a full ring."""
    forward = run_ranks(4, sent, [32], "contiguous", {}, False)
    assert forward == [(blocks * 8 * ROW, blocks) for blocks in (1, 2, 3, 0)]


@pytest.mark.parametrize(("window", "hops"), [(1, 0), (5, 1), (9, 1), (12, 2)])
def test_windows_send_only_the_rows_they_need(window, hops):
    """A window of w tokens needs the w - 1 rows before a shard, whatever the number of ranks."""
    for transport in ("ring", "all_gather"):
        forward = run_ranks(4, sent, [32], "contiguous", {"window": window, "transport": transport}, False)
        received = [min(window - 1, 8 * rank) * ROW for rank in range(4)]
        assert sum(bytes_ for bytes_, _ in forward) == sum(received)
        assert max(messages for _, messages in forward) <= max(hops, 1) * (window > 1)


def test_documents_send_only_the_rows_they_need():
    """Documents that end at the cuts send nothing; one that crosses a cut sends its own rows only."""
    for transport in ("ring", "all_gather"):
        assert run_ranks(4, sent, [8, 8, 8, 8], "contiguous", {"transport": transport}, False) == [(0, 0)] * 4
        crossing = run_ranks(4, sent, [5, 6, 5, 8, 8], "contiguous", {"transport": transport}, False)
        assert crossing == [(3 * ROW, 1), (0, 0), (0, 0), (0, 0)]


def test_all_gather_sends_every_block_to_everyone():
    for rank_sent in run_ranks(4, sent, [32], "contiguous", {"transport": "all_gather"}, False):
        assert rank_sent == (3 * 8 * ROW, 3)
    for rank_sent in run_ranks(4, sent, [32], "contiguous", {"transport": "all_gather"}, True):
        assert rank_sent == (2 * 3 * 8 * ROW, 6)


def test_all_to_all_sends_heads_once_and_replicates_few_key_heads():
    """Ulysses: each rank's 8 tokens of 4 query heads and, for 2 key/value heads on 4 ranks, one head to each rank."""
    out_and_queries = 2 * 3 * 8 * 8 * 4
    for rank_sent in run_ranks(4, sent, [32], "contiguous", {"transport": "all_to_all"}, False):
        assert rank_sent == (out_and_queries + 3 * 8 * (8 + 8) * 4, 9)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transport": "tree"}, "transport must be one of ring, all_gather, all_to_all, got 'tree'"),
        ({"window": 0}, "window must be at least 1 token, got 0"),
        ({"k": torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)}, "one dtype, got torch.float32, torch.bfloat16"),
        ({"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)}, "query heads must be a multiple of key/value"),
        ({"q": torch.zeros(1, 3, 4, 8)}, "must hold my 4 tokens"),
        ({"v": torch.zeros(1, 4, 1, 8)}, "k and v their heads"),
        ({"q": torch.zeros(4, 4, 8)}, r"must be \[batch, tokens, heads, dim\]"),
    ],
)
def test_bad_input_raises_on_every_rank_before_the_first_message(change, words):
    def body(group):
        ledger = Ledger(group)
        given = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8), **change}
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: .*{words}"):
            attention(**given, shard=Shard.of([8], group), group=ledger)
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]


def test_a_shard_of_another_group_is_refused():
    from seqpar.collectives import alone

    with pytest.raises(ValueError, match="cut for rank 0 of 1"):
        run_ranks(2, lambda g: attention(*[torch.zeros(1, 8, 1, 2)] * 3, shard=Shard.of([8], alone()), group=g))
