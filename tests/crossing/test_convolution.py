"""Convolutions over a cut sequence are those of one device: every kind, layout and group size, forward and backward."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from seqpar import Cut, Shard
from seqpar.collectives import Ledger, alone, run_ranks
from seqpar.crossing.convolution import causal_conv, grid_conv, symmetric_conv, token_shift
from seqpar.crossing.taps import MOST
from seqpar.layers.local.convolution import ShortConvolution
from seqpar.layers.local.token_shift import TokenShift
from tests.cutting import LAYOUTS, cut, leaves, lengths_around, relative_error, spread, tensors
from tests.layers.test_many_documents import Work
from tests.oracles.convolution import convolution, grid_convolution, last_inputs, shifted

B = 2
KINDS = ("causal", "continued", "symmetric", "dense", "grid", "shift", "shift, continued")
SIZES = (1, 2, 3, 5, 8)
WIDTH = 3


@dataclass(frozen=True)
class Case:
    """One kind of convolution: ``taps`` of its window (rows and columns on a grid), ``dim`` channels."""

    kind: str
    taps: tuple[int, ...]
    dim: int = 3

    @property
    def depth(self):
        """Rows of the initial and final state; None where there is none."""
        return self.taps[0] - 1 if "continued" in self.kind else None

    def inputs(self, lengths, seed):
        """x, then weight, bias and initial state as the kind has them."""
        shapes = [(B, sum(lengths), self.dim)]
        if "shift" not in self.kind:
            outputs = (self.dim + 1, self.dim) if self.kind == "dense" else (self.dim,)
            shapes += [(*outputs, *self.taps), outputs[:1]]
        return tensors(seed, *shapes, *([] if self.depth is None else [(B, self.depth, self.dim)]))

    def expected(self, lengths, x, *rest):
        """The oracle's output and final state."""
        if self.kind.startswith("shift"):
            out = shifted(x, lengths, *rest)
        elif self.kind == "grid":
            out = grid_convolution(x, *rest, lengths=lengths, width=WIDTH)
        else:
            left = self.taps[0] // 2 if self.kind in ("symmetric", "dense") else self.taps[0] - 1
            out = convolution(x, *rest[:2], lengths=lengths, left=left, initial=rest[2] if rest[2:] else None)
        return (out,) if self.depth is None else (out, last_inputs(x, self.depth, lengths, rest[-1]))

    def run(self, x, *rest, shard, group, slot=None):
        """Ours."""
        how = {"shard": shard, "group": group, "slot": slot}
        if self.kind.startswith("shift"):
            ends = {"initial": rest[0], "return_final": True} if rest else {}
            out = token_shift(x, **how, **ends)
        elif self.kind == "grid":
            out = grid_conv(x, *rest, width=WIDTH, **how)
        elif self.kind in ("symmetric", "dense"):
            out = symmetric_conv(x, *rest, **how)
        else:
            ends = {"initial": rest[2], "return_final": True} if rest[2:] else {}
            out = causal_conv(x, *rest[:2], **how, **ends)
        return out if isinstance(out, tuple) else (out,)


def case_of(kind, seed=0):
    """A window of one size or another, some deeper than a short shard, wider than the grid, or of one token."""
    if kind == "grid":
        return Case(kind, ((3, 3), (1, 5), (5, 1), (3, 5))[seed % 4])
    if "shift" in kind:
        return Case(kind, (2,))
    return Case(kind, (((3, 7, 1, 5) if kind in ("symmetric", "dense") else (4, 9, 1, 2))[seed % 4],))


def one_device(case, lengths, seed):
    """The oracle's outputs, their upstream gradients, and the gradients of the inputs."""
    inputs = [x.requires_grad_() for x in case.inputs(lengths, seed)]
    outputs = case.expected(lengths, *inputs)
    upstreams = tensors(seed + 1, *(out.shape for out in outputs))
    total = sum((out * upstream).sum() for out, upstream in zip(outputs, upstreams))
    grads = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else [None] * len(inputs)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs)]
    return [out.detach() for out in outputs], upstreams, grads


def cut_convolution(group, case, lengths, layout, seed, expected, dtype):
    """Pairs (got, expected) on this rank: output, gradients of all inputs, and the final state if there is one."""
    outputs, upstreams, grads = expected
    shard = cut(lengths, group, layout, seed)
    x, *rest = case.inputs(lengths, seed)
    mine = leaves(shard, x, dtype=dtype) + [each.to(dtype).requires_grad_() for each in rest]
    got = case.run(*mine, shard=shard, group=group)
    wanted = [shard.take(upstreams[0]), *upstreams[1:]]
    total = sum((out * upstream.to(dtype)).sum() for out, upstream in zip(got, wanted))
    found = torch.autograd.grad(total, mine)
    share = group.size**-0.5  # what every rank holds counts once
    pairs = [(got[0].detach(), shard.take(outputs[0])), (found[0], shard.take(grads[0]))]
    for gradient, whole in zip(found[1:], grads[1:]):
        pairs.append((group.all_reduce(gradient.double()).wait() * share, whole * share))
    return pairs + [(final.detach().double() * share, whole * share) for final, whole in zip(got[1:], outputs[1:])]


def errors(size, case, lengths, layout, seed=0, dtype=torch.float64):
    expected = one_device(case, lengths, seed)
    ranks = run_ranks(size, cut_convolution, case, lengths, layout, seed, expected, dtype)
    wholes = [expected[0][0], *expected[2], *expected[0][1:]]
    return [relative_error(parts, whole) for parts, whole in zip(spread(ranks), wholes)]


def assert_exact(found):
    assert found[0] < 1e-13
    assert max(found) < 1e-12


def rows_of_grids(lengths):
    return [WIDTH * length for length in lengths]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_device(kind, layout, size):
    lengths = [3, 0, 1, 6, 2] if kind == "grid" else [7, 0, 1, 13, 1, 2]
    for seed in range(2):
        documents = rows_of_grids(lengths) if kind == "grid" else lengths
        assert_exact(errors(size, case_of(kind, seed), documents, layout, seed))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_end_around_every_edge(kind, size):
    for seed, lengths in enumerate(lengths_around(size, per_rank=2 if kind == "grid" else 5)):
        documents = rows_of_grids(lengths) if kind == "grid" else lengths
        assert_exact(errors(size, case_of(kind, seed), documents, LAYOUTS[seed % 4], seed))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("lengths", [[3], [0], [0, 0], [0, 3], [3, 0], [1, 2], [2, 9, 1]])
def test_states_deeper_than_documents(lengths, size):
    """What is left of the initial state in the final one, and what is not: a document after the first starts afresh."""
    for layout in LAYOUTS:
        assert_exact(errors(size, Case("continued", (7,)), lengths, layout, 1))


@pytest.mark.parametrize("kind", ["causal", "continued", "symmetric"])
@pytest.mark.parametrize("taps", [MOST, MOST + 1, MOST + 2])
def test_the_most_taps_that_go_one_by_one_and_more(kind, taps):
    for seed, layout in enumerate(LAYOUTS):
        case = Case(kind, (taps // 2 * 2 + 1 if kind == "symmetric" else taps,))
        assert_exact(errors(3, case, [5, 0, 1, 40, 2, 18], layout, seed))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9),
)
def test_any_lengths_ranks_and_windows(lengths, size, layout, kind, seed):
    documents = [WIDTH * (length // 2) for length in lengths] if kind == "grid" else lengths
    assert_exact(errors(size, case_of(kind, seed), documents, layout, seed))


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("kind", KINDS)
def test_in_every_world(group, kind):
    case, lengths = case_of(kind, 2), [9, 0, 12]
    expected = one_device(case, lengths, 0)
    for layout in LAYOUTS:
        for got, part in cut_convolution(group, case, lengths, layout, 0, expected, torch.float64):
            assert (got - part).norm() <= 1e-12 * (1 + part.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_error_of_eight_ranks_is_that_of_one(kind):
    """What a token holds is as exact. What all ranks share has gradients in parts, each rounded once: with random signs
    their errors add up to that of one, on average."""
    taps = {"grid": (3, 3), "shift, continued": (2,)}.get(kind, (3,))
    case, lengths = Case(kind, taps, dim=96 if kind == "dense" else 256), [15, 3, 42]
    one = errors(1, case, lengths, "contiguous", 0, torch.bfloat16)
    for layout in LAYOUTS:
        eight = errors(8, case, lengths, layout, 0, torch.bfloat16)
        bounds = [1.1, 1.1] + [1.25] * len(one[2:])
        assert all(e <= bound * o + 1e-9 for e, bound, o in zip(eight, bounds, one)), (layout, eight, one)


def test_a_document_that_is_not_finite_spoils_no_other():
    def body(group, kind, layout):
        lengths = [6, 9, 3]
        case, shard = case_of(kind, 0), cut(lengths, group, layout)
        x, *rest = case.inputs(lengths, 0)
        x[:, 6:15] = torch.nan
        (mine,) = leaves(shard, x)
        out = case.run(mine, *rest, shard=shard, group=group)[0]
        (gradient,) = torch.autograd.grad(out, mine, out.detach())
        inside = shard.take(torch.tensor([[False] * 6 + [True] * 9 + [False] * 3]))[0]
        return [bool((each.isfinite().all(2).all(0) | inside).all()) for each in (out, gradient)]

    for kind in KINDS:
        for layout in LAYOUTS:
            assert run_ranks(3, body, kind, layout) == [[True, True]] * 3, (kind, layout)


@pytest.mark.parametrize("kind", ["causal", "shift"])
def test_short_documents_take_no_more_rows_than_a_long_one(kind):
    """Bytes written by a forward and a backward: no zeros between documents, and rows of others hidden in place."""

    def work_of(lengths):
        case, shard, work = Case(kind, (4,) if kind == "causal" else (2,), 8), Shard.of(lengths, alone()), Work()
        inputs = [x.requires_grad_() for x in case.inputs(lengths, 0)]
        for mode in (nullcontext(), work):  # once to plan
            with mode:
                case.run(*inputs, shard=shard, group=alone())[0].sum().backward()
        return work

    one, many = work_of([640]), work_of([1, 2] * 160 + [160])
    assert many.bytes_ <= 1.5 * one.bytes_, (one.bytes_, many.bytes_)
    assert many.calls <= one.calls + 6 * 3, (one.calls, many.calls)


# --- what is sent ----------------------------------------------------------------------------------------------------


def sent(group, case, lengths, layout="contiguous", dtype=torch.float32):
    """The rows and messages that this rank sends, forward and backward."""
    ledger, shard = Ledger(group), Shard.of(lengths, group, layout)
    x, *rest = case.inputs(lengths, 0)
    (mine,) = leaves(shard, x, dtype=dtype)
    out = case.run(mine, *rest, shard=shard, group=ledger)
    forward = (ledger.bytes_ // (B * case.dim * dtype.itemsize), ledger.messages)
    ledger.clear()
    sum(each.sum() for each in out).backward()
    return forward, (ledger.bytes_ // (B * case.dim * dtype.itemsize), ledger.messages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_window_sends_all_but_one_of_its_rows_over_each_cut(dtype):
    case = Case("causal", (4,))
    first, inner, last = ((3, 1), (0, 0)), ((3, 1), (3, 1)), ((0, 0), (3, 1))
    assert run_ranks(4, sent, case, [32], "contiguous", dtype) == [first, inner, inner, last]
    assert run_ranks(4, sent, case, [320], "contiguous", dtype) == [first, inner, inner, last]
    assert run_ranks(3, sent, Case("shift", (2,)), [9], "contiguous", dtype)[0] == ((1, 1), (0, 0))


def test_only_documents_that_cross_a_cut_send():
    case = Case("causal", (4,))
    assert run_ranks(4, sent, case, [8] * 4) == [((0, 0), (0, 0))] * 4
    # the last two rows of rank 0 (its document begins there) and the first of rank 1, which ends it, in backward
    assert run_ranks(2, sent, case, [6, 3, 7]) == [((2, 1), (0, 0)), ((0, 0), (1, 1))]


def test_a_row_is_sent_once_to_each_rank_that_needs_it():
    case = Case("causal", (4,))
    assert run_ranks(4, sent, case, [4]) == [((3, 3), (0, 0)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((0, 0), (3, 3))]
    # striped over 2 ranks: the other rank needs each of my 6 rows, though up to two of its tokens see it
    assert [forward for forward, _ in run_ranks(2, sent, case, [12], "striped")] == [(6, 1), (5, 1)]


def test_a_centred_window_sends_half_of_itself_both_ways():
    for case in (Case("symmetric", (5,)), Case("symmetric", (5,), dim=2)):
        ends, inner = ((2, 1), (2, 1)), ((4, 2), (4, 2))
        assert run_ranks(4, sent, case, [32]) == [ends, inner, inner, ends]


def test_a_grid_sends_the_rows_and_columns_that_are_seen_and_no_others():
    case = Case("grid", (3, 3))
    # 8 rows of 3 over 2 ranks: a row either way. Cut within a row, after token 13: 4 before and 4 after are seen.
    assert run_ranks(2, sent, case, [24]) == [((3, 1), (3, 1))] * 2
    assert run_ranks(2, sent, case, [27]) == [((4, 1), (4, 1)), ((4, 1), (4, 1))]
    # A token of its own on each rank: it sees all of the 9 but itself in the middle, 3 in a corner.
    assert sum(forward[0] for forward, _ in run_ranks(9, sent, case, [9])) == 8 + 4 * 3 + 4 * 5


def test_the_final_state_travels_with_the_rest():
    case = Case("continued", (4,))
    assert run_ranks(3, sent, case, [12]) == [((3, 1), (0, 0)), ((3, 1), (3, 1)), ((6, 2), (3, 1))]
    assert run_ranks(3, sent, case, [5, 7])[1:] == [((3, 1), (1, 1)), ((6, 2), (3, 1))]


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.spmd(3)
@pytest.mark.parametrize("name", ["short convolution", "token shift"])
def test_checkpointing_changes_no_bit_and_sends_nothing_again(group, name):
    layer = (TokenShift(4) if name == "token shift" else ShortConvolution(4, bias=True, silu=True)).double()
    ledger = Ledger(group)
    shard = Shard.of([5, 8], group)
    (x,) = leaves(shard, *tensors(0, (1, 13, 4)))
    found = []
    for run in (lambda *arguments: layer(*arguments), partial(checkpoint, layer, use_reentrant=False)):
        ledger.clear()
        y = run(x, Cut(shard, ledger))
        found.append((torch.autograd.grad(y, [x, *layer.parameters()], x.detach()), ledger.bytes_, ledger.messages))
    (plain, *counts), (again, *counts_again) = found
    assert counts == counts_again
    assert all(torch.equal(one, other) for one, other in zip(plain, again))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_short_convolution_is_its_equation_and_steps_give_the_same(width, silu):
    torch.manual_seed(1)
    layer, lengths = ShortConvolution(5, width=width, bias=True, silu=silu).double(), [6, 1, 9]
    (x,) = tensors(0, (B, 16, 5))
    expected = convolution(x, layer.weight, layer.bias, lengths=lengths, left=width - 1)
    expected = expected / (1 + (-expected).exp()) if silu else expected
    y, final = layer(x, Cut.whole(lengths), return_final=True)
    assert (y - expected).norm() < 1e-13 * expected.norm()
    assert torch.equal(y, layer(x, Cut.whole(lengths)))
    state, outputs = layer(x[:, :0], Cut.whole([0]), return_final=True)[1], []
    for token in x[:, 7:].unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    assert (torch.stack(outputs, 1) - expected[:, 7:]).norm() < 1e-13 * expected.norm()
    assert torch.equal(state, final)


def test_a_document_in_two_parts_is_the_document():
    layer, (x,) = ShortConvolution(3, width=6).double(), tensors(0, (B, 11, 3))
    first, state = layer(x[:, :2], Cut.whole([2]), return_final=True)
    second = layer(x[:, 2:], Cut.whole([9]), initial=state)
    whole = layer(x, Cut.whole([11]))
    assert (torch.cat([first, second], 1) - whole).norm() < 1e-14 * whole.norm()


def test_token_shift_mixes_with_the_token_before_and_steps_give_the_same():
    layer = TokenShift(4).double()
    torch.nn.init.uniform_(layer.mu)
    (x,) = tensors(0, (B, 9, 4))
    expected = (1 - layer.mu) * x + layer.mu * shifted(x, [4, 5])
    assert (layer(x, Cut.whole([4, 5])) - expected).norm() < 1e-14 * expected.norm()
    state = torch.zeros(B, 4, dtype=torch.float64)
    for token, output in zip(x[:, 4:].unbind(1), expected[:, 4:].unbind(1)):
        y, state = layer.step(token, state)
        assert (y - output).norm() < 1e-14 * output.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_the_input_and_autocast_changes_nothing(dtype):
    layer, (x,) = ShortConvolution(8, bias=True), tensors(0, (1, 9, 8), dtype=dtype)
    x.requires_grad_()
    y = layer(x, Cut.whole([9]))
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(x, Cut.whole([9]))
    assert y.dtype == under.dtype == dtype and torch.equal(y, under)
    grads = torch.autograd.grad(under, [x, layer.weight], torch.ones_like(under))
    assert [gradient.dtype for gradient in grads] == [dtype, torch.float32]


# --- bad input -------------------------------------------------------------------------------------------------------

X, WEIGHT = torch.zeros(1, 6, 3), torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (causal_conv, (X[:, 1:], WEIGHT), r"x must be \[b, t, d\] with my 6 tokens, got \[1, 5, 3\]"),
        (causal_conv, (X, torch.zeros(4, 3)), r"weight must be \[d, w\] with d = 3, got \[4, 3\]"),
        (causal_conv, (X, torch.zeros(3, 0)), r"weight must be \[d, w\] with d = 3, got \[3, 0\]"),
        (causal_conv, (X, WEIGHT, torch.zeros(2)), r"bias must be \[3\], got \[2\]"),
        (symmetric_conv, (X, torch.zeros(3, 4)), r"a centred window has an odd size, got \[4\]"),
        (symmetric_conv, (X, torch.zeros(5, 4, 3)), r"\[d', d, w\] with d = 3, got \[5, 4, 3\]"),
        (symmetric_conv, (X, torch.zeros(5, 3, 3), torch.zeros(3)), r"bias must be \[5\], got \[3\]"),
        (token_shift, (X[0],), r"x must be \[b, t, d\] with my 6 tokens, got \[6, 3\]"),
    ],
)
def test_bad_input_raises_on_every_rank_before_the_first_message(function, arguments, words):
    def body(group):
        ledger = Ledger(group)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: .*{words}"):
            function(*arguments, shard=Shard.of([12], group), group=ledger)
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]


@pytest.mark.parametrize(
    ("weight", "width", "words"),
    [
        (torch.zeros(3, 3, 3), 4, "every document must fill rows of 4 tokens, one has 6 tokens"),
        (torch.zeros(3, 3, 3), 0, "width must be at least 1 column, got 0"),
        (torch.zeros(3, 3, 2), 3, r"odd size, got \[3, 2\]"),
        (torch.zeros(2, 3, 3), 3, r"weight must be \[d, kh, kw\] with d = 3, got \[2, 3, 3\]"),
        (torch.zeros(3, 3), 3, r"weight must be \[d, kh, kw\]"),
    ],
)
def test_bad_grids(weight, width, words):
    with pytest.raises(ValueError, match=words):
        grid_conv(X, weight, width=width, shard=Shard.of([6], alone()), group=alone())


def test_bad_states_and_shards():
    shard = Shard.of([6], alone())
    with pytest.raises(ValueError, match=r"initial must be \[1, 2, 3\], got \[1, 3, 3\]"):
        causal_conv(X, WEIGHT, shard=shard, group=alone(), initial=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"initial must be \[1, 1, 3\], got \[2, 1, 3\]"):
        token_shift(X, shard=shard, group=alone(), initial=torch.zeros(2, 1, 3))
    other = run_ranks(2, lambda group: Shard.of([12], group))[1]
    with pytest.raises(ValueError, match="rank 0 of 1: the shard was cut for rank 1 of 2"):
        causal_conv(X, WEIGHT, shard=other, group=alone())
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ShortConvolution(3, width=0)
