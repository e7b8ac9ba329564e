"""A streamed cell over a cut sequence is the loop over its tokens on one device: any layout, size, direction."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from seqpar import Shard
from seqpar.collectives import Ledger, run_ranks
from seqpar.crossing.stream import stream
from seqpar.sharding.exchanged import Exchanged
from tests.cutting import LAYOUTS, cut, leaves, lengths_around, relative_error, spread, tensors

B, D = 2, 3


def plain(params, rows, state):
    """Two states, of which one has no dims of its own; a second tensor of tokens scales the output."""
    matrix, bias = params
    h, total, outs = *state, []
    for x, gate in zip(rows[0].unbind(1), rows[1].unbind(1)):
        h = torch.tanh(h @ matrix + x + bias)
        total = 0.9 * total + h.sum(-1)
        outs.append(torch.cat([gate * h, total[:, None]], -1))
    return torch.stack(outs, 1), (h, total)


def chunked(params, rows, state, place):
    """Reads the state of its chunk's start: what is told of the place in the document matters."""
    matrix, bias = params
    h, anchor, outs = *state, []
    for x, gate in zip(rows[0].unbind(1), rows[1].unbind(1)):
        anchor = h.sum(-1) if place % CHUNK == 0 else anchor
        h = torch.tanh(h @ matrix + x + anchor[:, None] * bias)
        outs.append(torch.cat([gate * h, anchor[:, None]], -1))
        place += 1
    return torch.stack(outs, 1), (h, anchor)


def learning(params, rows, state):
    """Goes down the gradient of its own loss at every step."""
    matrix, bias = params
    h, total, outs = *state, []
    for x, gate in zip(rows[0].unbind(1), rows[1].unbind(1)):
        (down,) = torch.autograd.grad(((h @ matrix).tanh() - x).square().sum(), h, create_graph=True)
        h = (h - 0.1 * down + bias).tanh()
        total = total + h.sum(-1)
        outs.append(torch.cat([gate * h, total[:, None]], -1))
    return torch.stack(outs, 1), (h, total)


CHUNK = 4
CELLS = {
    "plain": (plain, {}),
    "chunked": (chunked, {"chunk": CHUNK}),
    "learning": (learning, {"learns": True}),
    "kept": (plain, {"recompute": False}),
}


def oracle(name, params, tokens, initial, entering, lengths, backwards):
    """Token by token; the output, and the state after all."""
    cell, options = CELLS[name]
    outs, state = [None] * sum(lengths), None
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = list(range(len(lengths)))
    for number, document in enumerate(reversed(order) if backwards else order):
        state = tuple(x.expand(B, *x.shape) for x in initial)
        if number == 0 and entering is not None:
            state = (entering[:, :D], entering[:, D])
        places = range(starts[document], starts[document] + lengths[document])
        for count, t in enumerate(reversed(places) if backwards else places):
            told = (count % CHUNK,) if options.get("chunk") else ()
            out, state = cell(params, tuple(x[:, t : t + 1] for x in tokens), state, *told)
            outs[t] = out
    return torch.cat(outs, 1), torch.cat([state[0], state[1][:, None]], 1)


@cache
def inputs_of(tokens, seed):
    x, gate, matrix, bias, first, second, entering = tensors(
        seed, (B, tokens, D), (B, tokens, D), (D, D), (D,), (D,), (), (B, D + 1)
    )
    return x, gate, matrix, bias, first, second, entering


def one_device(name, lengths, seed, backwards, ends):
    whole = [x.clone().requires_grad_() for x in inputs_of(sum(lengths), seed)]
    x, gate, matrix, bias, first, second, entering = whole
    out, leaving = oracle(
        name, (matrix, bias), (x, gate), (first, second), entering if ends else None, lengths, backwards
    )
    upstream, upstream_state = tensors(seed + 1, out.shape, leaving.shape)
    total = (out * upstream).sum() + ((leaving * upstream_state).sum() if ends else 0)
    grads = torch.autograd.grad(total, whole, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, whole)]
    return upstream, upstream_state, out.detach(), leaving.detach(), grads


def on_rank(group, name, lengths, layout, expected, seed=0, backwards=False, ends=False, every=0, again=False):
    """Pairs (got, expected) of this rank: output, gradients, and the state after all."""
    upstream, upstream_state, out, leaving, grads = expected
    whole = inputs_of(sum(lengths), seed)
    shard = cut(lengths, group, layout, seed)
    mine = leaves(shard, *whole[:2])
    shared = [x.clone().requires_grad_() for x in whole[2:]]
    cell, options = CELLS[name]
    exchanged, owner = Exchanged(), torch.nn.Module()

    def run(x, gate, matrix, bias, first, second, entering):
        return stream(
            cell, (matrix, bias), (x, gate), (first, second), shard=shard, group=group, slot=exchanged.slot(owner),
            backwards=backwards, every=every, entering=entering if ends else None, return_leaving=ends, **options,
        )  # fmt: skip

    got = checkpoint(run, *mine, *shared, use_reentrant=False) if again else run(*mine, *shared)
    got, got_leaving = got if ends else (got, None)
    total = (got * shard.take(upstream)).sum() + ((got_leaving * upstream_state).sum() if ends else 0)
    found = torch.autograd.grad(total, [*mine, *shared], allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, [*mine, *shared])]
    pairs = [(got.detach(), shard.take(out))]
    pairs += [(g, shard.take(theirs)) for g, theirs in zip(found[:2], grads)]
    share = group.size**0.5  # every rank has the whole sum
    pairs += [(group.all_reduce(g).wait() / share, theirs / share) for g, theirs in zip(found[2:], grads[2:])]
    return [*pairs, (got_leaving.detach() / share, leaving / share)] if ends else pairs


def check(size, name, lengths, layout, seed=0, backwards=False, ends=False, **how):
    expected = one_device(name, tuple(lengths), seed, backwards, ends)
    results = run_ranks(size, on_rank, name, lengths, layout, expected, seed, backwards, ends, *how.values())
    errors = []
    for pairs, whole in zip(spread(results), [expected[2], *expected[4], expected[3]]):
        errors.append(relative_error(pairs, whole))
    assert errors[0] < 1e-12 and max(errors) < 1e-10, errors


@pytest.mark.sampled(2)
@pytest.mark.parametrize("size", (1, 2, 3, 5, 8))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop(layout, size):
    for lengths in lengths_around(size, per_rank=3):
        check(size, "plain", lengths, layout, seed=size)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_states_enter_and_leave_with_their_gradients(name, backwards):
    for layout in LAYOUTS:
        for lengths in ([9], [3, 0, 7], [0, 5], [4, 0], [2, 2, 9]):
            check(3, name, lengths, layout, seed=5, backwards=backwards, ends=True)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    size=st.sampled_from((1, 2, 3, 5)),
    layout=st.sampled_from(LAYOUTS),
    name=st.sampled_from(tuple(CELLS)),
    backwards=st.booleans(),
    every=st.integers(0, 5),
)
def test_any_documents(lengths, size, layout, name, backwards, every):
    check(size, name, lengths, layout, seed=sum(lengths), backwards=backwards, ends=bool(every % 2), every=every)


@pytest.mark.parametrize("name", ("plain", "kept"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_sends_nothing_again(layout, name):
    lengths, sent = [5, 0, 11, 2], []
    expected = one_device(name, tuple(lengths), 0, False, True)

    def body(group, again):
        ledger = Ledger(group)
        on_rank(ledger, name, lengths, layout, expected, ends=True, again=again)
        return ledger.bytes_

    check(3, name, lengths, layout, ends=True, every=0, again=True)
    for again in (False, True):
        sent.append(run_ranks(3, body, again))
    assert sent[0] == sent[1] and sum(sent[0]) > 0


def test_a_cut_at_the_start_of_a_document_sends_nothing():
    def body(group, lengths):
        ledger = Ledger(group)
        expected = one_device("plain", tuple(lengths), 0, False, False)
        on_rank(ledger, "plain", lengths, "contiguous", expected)
        return ledger.messages_by_verb["exchange"], ledger.bytes_by_verb["exchange"]

    state = B * (D + 1) * 8
    assert run_ranks(3, body, [4, 4, 4]) == [(0, 0)] * 3
    assert run_ranks(3, body, [12]) == [(1, state), (2, 2 * state), (1, state)]  # one forward, one backward
    assert run_ranks(3, body, [8, 4]) == [(1, state), (1, state), (0, 0)]


def test_frozen_parameters_get_no_gradients_and_the_others_theirs():
    x, gate, matrix, bias, first, second, _ = inputs_of(12, 3)

    def body(group, frozen):
        shard = Shard.of([12], group)
        mine = leaves(shard, x, gate)
        shared = [
            y.clone().requires_grad_(number not in frozen) for number, y in enumerate((matrix, bias, first, second))
        ]
        out = stream(plain, shared[:2], mine, shared[2:], shard=shard, group=group)
        out.sum().backward()
        return [None if y.grad is None else group.all_reduce(y.grad).wait() for y in shared]

    whole, some = run_ranks(3, body, ())[0], run_ranks(3, body, (0, 2))[1]
    assert some[0] is None and some[2] is None
    assert all(torch.equal(some[place], whole[place]) for place in (1, 3))


def test_documents_within_a_rank_run_side_by_side():
    """Steps, counted: those of a few batches, not those of all documents."""
    steps = []

    def counting(params, rows, state):
        steps.append(rows[0].shape[1])
        return plain(params, rows, state)

    def count(lengths):
        steps.clear()
        x, gate, matrix, bias, first, second, _ = inputs_of(sum(lengths), 0)
        shard = Shard.of(lengths, run_ranks(1, lambda group: group)[0])
        stream(counting, (matrix, bias), (x, gate), (first, second), shard=shard, group=shard.group)
        return sum(steps)

    assert count([600]) == 600
    assert count([3] * 200) == 3
    assert count([1, 2, 3, 4] * 60) <= 1 + 2 + 4


def test_what_a_stretch_keeps_grows_with_the_square_root_of_its_steps():
    """Numbers that are saved for backward besides tokens, parameters and initial states."""
    kept = []
    for steps in (100, 400, 1600):
        x, gate, matrix, bias, first, second, _ = (y.clone().requires_grad_() for y in inputs_of(steps, 0))
        shard, numbers = Shard.of([steps], run_ranks(1, lambda group: group)[0]), []

        def pack(y, numbers=numbers):
            numbers.append(y.numel())
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            stream(plain, (matrix, bias), (x, gate), (first, second), shard=shard, group=shard.group)
        kept.append(sum(numbers) - sum(y.numel() for y in (x, gate, matrix, bias, first, second)))
    assert kept == [B * (D + 1) * number for number in (10, 20, 40)]


def test_bfloat16_states_are_fp32_and_one_rounding_remains():
    x, gate, matrix, bias, first, second, _ = inputs_of(40, 1)
    narrow = [y.bfloat16() for y in (x, gate, matrix, bias, first, second)]
    exact, _ = oracle("plain", *([y.double() for y in part] for part in (narrow[2:4], narrow[:2], narrow[4:])), None,
                      [40], False)  # fmt: skip

    def body(group):
        shard = Shard.of([40], group)
        with torch.autocast("cpu", torch.bfloat16):
            out = stream(plain, narrow[2:4], [shard.take(y) for y in narrow[:2]], narrow[4:], shard=shard, group=group)
        assert out.dtype == torch.bfloat16
        return out.double(), shard.take(exact)

    assert relative_error(run_ranks(3, body), exact) < 3e-3


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"cell": lambda params, rows, state: (rows[0], (state[0][:, :1], state[1]))}, "must give one, but gave"),
        ({"cell": lambda params, rows, state: (rows[0], state[:1])}, "must give one, but gave"),
        ({"cell": lambda params, rows, state: (rows[0][:, :0], state)}, "must give as many, but gave"),
        ({"cell": lambda params, rows, state: (rows[0], tuple(x.half() for x in state))}, "but gave torch.float16"),
        ({"chunk": -1}, "chunk must be a number of tokens, got -1"),
        ({"every": -2}, "every must be a number of tokens, got -2"),
        ({"entering": torch.zeros(B, 2)}, "entering must be"),
    ],
)
def test_what_does_not_fit_raises_on_every_rank_before_a_message(fault, text):
    x, gate, matrix, bias, first, second, _ = inputs_of(5, 1)

    def body(group):
        ledger = Ledger(group)
        shard, options = Shard.of([5], ledger), dict(fault)
        cell = options.pop("cell", plain)
        with pytest.raises(ValueError, match=text):
            stream(cell, (matrix, bias), [shard.take(y) for y in (x, gate)], (first, second), shard=shard, group=ledger,
                   **options)  # fmt: skip
        return ledger.messages

    assert run_ranks(7, body) == [0] * 7
