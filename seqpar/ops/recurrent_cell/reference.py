"""The steps of Elman's network, GRU, LSTM and sLSTM with heads, in torch: what the kernels mean.

All gates of a token come driven, that is with what the token itself adds and with their biases; a step adds what the
head's own last output does. Gates stand in the order r, u, n (GRU; torch's) and i, f, z, o (LSTM, sLSTM).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, Tensor | None, Tensors], Tensors]


class Kind(NamedTuple):
    """How many gates a cell has, how many tensors its state, and ``step(driven, recurrent, inside, state)``, of which
    gates are ``[n, h, gates * d]`` and states ``[n, h, d]``, the output first."""

    gates: int
    states: int
    step: Step


def recur(
    kind: str, driven: Tensor, matrix: Tensor, inside: Tensor | None, state: Sequence[Tensor]
) -> tuple[Tensor, Tensors]:
    """Rows ``[n, t, h, d]`` and the state after them: see :func:`seqpar.ops.recurrent_cell.recur`."""
    step, now, outs = KINDS[kind].step, tuple(state), []
    for of_token in driven.to(now[0].dtype).unbind(1):
        recurrent = torch.einsum("nhd,hgd->nhg", now[0], matrix.to(now[0].dtype))
        now = step(of_token, recurrent, inside, now)
        outs.append(now[0])
    if not outs:
        return driven.new_empty((*driven.shape[:3], matrix.shape[2]), dtype=now[0].dtype), now
    return torch.stack(outs, 1), now


def elman(driven: Tensor, recurrent: Tensor, inside: Tensor | None, state: Tensors) -> Tensors:
    return (torch.tanh(driven + recurrent),)


def gru(driven: Tensor, recurrent: Tensor, inside: Tensor | None, state: Tensors) -> Tensors:
    """``inside``: the bias of the candidate that the reset gate scales, too."""
    assert inside is not None
    dim = inside.shape[-1]
    reset, keep = (driven + recurrent)[..., : 2 * dim].sigmoid().split(dim, -1)
    new = torch.tanh(driven[..., 2 * dim :] + reset * (recurrent[..., 2 * dim :] + inside))
    return (keep * state[0] + (1 - keep) * new,)


def lstm(driven: Tensor, recurrent: Tensor, inside: Tensor | None, state: Tensors) -> Tensors:
    i, f, z, o = (driven + recurrent).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * z.tanh()
    return o.sigmoid() * c.tanh(), c


def slstm(driven: Tensor, recurrent: Tensor, inside: Tensor | None, state: Tensors) -> Tensors:
    """The LSTM with exponential gates (Beck et al. 2024, arXiv 2405.04517).

    Which element is new (``n == 0``) is decided for each by itself, so that no row of a batch and no document matters
    to another. ``m`` only keeps exponents small, but its gradient is carried like all others.
    """
    i, f, z, o = (driven + recurrent).chunk(4, -1)
    _, c, n, m = state
    new, faded = n == 0, functional.logsigmoid(f) + m
    stronger = torch.where(new, i, torch.maximum(i, faded))
    add = (i - stronger).exp()
    keep = torch.where(new, 0.0, torch.where(new, 0.0, faded - stronger).exp())
    c, n = keep * c + add * z.tanh(), (keep * n + add).clamp(min=1)
    return o.sigmoid() * c / n, c, n, stronger


KINDS: Mapping[str, Kind] = MappingProxyType(
    {"elman": Kind(1, 1, elman), "gru": Kind(3, 1, gru), "lstm": Kind(4, 2, lstm), "slstm": Kind(4, 4, slstm)}
)
