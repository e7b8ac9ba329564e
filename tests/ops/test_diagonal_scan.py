"""The diagonal and the selective scan in stages equal the token-by-token loops: outputs, states and every gradient."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.collectives.transition import together
from seqpar.ops.diagonal_scan import DiagonalScan, SelectiveScan, selective, tiles
from tests.ops.scan_cases import KINDS, errors, expected, make, staged, without_boundary
from tests.oracles.diagonal import reversed_starts

TOKENS = (0, 1, 15, 16, 17, 63, 100)
STARTS = {
    "fresh": (0,),
    "middle": (37,),
    "tiny": tuple(range(2, 130, 3)),
    "one by one": tuple(range(130)),
    "in one chunk": (0, 70, 71, 77),
    "at the edges": (16, 64, 128),
    "last token": (129,),
}


def op_of(case, reverse=False):
    return (SelectiveScan if case.kind == "selective" else DiagonalScan)("reference", reverse)


def wrong(case, outputs=1e-12, gradients=1e-10, reverse=False):
    """What is off by more than it may be."""
    found = errors(case, staged(op_of(case, reverse), case), expected(case, reverse))
    allowed = {name: outputs if name in ("out", "final") else gradients for name in found}
    return {name: error for name, error in found.items() if not error <= allowed[name]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", TOKENS)
def test_forward_and_backward_for_any_number_of_tokens(kind, t):
    assert not wrong(make(kind, t))
    assert not wrong(without_boundary(make(kind, t, seed=1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_documents_do_not_mix(kind, starts):
    assert not wrong(make(kind, 130, starts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", (1, 40, 100))
def test_from_the_last_token_to_the_first(kind, t):
    starts = reversed_starts((t // 3, 0, t - t // 3 - t // 4, t // 4))
    assert not wrong(make(kind, t, starts[1:]), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_chunks(kind):
    assert not wrong(make(kind, 1100, (1, 377, 700), b=1, d=3, n=2, strength=1e-3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_memory_keeps_its_digits(kind):
    case = make(kind, 1000, b=1, strength=1e-6)
    if kind == "selective":
        case = replace(case, shared=(case.shared[0] * 1e-3,))
    assert not wrong(case, 1e-12, 1e-10)
    single = case.to(torch.float32)
    found = errors(single, staged(op_of(single), single))
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("kind", ("gated", "complex", "half complex"))
@pytest.mark.parametrize("forgotten", (-math.inf, -800.0, -20.0))
def test_decays_may_be_zero(kind, forgotten):
    case = make(kind, 100, (50,))
    log_a = case.tokens[0].clone()
    log_a[:, 20, ::2], log_a[:, 40:45], log_a[:, 50, 0], log_a[0, 99] = forgotten, forgotten, forgotten, forgotten
    assert not wrong(replace(case, tokens=(log_a, case.tokens[1])))


@pytest.mark.parametrize("kind", ("constant", "complex constant"))
def test_a_shared_decay_may_be_zero(kind):
    case = make(kind, 40)
    log_a = case.shared[0].clone()
    log_a[1] = -math.inf
    assert not wrong(replace(case, shared=(log_a,)))
    known = op_of(case).known((log_a,), case.d_final, (0, 3))
    state = torch.ones_like(case.d_final)
    assert torch.equal(known[0].apply(state), state)
    assert bool((known[1].apply(state)[:, :, 1] == 0).all())


def test_steps_that_forget_all_and_steps_that_do_nothing():
    case = make("selective", 100)
    delta = case.tokens[1].clone()
    delta[:, 10:20], delta[:, 30], delta[:, 50, ::2] = 0, 2000, 50
    assert not wrong(replace(case, tokens=(case.tokens[0], delta, *case.tokens[2:])))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("kind", ("gated", "constant", "selective"))
def test_low_precision_is_rounded_once(kind, dtype):
    case = make(kind, 100, (33,), d=32, n=8).to(dtype)
    found = errors(case, staged(op_of(case), case))
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert max(found.values()) < limit, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan_from", (0, 1, 40, 63))
def test_two_runs_in_sequence_are_one(kind, scan_from):
    """What leaves the first run enters the second, and the transitions say what passes through both."""
    case = without_boundary(make(kind, 64, (5,)))
    op, whole = op_of(case), expected(case)
    parts = (slice(scan_from), (5,) * (scan_from > 5)), (slice(scan_from, None), (5 - scan_from,) * (scan_from <= 5))
    halves = [
        op.begin(tuple(None if x is None else x[:, rows] for x in case.tokens), case.shared, starts)
        for rows, starts in parts
    ]
    outs = [op.finish(run, None, state) for run, state in zip(halves, (None, halves[0].outgoing))]
    assert float((torch.cat(outs, 1) - whole[0]).norm() / whole[0].norm()) < 1e-12
    both = together([op.transition(run) for run in halves])
    whole_run = op.begin(case.tokens, case.shared, ())
    state = torch.ones_like(whole_run.outgoing)
    passed = op.transition(whole_run).apply(state)
    assert float((both.apply(state) - passed).norm() / passed.norm()) < 1e-12


@pytest.mark.parametrize("kind", ("constant", "complex constant"))
def test_a_shared_decay_is_known_to_all(kind):
    case = make(kind, 57)
    op = op_of(case)
    run = op.begin(case.tokens, case.shared, ())
    known = op.known(case.shared, run.outgoing, (3, 57))
    state = torch.ones_like(run.outgoing)
    mine = op.transition(run).apply(state)
    assert float((known[1].apply(state) - mine).norm() / mine.norm()) < 1e-12
    assert op.known((), run.outgoing, (3, 57)) is None


def test_of_a_selective_scan_only_the_sums_of_steps_travel():
    case = make("selective", 20)
    transition = op_of(case).transition(op_of(case).begin(case.tokens, case.shared, ()))
    assert transition.value.shape == (2, 1, 5, 1)
    assert transition.log_decay.shape == (2, 1, 5, 3)


def test_phases_are_summed_modulo_a_turn():
    """A phase of thousands of radians would lose the digits that a single one keeps."""
    log_a = torch.full((1, 4096, 2), -1e-6 + 3.1j, dtype=torch.complex64)
    run = DiagonalScan("reference").begin((log_a, torch.zeros_like(log_a)), (), ())
    exact = (log_a[:, 0].to(torch.complex128) * 4096).exp()
    assert float((run.total.squeeze().exp() - exact).abs().max()) < 1e-6
    assert float(tiles.wrapped(torch.tensor([3.2j, -40j])).imag.abs().max()) <= math.pi


class LargestProduct(TorchDispatchMode):
    """Notes the most elements that a product with all states of a channel has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor and out.shape[-2:] == (64, 8):
            self.numel = max(self.numel, out.numel())
        return out


def test_passes_of_the_selective_scan_hold_the_states_of_one_tile(monkeypatch):
    case = make("selective", 512, (300,), b=1, d=64, n=8)
    found = staged(op_of(case), case)
    monkeypatch.setattr(selective, "TILE_BYTES", 1 << 14)
    in_tiles = staged(op_of(case), case)
    run = op_of(case).begin(case.tokens, case.shared, case.starts)
    with LargestProduct() as largest:
        run.passes.replay(run.work, torch.zeros_like(run.left).unflatten(2, (64, 8)))
        run.passes.gradients(run.work, case.d_out, *torch.zeros(2, *run.left.shape[:2], 64, 8, dtype=torch.float64))
    assert 0 < largest.numel * 8 <= 1 << 14
    assert all(torch.allclose(x, y, 1e-11, 1e-11) for x, y in zip(found, in_tiles))


def bad_calls():
    gated, constant, selective = make("gated", 8), make("constant", 8), make("selective", 8)
    log_a, x = gated.tokens
    u, delta, keys, queries = selective.tokens
    yield DiagonalScan(), (None, x), (), (), "once"
    yield DiagonalScan(), (log_a, x), constant.shared, (), "once"
    yield DiagonalScan(), (log_a[:, :3], x), (), (), r"log_a \[2, 3, 5\], x \[2, 8, 5\]"
    yield DiagonalScan(), (log_a.to(torch.complex128), x), (), (), "complex"
    yield DiagonalScan(), gated.tokens, (), (3, 3), "ascend within the 8 tokens"
    yield DiagonalScan(), gated.tokens, (), (8,), "ascend"
    yield DiagonalScan("fast"), gated.tokens, (), (), "impl must be one of"
    yield SelectiveScan(), selective.tokens, (), (), "A"
    yield SelectiveScan(), (u, delta, keys, queries[..., :2]), selective.shared, (), "expected"
    yield SelectiveScan(), (u, delta[:, 1:], keys, queries), selective.shared, (), "expected"
    yield SelectiveScan(), selective.tokens, selective.shared, (-1,), "ascend"


@pytest.mark.parametrize(("op", "tokens", "shared", "starts", "words"), list(bad_calls()))
def test_what_does_not_fit_raises(op, tokens, shared, starts, words):
    with pytest.raises(ValueError, match=words):
        op.begin(tokens, shared, starts)
