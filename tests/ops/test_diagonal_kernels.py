"""The kernels of the diagonal and the selective scan equal the token-by-token loops, interpreted or on a GPU."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from seqpar.ops.diagonal_scan import DiagonalScan, SelectiveScan, tiles
from tests.ops.scan_cases import GATES, KINDS, errors, expected, make, staged, without_boundary
from tests.oracles.diagonal import reversed_starts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def op_of(case, reverse=False, impl="triton"):
    return (SelectiveScan if case.kind == "selective" else DiagonalScan)(impl, reverse)


def off(case, dtype=torch.float32, reverse=False):
    """The relative error of every result, for inputs rounded to ``dtype``."""
    case = case.to(dtype)
    got = staged(op_of(case, reverse), case.on(DEVICE))
    return errors(case, [x.cpu() for x in got], expected(case, reverse))


def wrong(case, limit=1e-5, dtype=torch.float32, reverse=False):
    return {name: error for name, error in off(case, dtype, reverse).items() if not error <= limit}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ("gated", "selective"))
@pytest.mark.parametrize("t", (0, 1, 15, 16, 17, 63))
def test_forward_and_backward_for_any_number_of_tokens(kind, t):
    assert not wrong(make(kind, t, b=1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_mix(kind):
    assert not wrong(make(kind, 22, (5, 6, 19), b=1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_from_the_last_token_to_the_first(kind):
    assert not wrong(make(kind, 19, reversed_starts((7, 0, 9, 3)), b=1), reverse=True)


@pytest.mark.parametrize("kind", ("constant", "complex", "selective"))
def test_without_a_state_before_or_after(kind):
    assert not wrong(without_boundary(make(kind, 18, b=1)))


@pytest.mark.parametrize(("kind", "d", "n"), (("gated", 100, 0), ("complex constant", 70, 0), ("selective", 70, 16)))
def test_several_blocks_of_channels(kind, d, n):
    assert not wrong(make(kind, 3, d=d, n=n))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "t"), (("gated", 70), ("complex", 25), ("selective", 25)))
def test_chunks_of_chunks(kind, t, monkeypatch):
    for table in (tiles.DIAGONAL, tiles.SELECTIVE, tiles.SELECTIVE_GRADIENT):
        for name, tile in table.items():
            monkeypatch.setitem(table, name, replace(tile, chunk=4, steps=2))
    assert not wrong(make(kind, t, (9, 22), b=1), 1e-11, torch.float64)


@pytest.mark.parametrize("kind", ("gated", "complex"))
def test_decays_may_be_zero(kind):
    case = make(kind, 34, (29,), b=1, d=4)
    log_a = case.tokens[0].clone()
    log_a[:, 3, ::2], log_a[:, 17], log_a[:, 20:24], log_a[:, 29] = -math.inf, -math.inf, -20, -math.inf
    assert not wrong(replace(case, tokens=(log_a, case.tokens[1])))


def test_steps_that_forget_all_and_steps_that_do_nothing():
    case = make("selective", 34, b=1)
    delta = case.tokens[1].clone()
    delta[:, 3:6], delta[:, 20], delta[:, 25, ::2] = 0, 2000, 50
    assert not wrong(replace(case, tokens=(case.tokens[0], delta, *case.tokens[2:])))


@pytest.mark.parametrize("kind", ("gated", "constant", "selective"))
def test_half_precision_is_rounded_once(kind):
    for name, error in off(make(kind, 24, (13,), b=1, d=16, n=8), torch.bfloat16).items():
        limit = 0.01 if name in GATES else 0.004 if name in ("out", "final") else 0.006
        assert error <= limit, name


@pytest.mark.parametrize("kind", ("gated", "selective"))
def test_a_long_memory_keeps_its_digits(kind):
    case = make(kind, 63, b=1, d=2, n=2, strength=1e-4)
    assert not wrong(case, 2e-6)


@pytest.mark.parametrize("kind", ("gated", "selective"))
def test_tensors_that_are_not_contiguous(kind):
    case = make(kind, 9)
    tokens = tuple(torch.stack([x, x], -1)[..., 0] for x in case.tokens)
    d_out = case.d_out.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in (*tokens, d_out))
    case = case.to(torch.float32)
    strided = replace(case, tokens=tuple(x.to(torch.float32) for x in tokens), d_out=d_out.to(torch.float32))
    assert max(errors(case, [x.cpu() for x in staged(op_of(case), strided.on(DEVICE))]).values()) < 1e-5


@pytest.mark.parametrize("kind", ("selective",))
def test_twice_gives_the_same_bits(kind):
    case = make(kind, 9, (7,), d=70).to(torch.float32).on(DEVICE)
    first, second = (staged(op_of(case), case) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("states", (1, 3, 16, 17, 64, 256))
@pytest.mark.parametrize("architecture", ("sm_80", "sm_90", "gfx942", "cpu", "sm_120"))
def test_every_architecture_has_tiles(states, architecture):
    for gradient in (False, True):
        tile = tiles.selective_tile(architecture, states, gradient)
        assert tile.chunk % tile.steps == 0 and tile.block & (tile.block - 1) == 0 and tile.block >= 1
        assert tile.chunk == tiles.selective_tile(architecture, states).chunk, "checkpoints are those of forward"
    assert tiles.diagonal_tile(architecture, pairs=True).block * 2 == tiles.diagonal_tile(architecture).block


def test_channels_are_fewer_where_each_has_more_states():
    blocks = [tiles.selective_tile("sm_90", states).block for states in (1, 16, 32, 64, 256)]
    assert blocks == [128, 32, 16, 8, 2]
