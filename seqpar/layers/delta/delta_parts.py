"""What layers with a delta rule share: keys of length one, how much a token writes, and how fast it all decays."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.ssm.state_space import exact_dtype, log_steps


class Heads(NamedTuple):
    """The sizes of a delta rule: ``keys`` heads of queries and keys, shared by ``values`` heads of values."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Of queries, keys and values together, as they come out of one projection."""
        return 2 * self.keys * self.key_dim + self.values * self.value_dim

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of length one and values, ``[..., heads, dim]``, out of silu; each value head gets the
        queries and keys of its group."""
        widths = [self.keys * self.key_dim] * 2 + [self.values * self.value_dim]
        q, k, v = functional.silu(qkv).split(widths, -1)
        share = self.values // self.keys
        q, k = (unit_length(y.unflatten(-1, (self.keys, -1))).repeat_interleave(share, -2) for y in (q, k))
        return q, k, v.unflatten(-1, (self.values, -1))


def delta_mix(
    here: Here, heads: Heads, qkv: Tensor, conv_weight: Tensor, beta: Tensor, log_decay: Tensor | None
) -> Tensor:
    """All that mixes tokens: the short convolution with silu, and the delta rule of its keys; ``o [b, t, h, v]``."""
    q, k, v = heads.split(here.causal_conv(qkv, conv_weight))
    return here.delta_rule(q, k, v, beta, log_decay=log_decay, scale=heads.key_dim**-0.5)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum x^2 + eps)`` over the last dim, computed in fp32 (fp64 for fp64).

    A delta rule with steps up to 2 then never makes a state larger, however many tokens pass.
    """
    exact = x.to(exact_dtype(x))
    return (exact * (exact.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def write_strength(logits: Tensor, negative_eigenvalues: bool) -> Tensor:
    """``beta``: how much of the old value under its key a token replaces, 0 to 1, in fp32 (fp64 for fp64).

    ``negative_eigenvalues``: 0 to 2, so that a token may flip the sign of what is there (arXiv 2411.12537).
    """
    beta = logits.to(exact_dtype(logits)).sigmoid()
    return 2 * beta if negative_eigenvalues else beta


def softplus_log_decay(logits: Tensor, log_a: Tensor, dt_bias: Tensor) -> Tensor:
    """``-exp(log_a) softplus(logits + dt_bias)``, in fp32 (fp64 for fp64): Mamba's decay."""
    exact = exact_dtype(logits)
    return -log_a.to(exact).exp() * functional.softplus(logits.to(exact) + dt_bias.to(exact))


def conv_weight(channels: int, width: int) -> nn.Parameter:
    """``[channels, width]``, as torch initialises such a convolution."""
    return nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))


def log_rates(heads: int) -> nn.Parameter:
    """``log_a [heads]``: rates evenly from 0 to 16 (none of them 0, whose logarithm could not be learned)."""
    return nn.Parameter(torch.empty(heads).uniform_(0, 16).clamp(min=1e-3).log())


def step_bias(count: int) -> nn.Parameter:
    """``dt_bias [count]``, whose softplus is a step from 0.001 to 0.1, evenly in its logarithm."""
    steps = log_steps(count).exp().clamp(min=1e-4)
    return nn.Parameter(steps + (-torch.expm1(-steps)).log())
