"""The delta rule, token by token, in the dtype of the inputs: the meaning that the fast code is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracles.recurrence import per_channel


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    starts: Sequence[int] = (),
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S = exp(log_decay) S``, then ``S = S + beta k (v - k' S)'``, ``o = scale q' S``; autograd gives the gradients.

    The state is zero before each token of ``starts``. Returns o and the state after the last token.
    """
    b, t, h, _ = q.shape
    gates = per_channel(log_decay, q).exp()[..., None].unbind(1)
    state = q.new_zeros(b, h, q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for i in range(t):
        state = torch.zeros_like(state) if i in starts else gates[i] * state
        error = v[:, i] - torch.einsum("bhk,bhkv->bhv", k[:, i], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, i], beta[:, i, :, None] * error)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, i], state))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state
