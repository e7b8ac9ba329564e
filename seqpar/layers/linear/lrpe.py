"""Linearised relative position encoding, cosine form (Qin et al. 2023, arXiv 2307.09270, 2307.14995)."""

import math

import torch
from torch import Tensor


def lrpe_angles(heads: int, key_dim: int, base: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """``theta [heads, key_dim]`` in fp64: ``base**(-2 j / n)`` for each of the ``n = heads * key_dim`` channels ``j``.

    The channels of all heads are counted through, so each head has angles of its own, and the later ones turn slowly.
    """
    channels = torch.arange(heads * key_dim, dtype=torch.float64, device=device)
    return (base ** (-2 * channels / (heads * key_dim))).view(heads, key_dim)


def lrpe(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """``[x cos(theta s), x sin(theta s)]`` for the token at position ``s``: twice as many channels.

    Law: the product of an encoded query and key is ``sum_j q_j k_j cos(theta_j (s - t))``; it depends on the distance
    of the two, not on where they are. Positions are those in the document and do not depend on how the sequence is cut.

    Shapes: ``x [b, t, h, k]``, ``positions [t]``, ``theta [h, k]``, which may be learned; returns ``[b, t, h, 2 k]`` in
    the dtype of ``x``. The gradient of a learned ``theta`` is a difference of terms that grow with the position: in
    half precision it is mostly noise beyond some thousand tokens.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    # In fp64, then less than one turn: at position 1e6 a product in fp32 is off by up to 0.03 radian.
    turns = positions.to(x.device).double()[..., None, None] * theta.double()
    angles = (turns % (2 * math.pi)).to(exact)
    x_exact = x.to(exact)
    return torch.cat([x_exact * angles.cos(), x_exact * angles.sin()], -1).to(x.dtype)
