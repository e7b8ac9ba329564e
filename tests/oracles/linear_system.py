"""A linear time-invariant system, token by token, in the dtype of the inputs: what the fast code is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_system(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, *, starts: Sequence[int] = (), initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``h = a h + b u`` and ``y = c h`` for one token after another; autograd gives the gradients.

    ``u [b, t, h, v]``, ``a [h, n, n]``, ``b [h, n]``, ``c [h, q, n]``; the state [b, h, n, v] is zero before each token
    of ``starts``. Returns all y [b, t, h, q, v] and the last state.
    """
    state = u.new_zeros(u.shape[0], *b.shape, u.shape[3]) if initial_state is None else initial_state
    outputs = []
    for i in range(u.shape[1]):
        if i in starts:
            state = torch.zeros_like(state)
        state = a @ state + b[..., None] * u[:, i, :, None]
        outputs.append(c @ state)
    none = u.new_zeros(u.shape[0], 0, *c.shape[:2], u.shape[3])
    return torch.stack(outputs, 1) if outputs else none, state
