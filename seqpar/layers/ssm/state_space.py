"""What state-space layers share: the first step sizes, and a continuous system held from one token to the next."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def log_steps(shape: int | Sequence[int], low: float = 1e-3, high: float = 0.1) -> Tensor:
    """Logarithms of step sizes from ``low`` to ``high``, evenly spread (S4, arXiv 2111.00396)."""
    return torch.empty(shape).uniform_(math.log(low), math.log(high))


def exact_dtype(x: Tensor) -> torch.dtype:
    """What gates, decays and states are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def held(log_rate: Tensor, frequency: Tensor, log_step: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``h' = a h + u`` with ``a = -exp(log_rate) + i frequency``, sampled with a zero-order hold.

    Returns ``log_a``, the logarithm of what a step of ``exp(log_step)`` multiplies the state by (its real part is at
    most 0), and ``(exp(log_a) - 1) / a``, what the step multiplies the input by. All of one shape; complex, in fp32 or
    fp64 as ``dtype`` says.
    """
    rate = torch.complex(-log_rate.to(dtype).exp(), frequency.to(dtype))
    log_a = rate * log_step.to(dtype).exp()
    # exp(z) - 1 = 2 exp(z / 2) sinh(z / 2): a small step loses no digits.
    return log_a, 2 * (log_a / 2).exp() * torch.sinh(log_a / 2) / rate


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS, which keeps the past as Legendre coefficients (arXiv 2008.07669): A ``[size, size]`` and B ``[size]``
    of ``h' = A h + B u``, in fp64."""
    numbers = torch.arange(size, dtype=torch.float64)
    roots = (2 * numbers + 1).sqrt()
    return -torch.outer(roots, roots).tril(-1) - torch.diag(numbers + 1), roots


def bilinear(a: Tensor, b: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """``h' = a h + b u`` with ``a [h, n, n]`` and ``b [h, n]``, sampled by the bilinear (Tustin's) rule.

    ``step [h]``. Returns what a step multiplies the state and the input by, of the same shapes.
    """
    half = step[:, None, None] / 2 * a
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    found = torch.linalg.solve(one - half, torch.cat([one + half, (step[:, None] * b)[..., None]], -1))
    return found[..., :-1], found[..., -1]


def hold(a: Tensor, b: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a zero-order hold: ``exp(step a)`` and ``integral from 0 to step of exp(s a) b ds``."""
    both = torch.cat([a, b[..., None]], -1) * step[:, None, None]
    found = torch.linalg.matrix_exp(functional.pad(both, (0, 0, 0, 1)))
    return found[..., :-1, :-1], found[..., :-1, -1]
