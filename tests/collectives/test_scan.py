"""The exclusive scan equals a loop over the ranks: every algorithm, kind, direction and size, with gradients."""

import itertools

import pytest
import torch

from seqpar.collectives import Ledger, run_ranks
from seqpar.collectives.scan import ALGORITHMS, Summary, exclusive_scan
from seqpar.collectives.transition import Transition

KINDS = ("identity", "constant", "scalar", "vector", "full", "recovered", "complex", "matrix")
ENTRIES = {"scalar": (2, 3, 1, 1), "vector": (2, 3, 5, 1), "full": (2, 3, 5, 4), "recovered": (2, 3, 5, 1)}
SHAPE = (2, 3, 5, 4)  # b, h, k, v


RATES = torch.linspace(0.2, 1.0, 4, dtype=torch.float64)  # of the columns of a state


def world(kind, size, seed=0, resets=True):
    """States, values of transitions, resets and crossed cuts of `size` ranks. Mild: far ranks still matter."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if kind == "complex" else torch.float64
    states = [torch.randn(SHAPE, generator=g, dtype=dtype) for _ in range(size)]
    values = None if kind == "identity" else [value_of(kind, g) for _ in range(size)]
    starts = (torch.rand(size, generator=g) < 0.3).tolist() if resets else [False] * size
    at_cut = (torch.rand(size, generator=g) < 0.3).tolist() if resets else [False] * size
    crosses = tuple(not at_cut[r + 1] for r in range(size - 1))
    reset = tuple(starts[r] or (r > 0 and at_cut[r]) for r in range(size))
    return states, values, reset, crosses


def value_of(kind, g):
    """What one rank's transition is made of."""
    if kind == "matrix":  # far from symmetric, and keeps most of what it gets
        rotation = torch.linalg.qr(torch.randn(2, 3, 5, 5, generator=g, dtype=torch.float64))[0]
        return rotation * 0.9
    if kind == "complex":
        angles = torch.randn(2, 3, 5, 1, generator=g, dtype=torch.float64)
        return torch.complex(-0.2 * torch.rand(2, 3, 5, 1, generator=g, dtype=torch.float64), angles)
    return -0.2 * torch.rand(ENTRIES.get(kind, (1, 3, 1, 1)), generator=g, dtype=torch.float64)


def passed(kind, value, state):
    """What a transition makes of a state: its meaning."""
    if kind == "matrix":
        return torch.einsum("bhij,bhjv->bhiv", value, state)
    return torch.exp(value * RATES if kind == "recovered" else value) * state


def transition_of(kind, value):
    return Transition(value, RATES if kind == "recovered" else None, kind == "matrix")


def summary_of(kind, states, values, rank, reset=(), crosses=()):
    transition = None
    if kind == "constant":
        transition = [transition_of(kind, value) for value in values]
    elif values is not None:
        transition = transition_of(kind, values[rank])
    return Summary(states[rank], transition, reset, crosses)


def loop(kind, states, values, resets, crosses, reverse):
    """The meaning: walk over the ranks, carrying a state."""
    size = len(states)
    order = list(reversed(range(size))) if reverse else list(range(size))
    incoming, carried = {}, torch.zeros_like(states[0])
    for previous, rank in zip([None, *order], order):
        if previous is not None and not crosses[min(previous, rank)]:
            carried = torch.zeros_like(carried)
        incoming[rank] = carried
        through = carried if values is None else passed(kind, values[rank], carried)
        carried = states[rank] + (0 if resets[rank] else through)
    return [incoming[rank] for rank in range(size)]


def scanned(group, kind, algorithm, reverse, blocks, seed=0, resets=True):
    """My incoming state, and the gradients of my state and transition, by the scan and by the loop."""
    states, values, reset, crosses = world(kind, group.size, seed, resets)
    upstream = world("complex" if kind == "complex" else "identity", group.size, seed + 1)[0]
    for tensor in [*states, *(values or [])]:
        tensor.requires_grad_()
    expected = loop(kind, states, values, reset, crosses, reverse)
    inputs = [states[group.rank], *([values[group.rank]] if values else [])]
    total = sum((e * u.conj()).real.sum() for e, u in zip(expected, upstream))
    expected_grads = (
        torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else [None] * len(inputs)
    )
    got = exclusive_scan(
        summary_of(kind, states, values, group.rank, reset, crosses),
        group,
        algorithm=algorithm,
        reverse=reverse,
        blocks=blocks,
    )
    got_grads = torch.autograd.grad((got * upstream[group.rank].conj()).real.sum(), inputs, allow_unused=True)
    return got, expected[group.rank], got_grads, expected_grads


def assert_equal(got, expected, got_grads, expected_grads):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    for g, e in zip(got_grads, expected_grads):
        g = torch.zeros(()) if g is None else g
        e = torch.zeros_like(g) if e is None else e
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equals_the_loop(algorithm, size):
    for kind, reverse, resets in itertools.product(KINDS, (False, True), (False, True)):
        for blocks in (None, 3) if algorithm == "all_scan" else (None,):
            for result in run_ranks(size, scanned, kind, algorithm, reverse, blocks, size, resets):
                assert_equal(*result)


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equals_the_loop_in_every_world(group, algorithm):
    for kind, reverse in itertools.product(KINDS, (False, True)):
        assert_equal(*scanned(group, kind, algorithm, reverse, None))


def test_far_ranks_matter():
    """With these decays more than half of what reaches the last rank comes from beyond its neighbour."""
    for kind in KINDS:
        states, values, *_ = world(kind, 8, resets=False)
        everything = loop(kind, states, values, (False,) * 8, (True,) * 7, False)[-1]
        without_neighbour = everything - states[-2]
        assert without_neighbour.norm() > 0.5 * everything.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_bytes_and_messages_are_those_of_the_cost_table(kind, size):
    def body(group, algorithm, blocks):
        states, values, *_ = world(kind, size, resets=False)
        ledger = Ledger(group)
        states[group.rank].requires_grad_()
        summary = summary_of(kind, states, values, group.rank)
        out = exclusive_scan(summary, ledger, algorithm=algorithm, blocks=blocks)
        forward = (ledger.bytes_, ledger.messages)
        ledger.clear()
        out.real.sum().backward()
        return forward, (ledger.bytes_, ledger.messages)

    number = 16 if kind == "complex" else 8
    state_bytes = 2 * 3 * 5 * 4 * number
    entries = {"scalar": 1, "vector": 5, "full": 5 * 4, "recovered": 5, "complex": 5, "matrix": 5 * 5}.get(kind, 0)
    sent_bytes = 2 * 3 * entries * number  # of the transition
    for forward, backward in run_ranks(size, body, "all_gather", None):
        assert forward == backward == ((size - 1) * (state_bytes + sent_bytes), size - 1)
    for algorithm, blocks, messages in (("ring", None, 1), ("all_scan", 1, 1), ("all_scan", 4, 4)):
        for rank, (forward, backward) in enumerate(run_ranks(size, body, algorithm, blocks)):
            assert forward == ((state_bytes, messages) if rank < size - 1 else (0, 0))
            assert backward == ((state_bytes, messages) if rank > 0 else (0, 0))
    for rank, (forward, _) in enumerate(run_ranks(size, body, "doubling", None)):
        steps = [d for d in (1, 2, 4) if d < size and rank + d < size]
        last = max((d for d in (1, 2, 4) if d < size), default=0)
        assert forward == (sum(state_bytes + (sent_bytes if d != last else 0) for d in steps), len(steps))


def test_nothing_is_sent_where_no_document_crosses():
    def body(group, algorithm):
        ledger = Ledger(group)
        summary = Summary(torch.ones(1, 1, 2, 2), None, (True,) * 4, (False, False, False))
        incoming = exclusive_scan(summary, ledger, algorithm=algorithm)
        return ledger.messages, incoming.abs().sum().item()

    for algorithm in ALGORITHMS:
        assert run_ranks(4, body, algorithm) == [(0, 0.0)] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": "tree"}, "scan must be one of all_gather, all_scan, ring, doubling, got 'tree'"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ],
)
def test_bad_options_raise_on_every_rank(change, words):
    def body(group):
        with pytest.raises(ValueError, match=words):
            exclusive_scan(Summary(torch.ones(1, 1, 2, 2)), group, **change)

    run_ranks(2, body)


def test_states_travel_in_fp32_or_fp64_only():
    def body(group):
        with pytest.raises(ValueError, match=r"rank . of 2: states travel in float32 or float64, got torch.bfloat16"):
            exclusive_scan(Summary(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)), group)

    run_ranks(2, body)
