"""Linear recurrences, token by token, in the dtype of the inputs: the meaning that the fast code is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def per_channel(log_decay: Tensor | None, q: Tensor) -> Tensor:
    """The log decay of every token and key channel, [b, t, h, k], from any of the four kinds."""
    if log_decay is None:
        return torch.zeros_like(q)
    if log_decay.dim() == 1:
        return log_decay[None, None, :, None].expand_as(q)
    if log_decay.dim() == 3:
        return log_decay[..., None].expand_as(q)
    return log_decay


def decayed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    lengths: Sequence[int] | None = None,
    continues: bool = True,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S = exp(log_decay) S + k v'`` and ``o = scale q S`` for one token after another; autograd gives the gradients.

    ``lengths`` are those of the documents that fill the t tokens; the state is zero before the first token of each.
    The first one continues from ``initial_state`` if ``continues``, else it starts afresh too. Returns o and the state
    after the last document.
    """
    b, t, h, _ = q.shape
    lengths = [t] if lengths is None else lengths
    assert sum(lengths) == t
    starts = [sum(lengths[:i]) for i in range(len(lengths))][int(continues) :]
    gates = per_channel(log_decay, q).exp()[..., None].unbind(1)
    queries, keys, values = q.unbind(1), k[..., None].unbind(1), v[..., None, :].unbind(1)
    state = q.new_zeros(b, h, q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for i in range(t):
        if i in starts:
            state = torch.zeros_like(state)
        state = gates[i] * state + keys[i] * values[i]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", queries[i], state))
    if t in starts:  # the last document is empty
        state = torch.zeros_like(state)
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state
