"""The cells of FlashRNN (Poeppel et al. 2024, arXiv 2412.07752): Elman, GRU, LSTM and sLSTM, with heads.

Each gate of a head reads the token and the head's own last output: ``g_t = inner x_t + matrix h_{t-1} + bias``. The
first three are torch's fused ones, a call per head, so that a GPU's or a CPU's library runs all steps of a stretch.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Tensors = tuple[Tensor, ...]


class Kind(NamedTuple):
    """How many gates and biases a cell has, how many numbers per channel its state, and the cell itself.

    ``cell(params, rows, state)``: ``params`` are ``inner [heads, gates * d, dim]``, ``matrix [heads, gates * d, d]``
    and ``bias [heads, biases * d]``, ``rows`` tokens ``[n, steps, dim]`` (or of each head ``[n, steps, heads, dim]``),
    the state's tensors ``[n, heads, d]``, the first of them the output.
    """

    gates: int
    biases: int
    states: int
    cell: Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]
    fused: bool


def _per_head(
    run: Callable[[Tensor, Tensors, list[Tensor]], tuple[Tensor, ...]],
    split: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]:
    """A cell of torch's fused recurrences: ``run(x, state, weights)`` of each head, ``split`` its biases in two."""

    def cell(params: Tensors, rows: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        outs, ends = [], []
        for head, (inner, matrix, bias) in enumerate(zip(*params)):
            entering = tuple(each[None, :, head].contiguous() for each in state)
            x = rows[0] if rows[0].dim() == 3 else rows[0][:, :, head]
            out, *end = run(x, entering, [inner, matrix, *split(bias, matrix.shape[1])])
            outs.append(out)
            ends.append([each[0] for each in end])
        return torch.stack(outs, 2), tuple(torch.stack(of_heads, 1) for of_heads in zip(*ends))

    return cell


def _one_bias(bias: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return bias, torch.zeros_like(bias)


def _gru_biases(bias: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The candidate has one inside of the reset gate, too."""
    return bias[: 3 * dim], torch.cat([torch.zeros_like(bias[: 2 * dim]), bias[3 * dim :]])


def _elman(x: Tensor, state: Tensors, weights: list[Tensor]) -> tuple[Tensor, ...]:
    fused: Any = torch.rnn_tanh
    found: tuple[Tensor, ...] = fused(x, state[0], weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return found


def _gru(x: Tensor, state: Tensors, weights: list[Tensor]) -> tuple[Tensor, ...]:
    fused: Any = torch.gru
    found: tuple[Tensor, ...] = fused(x, state[0], weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return found


def _lstm(x: Tensor, state: Tensors, weights: list[Tensor]) -> tuple[Tensor, ...]:
    fused: Any = torch.lstm
    found: tuple[Tensor, ...] = fused(x, state, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return found


def slstm(params: Tensors, rows: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
    """The LSTM with exponential gates (Beck et al. 2024, arXiv 2405.04517), step by step.

    Which element is new (``n == 0``) is decided for each by itself, so that no row of a batch and no document matters
    to another. ``m`` only keeps exponents small, but its gradient is carried like all others.
    """
    inner, matrix, bias = params
    heads, width, dim = matrix.shape
    if rows[0].dim() == 3:
        gates = functional.linear(rows[0], inner.flatten(0, 1)).unflatten(-1, (heads, width)) + bias
    else:
        gates = torch.einsum("nthd,hgd->nthg", rows[0], inner) + bias
    h, c, n, m = state
    outs = []
    for of_token in gates.unbind(1):
        recurrent = torch.einsum("nhd,hgd->nhg", h, matrix)
        i, f, z, o = (of_token + recurrent).split(dim, -1)
        new, faded = n == 0, functional.logsigmoid(f) + m
        stronger = torch.where(new, i, torch.maximum(i, faded))
        add = (i - stronger).exp()
        keep = torch.where(new, 0.0, torch.where(new, 0.0, faded - stronger).exp())
        c, n, m = keep * c + add * z.tanh(), (keep * n + add).clamp(min=1), stronger
        h = o.sigmoid() * c / n
        outs.append(h)
    return torch.stack(outs, 1), (h, c, n, m)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "elman": Kind(1, 1, 1, _per_head(_elman, _one_bias), True),
        "gru": Kind(3, 4, 1, _per_head(_gru, _gru_biases), True),
        "lstm": Kind(4, 4, 2, _per_head(_lstm, _one_bias), True),
        "slstm": Kind(4, 4, 4, slstm, False),
    }
)
