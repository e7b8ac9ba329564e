"""The kernels of the delta rule give what its reference gives: on a GPU, or else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from seqpar.ops import launch
from seqpar.ops.delta_rule import DeltaRule, reference, stages, tiles
from seqpar.ops.delta_rule.chunks import build_gates
from tests.ops.delta_cases import KINDS, SCALE, check, errors, expected, faded, make, staged

OP = DeltaRule(scale=SCALE, impl="triton")
REFERENCE = DeltaRule(scale=SCALE, impl="reference")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = (1, 1, 16, 16)
FP32 = 2e-6


def on_device(case, dtype=torch.float32):
    return case.to(dtype).on(DEVICE)


@pytest.fixture
def chunk(monkeypatch):
    """Set how many tokens a chunk has: on GPUs it is one of these, too."""

    def choose(size):
        for name in ("_INTERPRETER", "_EXACT"):
            monkeypatch.setattr(tiles, name, replace(getattr(tiles, name), chunk=size))

    return choose


# Every result, against the token loop.


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kind, t",
    [*(("scalar", t) for t in (0, 1, 15, 16, 17, 63, 64, 65, 100)), ("none", 65), ("vector", 0), ("vector", 65)],
)
def test_any_number_of_tokens(kind, t):
    check(OP, on_device(make(kind, t, dims=SMALL)), FP32)


EDGES = (0, 20, 21, 32)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "kind, starts",
    [
        *(("scalar", starts) for starts in ((0,), EDGES, (31, 32, 33), tuple(range(40)), (39,))),
        ("none", EDGES),
        ("vector", (20,)),
        ("vector", EDGES),
    ],
    ids=str,
)
def test_documents_do_not_mix(kind, starts):
    check(OP, on_device(make(kind, 40, starts, dims=SMALL)), FP32)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("dims", [(2, 2, 5, 3), (1, 1, 60, 20), (1, 1, 20, 100), (1, 1, 130, 16)], ids=str)
def test_any_dims(kind, dims):
    """Beyond one block of key or value dims, too, and rows that are not aligned."""
    check(OP, on_device(make(kind, 12, (7,), dims=dims)), FP32)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_any_chunk(kind, size, chunk):
    chunk(size)
    check(OP, on_device(make(kind, size + 8, (0, 12, size), dims=SMALL)), FP32)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_strong_decay_neither_overflows_nor_cancels(kind):
    case = make(kind, 32, (25,), dims=SMALL, strength=20.0)
    check(OP, on_device(case), FP32)
    check(OP, on_device(faded(case, every=7)), FP32)


@pytest.mark.parametrize("kind", ["scalar"])
def test_without_states_and_their_gradients(kind):
    check(OP, on_device(make(kind, 40, dims=SMALL, with_incoming=False, with_d_final=False)), FP32)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "kind, dtype", [*((kind, torch.bfloat16) for kind in KINDS), ("scalar", torch.float16)], ids=str
)
def test_low_precision_keeps_within_a_few_roundings(kind, dtype):
    """One rounding to bf16 is 0.0017 in norm. Halves are multiplied in fp32: states need a larger range than theirs."""
    case = on_device(make(kind, 70, (50,), dims=(1, 1, 64, 64)), dtype)
    forward, backward = (4e-3, 5e-3) if dtype == torch.bfloat16 else (3e-4, 3e-4)
    check(OP, case, backward, forward=forward)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_errors_do_not_grow_with_the_number_of_runs(kind):
    """Three runs, states handed on by their transitions, are no worse in bf16 than one."""
    case = on_device(make(kind, 48, dims=(1, 1, 32, 32)), torch.bfloat16)
    want = expected(case)
    whole, state, parts = errors(case, staged(OP, case), want), case.incoming, []
    for first in range(0, 48, 16):
        run = OP.begin(tuple(None if x is None else x[:, first : first + 16] for x in case.tokens), (), ())
        parts.append(OP.finish(run, OP.intra(run), state))
        state = run.outgoing + OP.transition(run).apply(state)
    for name, got, exact in (("o", torch.cat(parts, 1), want[0]), ("final state", state, want[1])):
        assert (got.cpu().double() - exact).norm() / exact.norm() <= 1.2 * whole[name]


# The choice, and what the kernels are told.


def test_the_choice_is_kept_in_backward_and_made_per_run():
    case = on_device(make("scalar", 20))
    for op, module in ((OP, stages), (REFERENCE, reference)):
        run = op.begin(case.tokens, (), ())
        assert type(run) is module.Run
        assert type(op.begin_backward(run, case.d_o, case.incoming)) is module.Adjoint
    assert type(OP.begin(make("scalar", 20).tokens, (), ())) is reference.Run  # fp64
    assert DEVICE == "cuda" or type(DeltaRule().begin(case.tokens, (), ())) is reference.Run


def test_kernels_start_only_for_what_is_asked(monkeypatch):
    started = []
    through = launch.launch
    monkeypatch.setattr(
        launch,
        "launch",
        lambda kernel, *args, **options: started.append(kernel.__name__) or through(kernel, *args, **options),
    )
    case = on_device(make("none", 20))

    def starts(call):
        started.clear()
        call()
        return [name.removesuffix("_kernel") for name in started]

    run = OP.begin(case.tokens, (), ())
    assert starts(lambda: OP.finish(run, OP.intra(run), None)) == ["states", "output"]
    assert starts(lambda: (run.outgoing, OP.transition(run), OP.transition(run))) == ["transition"]
    adjoint = OP.begin_backward(run, case.d_o, None)
    assert starts(lambda: OP.finish_backward(run, adjoint, None, case.d_final)) == ["d_states", "gradients"]
    assert starts(lambda: OP.transition(OP.begin(case.tokens, (), (3,)))) == ["chunk"]


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_gates_of_chunks_are_products_of_decays(kind):
    case = make(kind, 40, dims=(1, 2, 3, 4))
    gates = build_gates(case.tokens[0], case.tokens[4].float(), (20,), 16)
    factors = case.tokens[4].exp()
    factors[:, 20] = 0
    for i, first in ((5, 0), (15, 0), (19, 16), (20, 16), (30, 16), (39, 32)):
        chunk, row = divmod(i, 16)
        into, out = factors[:, first : i + 1].prod(1), factors[:, i + 1 : min(first + 16, 40)].prod(1)
        for got, want in ((gates.into[:, :, chunk, row], into), (gates.out[:, :, chunk, row], out)):
            assert torch.allclose(got.double(), want, rtol=1e-6, atol=0)
    assert torch.equal(gates.across[:, :, 1], gates.into[:, :, 1, -1]) and not gates.across[:, :, 1].any()


def test_tiles_fit_what_they_hold():
    table = tiles._TABLE["sm_90"]
    small = tiles.fitted(table, 9, 16, 20, False)
    assert (small.chunk, small.output.k, small.output.v) == (16, 16, 32)
    assert (
        tiles.fitted(table, 1000, 256, 128, False).chain.warps > tiles.fitted(table, 1000, 64, 128, False).chain.warps
    )
    assert [tiles.whole(dim) for dim in (1, 16, 60, 64, 100, 256)] == [16, 16, 64, 64, 128, 256]
