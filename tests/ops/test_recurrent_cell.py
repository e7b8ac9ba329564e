"""Recurrent cells: the reference and the kernels (interpreted, or on a GPU) equal their papers' equations in fp64."""

import pytest
import torch

from seqpar.ops import choice
from seqpar.ops.recurrent_cell import KINDS, recur, selfcheck, tiles
from tests.layers.oracles.oracles_recurrent import CELLS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(not choice.has_triton(), reason="needs triton")),
]
SIZES = ((5, 2, 3, 2), (20, 17, 2, 1))  # dim, rows, steps, heads: one slice and two, one program and two


def equations(kind, driven, matrix, inside, *state):
    """Token by token and head by head. The oracle's sLSTM has no ``m``: its states are ``exp(m)`` times ours, and what
    is new (``n == 0``) is a constant."""
    cell, dim = CELLS[kind][0], matrix.shape[2]
    if kind == "slstm":
        h, c, n, m = state
        c, n = (torch.where(state[2] == 0, x.detach(), x) for x in (c, n))
        state = (h, c * m.exp(), n * m.exp())
    outs = []
    zero = driven.new_zeros(dim)
    for of_token in driven.unbind(1):
        heads = []
        for head, weights in enumerate(matrix):
            gates, mine = list(of_token[:, head].split(dim, -1)), [x[:, head] for x in state]
            bias = [zero] * len(gates) + ([] if inside is None else [inside[head]])
            heads.append(cell(gates, list((mine[0] @ weights.T).split(dim, -1)), bias, mine))
        state = tuple(torch.stack(of_heads, 1) for of_heads in zip(*heads))
        outs.append(state[0])
    return torch.stack(outs, 1), state


def results(kind, given, upstream, run):
    """Rows, final states, gradients of all that is given; states of an sLSTM without ``m``."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in given]
    rows, final = run(kind, *leaves)
    if kind == "slstm" and len(final) == 4:
        final = (final[0], final[1] * final[3].exp(), final[2] * final[3].exp())
    ends = [rows, *final]
    found = torch.autograd.grad(ends, [x for x in leaves if x is not None], upstream[: len(ends)])
    return [x.detach().double().cpu() for x in (*ends, *found)]


def errors(kind, impl, size, dtype=torch.float64, change=None):
    """Relative ones of all results, for inputs of ``dtype``."""
    dim, *sizes = size
    given, upstream = selfcheck.problem(kind, dim, DEVICE, dtype, *sizes)
    given = given if change is None else change(given)
    exact = results(kind, [None if x is None else x.double() for x in given], [x.double() for x in upstream], equations)
    mine = results(kind, given, upstream, lambda *args: recur(args[0], *args[1:4], args[4:], impl=impl))
    return [float((x - y).norm() / y.norm()) for x, y in zip(mine, exact, strict=True)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_states_and_gradients_are_those_of_the_equations(impl, kind, size):
    assert max(errors(kind, impl, size)) < 1e-13


@pytest.mark.skipif(not choice.has_triton(), reason="needs triton")
@pytest.mark.parametrize(("kind", "dim"), [("slstm", 5), ("lstm", 48)])
def test_kernels_are_the_reference(kind, dim, monkeypatch):
    """With a gradient of the last ``m`` itself, too; and with a dim that is not a power of two."""
    monkeypatch.setattr(selfcheck, "SIZES", (2, 2, 1))
    assert selfcheck.error(kind, dim, DEVICE, torch.float64) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_narrow_matrix_does_not_round_what_it_meets(impl, kind):
    """Gradients of the matrix and of the tokens alone are rounded to bf16, once."""
    found = errors(kind, impl, (16, 2, 3, 2), torch.bfloat16)
    ends = 1 + min(KINDS[kind].states, 3)
    assert max(found[ends : ends + 2]) < 4e-3
    assert max([*found[:ends], *found[ends + 2 :]]) < 4e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_may_be_large(impl):
    """The gradient of ``m`` is what is left of large numbers that cancel."""

    def loud(given):
        return [given[0] * 30, *given[1:]]

    for kind in ("lstm", "slstm"):
        found = errors(kind, impl, (5, 2, 4, 1), change=loud)
        assert max(found[:3]) < 1e-13 and max(found) < 1e-9


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_kept_where_nothing_is_learnt_and_no_step_is_a_step(impl):
    given, _ = selfcheck.problem("lstm", 5, DEVICE, torch.float32, 2, 3, 2)
    driven, matrix, inside, *state = given
    rows, final = recur("lstm", driven, matrix, inside, state, impl=impl)
    again, end = recur("lstm", driven.requires_grad_(), matrix, inside, state, impl=impl)
    assert torch.equal(rows, again) and all(torch.equal(x, y) for x, y in zip(final, end))
    assert rows.grad_fn is None and again.grad_fn is not None
    nothing, same = recur("lstm", driven[:, :0], matrix, inside, state, impl=impl)
    assert nothing.shape == (2, 0, 2, 5) and all(torch.equal(x, y) for x, y in zip(same, state))
    none, _ = recur("lstm", driven[:0], matrix, inside, [x[:0] for x in state], impl=impl)
    assert none.shape == (0, 3, 2, 5)


def test_every_architecture_has_tiles_for_every_dim():
    for architecture in ("cpu", "sm_80", "sm_90", "gfx942", "sm_120"):
        for dim in range(tiles.MULTIPLE, tiles.LARGEST_DIM + 1, tiles.MULTIPLE):
            for bytes_ in (2, 4):
                tile = tiles.tile_of(architecture, bytes_, dim)
                assert tiles.width_of(dim) % min(tile.slice, tiles.width_of(dim)) == 0 and tile.slice >= 16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "rnn"}, "a recurrent cell is one of elman, gru, lstm, slstm, got 'rnn'"),
        ({"kind": "gru"}, "gru has 3 gates: driven must be"),
        ({"driven": torch.zeros(2, 3, 20)}, r"driven must be \[n, t, h, gates \* d\]"),
        ({"matrix": torch.zeros(1, 20, 5)}, "lstm has 4 gates: driven must be"),
        ({"state": [torch.zeros(2, 2, 5)]}, "the state of lstm is 2 tensors"),
        ({"inside": torch.zeros(2, 5)}, "for a gru, else None"),
        ({"impl": "cuda"}, "impl must be one of auto, reference, triton, got 'cuda'"),
    ],
)
def test_what_does_not_fit_raises(change, text):
    fine = {"kind": "lstm", "driven": torch.zeros(2, 3, 2, 20), "matrix": torch.zeros(2, 20, 5), "inside": None,
            "state": [torch.zeros(2, 2, 5)] * 2, "impl": "auto"}  # fmt: skip
    with pytest.raises(ValueError, match=text):
        recur(**{**fine, **change})


def test_the_kernels_do_not_take_large_heads():
    large = {"driven": torch.zeros(1, 1, 1, 129), "matrix": torch.zeros(1, 129, 129), "inside": None}
    with pytest.raises(ValueError, match="heads of up to 128, got 129"):
        recur("elman", **large, state=[torch.zeros(1, 1, 129)], impl="triton")
    assert recur("elman", **large, state=[torch.zeros(1, 1, 129)])[0].shape == (1, 1, 1, 129)
