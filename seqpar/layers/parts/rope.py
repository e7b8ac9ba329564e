"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate pairs of channels of ``x`` by angles that grow with the position of each token.

    Law: the product of a rotated query and key depends on the distance of their positions only. Positions are those in
    the document (``cut.shard.positions``), so they start at 0 in each and do not depend on how the sequence is cut.

    Shapes: ``x [b, t, h, k]`` with an even ``k``; channel ``i`` is paired with ``i + k/2`` and turns by
    ``position * base**(-2 i / k)``. ``positions [t]``. Returns the dtype of ``x``.
    """
    cos, sin = _turns(positions.to(x.device), x.shape[-1], base)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(exact), sin.to(exact)
    first, second = x.to(exact).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _turns(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[t, 1, k/2]`` of the angles.

    In fp64: at position 1e6 a product in fp32 is off by up to 0.03 radian.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / -dim
    angles = positions.double()[:, None, None] * base**exponents
    return angles.cos(), angles.sin()
