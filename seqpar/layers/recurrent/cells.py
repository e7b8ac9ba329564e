"""The cells of FlashRNN (Poeppel et al. 2024, arXiv 2412.07752): Elman, GRU, LSTM and sLSTM, with heads.

Each gate of a head reads the token and the head's own last output: ``g_t = inner x_t + matrix h_{t-1} + bias``. On a
GPU all heads run in one kernel (:mod:`seqpar.ops.recurrent_cell`), if there are several and they fit. Else the first
three are torch's fused ones, a call per head, so that a GPU's or a CPU's library runs all steps of a stretch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.ops.recurrent_cell import KINDS as OPS
from seqpar.ops.recurrent_cell import recur, uses_kernel

Tensors = tuple[Tensor, ...]
Cell = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]


@dataclass(frozen=True)
class Kind:
    """A cell by its ``name``; how many gates and biases it has, and how many numbers per channel its state.

    ``params`` are ``inner [heads, gates * d, dim]``, ``matrix [heads, gates * d, d]`` and ``bias [heads, biases * d]``,
    ``rows`` tokens ``[n, steps, dim]`` (or of each head ``[n, steps, heads, dim]``), the state's tensors
    ``[n, heads, d]``, the first of them the output. ``by_torch``: torch's fused form of it, if there is one.
    """

    name: str
    biases: int
    by_torch: Cell | None

    @property
    def gates(self) -> int:
        return OPS[self.name].gates

    @property
    def states(self) -> int:
        return OPS[self.name].states

    def cell(
        self, params: Tensors, rows: Tensors, state: Tensors, *, impl: str = "auto", narrow: bool = False
    ) -> tuple[Tensor, Tensors]:
        """Some steps; ``narrow``: the numbers of ``matrix`` fit into bf16."""
        inner, matrix, bias = params
        kernel = uses_kernel(impl, rows[0], matrix.shape[2]) and not (
            impl == "auto" and self.by_torch and len(inner) == 1
        )
        if self.by_torch is not None and not kernel:
            return self.by_torch(params, rows, state)
        width = matrix.shape[1]
        added, inside = (bias[:, :width], bias[:, width:]) if self.biases > self.gates else (bias, None)
        return recur(self.name, _driven(rows[0], inner) + added, matrix, inside, state, narrow=narrow, impl=impl)


def _driven(x: Tensor, inner: Tensor) -> Tensor:
    """What tokens add to the gates, ``[n, t, h, gates * d]``; laid out a step after the other, as kernels read it."""
    x = x.transpose(0, 1)
    if x.dim() == 3:
        return functional.linear(x, inner.flatten(0, 1)).unflatten(-1, inner.shape[:2]).transpose(0, 1)
    return torch.einsum("tnhd,hgd->tnhg", x, inner).transpose(0, 1)


def _per_head(
    run: Callable[[Tensor, Tensors, list[Tensor]], tuple[Tensor, ...]],
    split: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Cell:
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


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "elman": Kind("elman", 1, _per_head(_elman, _one_bias)),
        "gru": Kind("gru", 4, _per_head(_gru, _gru_biases)),
        "lstm": Kind("lstm", 4, _per_head(_lstm, _one_bias)),
        "slstm": Kind("slstm", 4, None),
    }
)
