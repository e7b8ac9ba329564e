"""Spiking neurons, and LMUFormer made of them (Liu et al. 2024, arXiv 2402.04882)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here, streamed
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.sequence_norm import SequenceBatchNorm
from seqpar.layers.ssm.lmu import LMU
from seqpar.layers.ssm.lmuformer import ConvPatchEmbedding
from seqpar.sharding.cut import Cut

Tensors = tuple[Tensor, ...]
SHARPNESS = 4.0  # of the sigmoid whose slope stands for that of a step


class LIF(nn.Module):
    """Leaky neurons that integrate and fire, one per channel: ``v += (x_t - v) / tau``; where ``v`` is at least
    ``threshold`` the output is 1 and ``v`` starts from 0 again, else the output is 0.

    The time is that of the tokens. The step has the slope of ``sigmoid(4 (v - threshold))`` in backward, where the
    restart counts as a constant. ``x [b, t, dim]`` my tokens, and so is the result. ``v`` travels, ``dim`` numbers in
    fp32 (fp64 for fp64), and is 0 where a document starts.
    """

    def __init__(self, dim: int, *, tau: float = 2.0, threshold: float = 1.0) -> None:
        super().__init__()
        positive(dim=dim)
        if not tau >= 1 or not threshold > 0:
            raise ValueError(f"tau must be at least 1 token and threshold above 0, got {tau} and {threshold}")
        self.dim, self.tau, self.threshold = dim, tau, threshold

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        return streamed(Here.of(cut, self), self.cell, (), (x,), (x.new_zeros(self.dim, dtype=exact),))

    def cell(self, params: Tensors, rows: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        """Some steps: the potentials ``v [n, dim]`` are the state."""
        (v,), spikes = state, []
        for x in rows[0].unbind(1):
            v = v + (x - v) / self.tau
            spike = _Step.apply(v - self.threshold)
            v = v * (1 - spike.detach())
            spikes.append(spike)
        return torch.stack(spikes, 1), (v,)


class _Step(torch.autograd.Function):
    """1 where ``u`` is not negative, with a slope; what is not a number stays so."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return torch.where(u.isnan(), u, (u >= 0).to(u.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        share = torch.sigmoid(SHARPNESS * u)
        return grads[0] * SHARPNESS * share * (1 - share)


class SpikingLMUFormer(nn.Module):
    """:class:`seqpar.layers.LMUFormer` with neurons (:class:`LIF`) for activations: after each batch norm, and at what
    goes into the memory and comes out of it, which itself stays real.

    ``embeds`` and the other arguments as there. ``x [b, t, dim]`` my tokens, and so is the result. Besides what crosses
    there, a potential per neuron does. Sources leave open whether the norm behind the memory spikes; here it does.
    """

    def __init__(self, dim: int, *, memory_dim: int | None = None, theta: float = 128.0, embeds: bool = True) -> None:
        super().__init__()
        self.embedding = ConvPatchEmbedding(dim) if embeds else None
        self.embedding_neurons = nn.ModuleList(LIF(dim) for _ in (self.embedding.norms if self.embedding else ()))
        self.lmu = LMU(dim, memory_dim=dim if memory_dim is None else memory_dim, theta=theta)
        self.into, self.out_of, self.after = LIF(1), LIF(dim), LIF(dim)
        self.out = nn.Linear(dim, dim, bias=False)  # the norm would take a bias away
        self.norm = SequenceBatchNorm(dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if self.embedding is None:
            return self._mixed(x, cut)
        here = Here.of(cut, self)
        *weights, positions = self.embedding.convs
        for weight, norm, neurons in zip(weights, self.embedding.norms, self.embedding_neurons):
            x = neurons(norm(here.symmetric_conv(x, weight), cut), cut)
        x = x + here.symmetric_conv(x, positions)
        return x + self._mixed(x, cut)

    def _mixed(self, x: Tensor, cut: Cut) -> Tensor:
        memory = self.lmu.mix((self.into(self.lmu.encode(x), cut),), cut)
        besides = functional.linear(x, self.lmu.out.weight[:, self.lmu.memory_dim :], self.lmu.out.bias)
        mixed: Tensor = self.after(self.norm(self.out(self.out_of(memory + besides, cut)), cut), cut)
        return mixed


class SpikingFFN(nn.Module):
    """The feed-forward part of spiking blocks, ``lif(norm(down(lif(norm(up(x))))))``; blocks add it to ``x``.

    Its norms are batch norms over all tokens. ``hidden`` is ``4 dim`` by default.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        positive(dim=dim, hidden=hidden)
        self.up, self.up_norm, self.up_neurons = (
            nn.Linear(dim, hidden, bias=False),
            SequenceBatchNorm(hidden),
            LIF(hidden),
        )
        self.down, self.down_norm, self.down_neurons = (
            nn.Linear(hidden, dim, bias=False),
            SequenceBatchNorm(dim),
            LIF(dim),
        )

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        inner = self.up_neurons(self.up_norm(self.up(x), cut), cut)
        outer: Tensor = self.down_neurons(self.down_norm(self.down(inner), cut), cut)
        return outer
