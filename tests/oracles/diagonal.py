"""Elementwise recurrences, token by token, in the dtype of the inputs: what the fast code is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def diagonal_scan(
    log_a: Tensor, x: Tensor, *, starts: Sequence[int] = (), initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``h = exp(log_a) h + x`` for one token after another; autograd gives the gradients.

    ``log_a`` is [b, t, d], or [d] for all tokens; the state [b, d] is zero before each token of ``starts``. Returns all
    h and the last one.
    """
    state = torch.zeros_like(x[:, :0].sum(1)) if initial_state is None else initial_state
    decays, outputs = log_a.exp().expand(x.shape), []
    for i in range(x.shape[1]):
        state = x[:, i] if i in starts else decays[:, i] * state + x[:, i]
        outputs.append(state)
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x), state


def selective_scan(
    u: Tensor,
    delta: Tensor,
    keys: Tensor,
    queries: Tensor,
    rates: Tensor,
    *,
    starts: Sequence[int] = (),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = exp(delta A) h + delta u B'`` and ``y = h C`` for one token after another, with a state [b, d, n].

    ``keys`` and ``queries`` are B and C [b, t, n], ``rates`` is A [d, n]. Returns all y and the last h.
    """
    state = u.new_zeros(u.shape[0], *rates.shape) if initial_state is None else initial_state
    outputs = []
    for i in range(u.shape[1]):
        if i in starts:
            state = torch.zeros_like(state)
        state = torch.exp(delta[:, i, :, None] * rates) * state
        state = state + torch.einsum("bd,bn->bdn", delta[:, i] * u[:, i], keys[:, i])
        outputs.append(torch.einsum("bdn,bn->bd", state, queries[:, i]))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(u), state


def reversed_starts(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where documents start, counted from the last token, for a scan that goes from the last to the first."""
    rows, row = [], 0
    for length in reversed(lengths):
        if length:
            rows.append(row)
        row += length
    return tuple(rows)
