"""Linear attention over a cut sequence is that of one device: every decay, scan, layout and group size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import Shard, linear_attention
from seqpar.collectives import Ledger, run_ranks
from seqpar.collectives.scan import ALGORITHMS
from tests.cutting import LAYOUTS, SIZES, cut, leaves, lengths_around, relative_error, spread, tensors
from tests.oracles.recurrence import decayed_linear_attention

DECAYS = ("none", "constant", "scalar", "vector")
B, H, K, V = 2, 2, 5, 3


def inputs_of(lengths, decay, seed, heads=H):
    """q, k, v, decay and initial state; the gates are mild, so that far tokens matter."""
    t = sum(lengths)
    q, k, v, state = tensors(seed, (B, t, heads, K), (B, t, heads, K), (B, t, heads, V), (B, heads, K, V))
    shape = {"none": None, "constant": (heads,), "scalar": (B, t, heads), "vector": (B, t, heads, K)}[decay]
    gates = None if shape is None else -0.02 * tensors(seed + 1, shape)[0].abs()
    return q, k, v, gates, state


def one_device(lengths, decay, seed, state):
    """The oracle's output, final state and gradients, and the upstream gradients they were computed with."""
    q, k, v, gates, initial = inputs_of(lengths, decay, seed)
    wanted = [x.requires_grad_() for x in (q, k, v, gates, initial if state else None) if x is not None]
    out, final = decayed_linear_attention(
        q, k, v, gates, lengths=lengths, scale=0.7, continues=state, initial_state=initial if state else None
    )
    upstream, upstream_state = tensors(seed + 2, out.shape, final.shape)
    total = (out * upstream).sum() + ((final * upstream_state).sum() if state else 0)
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted)]
    return (upstream, upstream_state), out.detach(), final.detach(), grads


def cut_linear(group, lengths, layout, decay, seed, state, scan, expected, dtype):
    """Pairs (got, expected) on this rank: output, gradients, and with a state the final one."""
    (upstream, upstream_state), out, final, grads = expected
    q, k, v, gates, initial = inputs_of(lengths, decay, seed)
    shard = cut(lengths, group, layout, seed)
    mine = leaves(shard, q, k, v, dtype=dtype)
    gate_dtype = torch.float32 if dtype == torch.bfloat16 else dtype  # layers compute gates in fp32
    whole = [gates.detach().to(gate_dtype).requires_grad_()] if decay == "constant" else []
    whole_state = [initial.to(dtype).requires_grad_()] if state else []
    cut_gates = leaves(shard, gates, dtype=gate_dtype) if decay in ("scalar", "vector") else []
    got = linear_attention(
        *mine,
        shard=shard,
        group=group,
        log_decay=next(iter([*whole, *cut_gates]), None),
        scan=scan,
        scale=0.7,
        initial_state=whole_state[0] if state else None,
        return_final_state=state,
    )
    got_out, got_final = got if state else (got, None)
    total = (got_out * shard.take(upstream).to(dtype)).sum()
    total = total + (got_final * upstream_state.to(dtype)).sum() if state else total
    leaves_ = [*mine, *whole, *cut_gates, *whole_state]
    got_grads = torch.autograd.grad(total, leaves_, allow_unused=True)
    pairs = [(got_out.detach(), shard.take(out))]
    for leaf, gradient, expected_gradient in zip(leaves_, got_grads, grads):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        replicated = any(leaf is x for x in [*whole, *whole_state])
        if replicated:  # parts that sum to the whole
            pairs.append((group.all_reduce(gradient).wait() / group.size**0.5, expected_gradient / group.size**0.5))
        else:
            pairs.append((gradient, shard.take(expected_gradient)))
    if state:
        pairs.append((got_final.detach() / group.size**0.5, final / group.size**0.5))
    return pairs


def errors(size, lengths, layout, decay, scan, state=False, dtype=torch.float64, seed=0):
    expected = one_device(lengths, decay, seed, state)
    ranks = run_ranks(size, cut_linear, lengths, layout, decay, seed, state, scan, expected, dtype)
    wholes = [expected[1], *expected[3], *([expected[2]] if state else [])]
    return [relative_error(parts, whole) for parts, whole in zip(spread(ranks), wholes)]


def assert_exact(found):
    assert found[0] < 1e-12
    assert max(found[1:]) < 1e-10


@pytest.mark.sampled(8)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan", ALGORITHMS)
def test_equals_one_device(scan, layout, size):
    for number, decay in enumerate(DECAYS):
        assert_exact(errors(size, [7, 0, 1, 23, 12], layout, decay, scan, seed=number))
        assert_exact(errors(size, [43], layout, decay, scan, state=True, seed=number))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_around_every_edge(layout, size):
    for number, lengths in enumerate(lengths_around(size)):
        scan, decay = ALGORITHMS[number % 4], DECAYS[(number // 2) % 4]
        assert_exact(errors(size, lengths, layout, decay, scan, state=number % 2 == 0, seed=number))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=6).filter(lambda x: sum(x) > 0),
    size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    decay=st.sampled_from(DECAYS),
    scan=st.sampled_from(ALGORITHMS),
    state=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_lengths_ranks_and_options(lengths, size, layout, decay, scan, state, seed):
    assert_exact(errors(size, lengths, layout, decay, scan, state, seed=seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_float32(decay, layout):
    found = errors(4, [100, 3, 0, 153], layout, decay, "all_scan", state=True, dtype=torch.float32)
    assert max(found) < 1e-5


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_error_of_eight_ranks_is_that_of_one(decay):
    one = errors(1, [512], "contiguous", decay, "all_gather", dtype=torch.bfloat16)
    for scan, layout in (("all_gather", "contiguous"), ("all_scan", "zigzag"), ("doubling", "contiguous")):
        eight = errors(8, [512], layout, decay, scan, dtype=torch.bfloat16)
        assert all(e < 1.1 * o + 1e-6 for e, o in zip(eight, one)), (scan, eight, one)


@pytest.mark.parametrize("decay", DECAYS)
def test_most_of_the_state_comes_from_far(decay):
    """With these gates at least half of what enters the last of 8 ranks was written beyond its neighbour."""
    q, k, v, gates, _ = inputs_of([80], decay, 0)
    upto = 70  # the last rank starts here; its neighbour holds 60 to 69
    cut_gates = gates if gates is None or gates.dim() == 1 else gates[:, :upto]
    _, everything = decayed_linear_attention(q[:, :upto], k[:, :upto], v[:, :upto], cut_gates)
    near_gates = gates if gates is None or gates.dim() == 1 else gates[:, 60:upto]
    _, near = decayed_linear_attention(q[:, 60:upto], k[:, 60:upto], v[:, 60:upto], near_gates)
    assert (everything - near).norm() > 0.5 * everything.norm()


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("scan", ALGORITHMS)
def test_in_every_world(group, scan):
    for number, layout in enumerate(("contiguous", "zigzag", "striped")):
        decay, lengths = DECAYS[number + 1], [19, 0, 40]
        expected = one_device(lengths, decay, 0, True)
        for got, part in cut_linear(group, lengths, layout, decay, 0, True, scan, expected, torch.float64):
            assert (got - part).norm() <= 1e-10 * (1 + part.norm())


# --- what is sent ----------------------------------------------------------------------------------------------------


def sent(group, lengths, layout, decay, scan):
    """Bytes and messages, forward and backward, in fp32."""
    ledger, shard = Ledger(group), Shard.of(lengths, group, layout)
    q, k, v, gates, _ = inputs_of(lengths, decay, 0)
    mine = leaves(shard, q, k, v, dtype=torch.float32)
    gates = gates if gates is None or gates.dim() == 1 else shard.take(gates).float()
    out = linear_attention(*mine, shard=shard, group=ledger, scan=scan, log_decay=gates)
    forward = (ledger.bytes_, ledger.messages)
    ledger.clear()
    out.sum().backward()
    return forward, (ledger.bytes_, ledger.messages)


STATE = B * H * K * V * 4


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_scan_sends_one_state_per_rank_and_direction(decay, size):
    """ZeCO: the decay never travels; the message does not grow with tokens."""
    for tokens in (8 * size, 24 * size):
        for rank, (forward, backward) in enumerate(run_ranks(size, sent, [tokens], "contiguous", decay, "all_scan")):
            assert forward[0] == (STATE if rank < size - 1 else 0)
            assert backward[0] == (STATE if rank > 0 else 0)


def test_all_gather_sends_states_and_the_decays_that_others_cannot_know():
    extra = {"none": 0, "constant": 0, "scalar": B * H * 4, "vector": B * H * K * 4}
    for decay in DECAYS:
        for forward, backward in run_ranks(4, sent, [32], "contiguous", decay, "all_gather"):
            assert forward == backward == (3 * (STATE + extra[decay]), 3)


def test_zigzag_sends_two_states_and_no_activations():
    for rank, (forward, backward) in enumerate(run_ranks(4, sent, [64], "zigzag", "vector", "ring")):
        assert forward[0] == backward[0] == ((rank < 3) + (rank > 0)) * STATE


def test_documents_that_end_at_the_cuts_send_nothing():
    for scan in ALGORITHMS:
        assert run_ranks(4, sent, [8] * 4, "contiguous", "scalar", scan) == [((0, 0), (0, 0))] * 4


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scan": "tree"}, "scan must be one of all_gather, all_scan, ring, doubling, got 'tree'"),
        ({"k": torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)}, "one dtype, got torch.float32, torch.bfloat16"),
        ({"k": torch.zeros(1, 4, 2, 7)}, "q and k must be"),
        (
            {"q": torch.zeros(1, 3, 2, 8), "k": torch.zeros(1, 3, 2, 8), "v": torch.zeros(1, 3, 2, 8)},
            "hold my 4 tokens",
        ),
        ({"log_decay": torch.zeros(3)}, r"log_decay must be \[h\], \[b, t, h\] or \[b, t, h, k\], got \[3\]"),
        ({"initial_state": torch.zeros(1, 2, 8, 7)}, r"initial_state must be \[1, 2, 8, 8\], got \[1, 2, 8, 7\]"),
    ],
)
def test_bad_input_raises_on_every_rank_before_the_first_message(change, words):
    def body(group):
        ledger, zeros = Ledger(group), torch.zeros(1, 4, 2, 8)
        call = {"q": zeros, "k": zeros, "v": zeros, **change}
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: .*{words}"):
            linear_attention(**call, shard=Shard.of([8], group), group=ledger)
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]
