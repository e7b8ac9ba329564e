"""The kernels against the reference on a small problem: what ``impl="auto"`` asks where a compiler is in doubt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.ops.problems import random_tensors
from seqpar.ops.recurrent_cell import fused, reference
from seqpar.ops.selfcheck import relative_error

Run = Callable[..., tuple[Tensor, Any]]
DIMS = (64, 100)
SIZES = (20, 40, 2)  # rows, steps, heads


def check(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of rows, states and gradients of every cell; NaN if there is any."""
    errors = [error(kind, dim, device, dtype) for kind in reference.KINDS for dim in DIMS]
    return float(torch.tensor(errors, dtype=torch.float64).max())


def error(kind: str, dim: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of one cell, its tokens and its matrix of ``dtype``."""
    given, upstream = problem(kind, dim, device, dtype, *SIZES)
    exact = [None if x is None else x.double().cpu() for x in given]
    expected = results(kind, exact, [x.double().cpu() for x in upstream], reference.recur)
    found = results(kind, given, upstream, fused.recur)
    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    return float(torch.tensor(errors, dtype=torch.float64).max())


def problem(
    kind: str, dim: int, device: torch.device, dtype: torch.dtype, rows: int, steps: int, heads: int
) -> tuple[list[Tensor | None], list[Tensor]]:  # fmt: skip
    """``driven``, ``matrix``, ``inside`` and states that a cell may have come to; upstream gradients of all results."""
    cell, wide = reference.KINDS[kind], torch.float64 if dtype == torch.float64 else torch.float32
    driven, matrix, inside, *states = random_tensors(
        dim, (rows, steps, heads, cell.gates * dim), (heads, cell.gates * dim, dim), (heads, dim),
        *[(rows, heads, dim)] * 4,
    )  # fmt: skip
    h, c, n, m = states[0].tanh(), states[1], 1 + states[2].abs(), states[3]
    fresh = torch.arange(rows) % 3 == 1  # side by side with rows that go on
    entering = [torch.where(fresh[:, None, None], 0.0, x) for x in (h, c, n, m)][: cell.states]
    upstream = random_tensors(dim + 1, (rows, steps, heads, dim), *[(rows, heads, dim)] * cell.states)
    narrow = [driven.to(device, dtype), (matrix * dim**-0.5).to(device, dtype)]
    within = inside.to(device, wide) if kind == "gru" else None
    return [*narrow, within, *(x.to(device, wide) for x in entering)], [x.to(device, wide) for x in upstream]


def results(kind: str, given: Sequence[Tensor | None], upstream: Sequence[Tensor], run: Run) -> list[Tensor]:
    """Rows, final states, and the gradients of all that is given."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        driven, matrix, inside, *state = leaves
        assert driven is not None and matrix is not None
        rows, final = run(kind, driven, matrix, inside, [x for x in state if x is not None])
        ends = [rows, *final]
        found = torch.autograd.grad(ends, [x for x in leaves if x is not None], list(upstream))
    return [*(x.detach() for x in ends), *found]
