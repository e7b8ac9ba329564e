"""What keeps a state-space model from being stuffed by more tokens than it was trained on (Chen et al. 2024, Stuffed
Mamba, arXiv 2410.07145): a window by the difference of two states, and a bound for each."""

from functools import partial

import torch
from torch import Tensor

from seqpar.crossing.here import Here, streamed

Tensors = tuple[Tensor, ...]


def windowed(here: Here, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, window: int) -> Tensor:
    """What the last ``window`` tokens alone have put into the state, ``q_t (S_t - a_t..a_{t-window+1} S_{t-window})``.

    ``q``, ``k`` ``[b, t, h, k]``, ``v [b, t, h, v]``, ``log_decay [b, t, h]``; returns ``[b, t, h, v]`` in the dtype of
    ``log_decay``. Two linear attentions: the second reads keys, values and decays of the token ``window`` before. Two
    states travel, and those of ``window`` tokens.
    """
    exact = log_decay.dtype
    whole = here.linear_attention(q, k, v, log_decay=log_decay, out_dtype=exact)
    both = torch.cat([k.to(exact), v.to(exact), log_decay[..., None]], -1)
    rows, places = here.preceding(both.flatten(2), window, state="window")
    at, there = (places - window).clamp(min=0), (here.positions.to(q.device) >= window)[..., None, None]
    rows = rows.unflatten(-1, both.shape[2:])
    sums = torch.cat([rows.new_zeros(len(rows), 1, q.shape[2]).double(), rows[..., -1].double().cumsum(1)], 1)
    faded = (sums[:, places + 1] - sums[:, at + 1]).to(exact).exp()
    before = torch.where(there, rows[:, at], 0.0)
    old_k, old_v, old_decay = before.split([k.shape[-1], v.shape[-1], 1], -1)
    faded_q = torch.where(there, faded[..., None], 0.0) * q.to(exact)
    old = here.linear_attention(faded_q, old_k, old_v, log_decay=old_decay[..., 0], state="old state")
    return whole - old


def clipped(here: Here, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bound: float) -> Tensor:
    """The same recurrence with a state that is never longer than ``bound``: after every token it is scaled down to it,
    head by head (the released code multiplies by what it should divide by, and only every 128 tokens).

    Shapes are those of :func:`windowed`. It does not compose: the state itself travels, token by token.
    """
    exact = log_decay.dtype
    start = (q.new_zeros(q.shape[2], k.shape[-1], v.shape[-1], dtype=exact),)
    tokens = tuple(x.to(exact) for x in (q, k, v, log_decay))
    return streamed(here, partial(_clipped, bound=bound), (), tokens, start)


def _clipped(params: Tensors, rows: Tensors, state: Tensors, bound: float) -> tuple[Tensor, Tensors]:
    (s,), outs = state, []
    for q, k, v, log_decay in zip(*(x.unbind(1) for x in rows)):
        s = log_decay.exp()[..., None, None] * s + k[..., None] * v[..., None, :]
        length = s.square().sum((-1, -2), keepdim=True).clamp(min=1e-30).sqrt()
        s = torch.where(length > bound, s * (bound / length), s)
        outs.append((q[..., None, :] @ s)[..., 0, :])
    return torch.stack(outs, 1), (s,)
