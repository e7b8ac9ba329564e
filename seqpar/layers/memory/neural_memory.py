"""Memories that learn while they read: Titans, Miras (Moneta, Yaad, Memora) and ATLAS (OmegaNet, Atlas, Atlas++)."""

from itertools import pairwise
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here, streamed
from seqpar.layers.memory.deep import Loss
from seqpar.layers.memory.rules import Rule, Tokens
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut

Tensors = tuple[Tensor, ...]
FORGET, STEP, THIRD = -4.0, -2.0, 0.0  # biases of gates at first: little is forgotten, steps are small


class NeuralMemory(nn.Module):
    """A layer around a memory of any :class:`~seqpar.layers.memory.rules.Rule`.

    Queries, keys and values come out of one causal convolution of ``width`` tokens with silu; queries and keys are then
    of length one. Of each token and head: how much of the weights is forgotten, ``sigmoid(a)``, the step,
    ``sigmoid(t)``, and by the rule momentum, ``sigmoid(e)``, the length ``softplus`` up to which errors are squared, or
    how much each of a window's gradients counts, ``sigmoid``. What is read is divided by its root mean square head by
    head, times ``silu(gate(x))``, then ``out``. ``x [b, t, dim]`` my tokens, and so is the result.

    A memory of a head is a network of ``rule.depth`` matrices, ``expansion`` times as wide inside, added to its input;
    of one matrix it is that. ``channel_gates``: what is forgotten and the step are of each channel of the output, by
    matrices of so small a rank (the last matrix's rows have their channel's, those of the others the mean), token by
    token: there is no closed form (0: one of each head). Weights, momentum and the weights at the chunk's start travel,
    in fp32, and ``width - 1`` rows before the convolution. Every document starts with learned weights, and so do its
    chunks. Steps begin so small that a chunk of equal keys, all of whose gradients are taken at one place, goes down
    and not up again: larger ones end in NaN. States are kept every so many chunks, and what lies between is computed
    again in backward.
    """

    own_initialisation = ("gates",)

    def __init__(
        self, dim: int, heads: int, rule: Rule, *, width: int = 4, expansion: int = 4, channel_gates: int = 0
    ) -> None:
        super().__init__()
        one = head_dim(dim, heads, None)
        if rule.gated and (rule.depth != 3 or rule.normed):
            raise ValueError(f"a gated memory has three matrices and no norm, got depth={rule.depth}")
        positive(width=width, expansion=expansion, chunk=rule.chunk, depth=rule.depth, window=rule.window)
        self.rule, self.heads = rule, heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * dim, width).uniform_(-(width**-0.5), width**-0.5))
        third = int(rule.momentum or rule.muon) + int(rule.loss.kind == "huber")
        each = one if channel_gates else 1
        self.counts = [each, each, third, rule.window if rule.window > 1 else 0]
        self.gates: nn.Module = nn.Linear(channel_gates or dim, heads * sum(self.counts))
        step = min(STEP, -log(2 * rule.chunk * rule.window)) if not rule.muon else STEP
        start = torch.tensor([*[FORGET] * each, *[step] * each, *[THIRD] * (third + self.counts[-1])])
        self.gates.bias.data.copy_(start.repeat(heads))
        if channel_gates:
            positive(channel_gates=channel_gates)
            if rule.retention == "softmax":
                raise ValueError("one softmax over all entries needs one gate of each head: no channel_gates here")
            self.gates = nn.Sequential(nn.Linear(dim, channel_gates, bias=False), self.gates)
        sizes = [(one, expansion * one)] * 2 + [(expansion * one, one)]
        if not rule.gated:
            sizes = list(pairwise([one, *[expansion * one] * (rule.depth - 1), one]))
        self.weights = nn.ParameterList(torch.randn(heads, after, before) * before**-0.5 for before, after in sizes)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = RMSNorm(one)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, 3 dim]``, and the gates ``[b, t, h, gates]`` before their functions."""
        return self.qkv(x), self.gates(x).unflatten(-1, (self.heads, -1))

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the memory: ``[b, t, h, d]``."""
        here = Here.of(cut, self)
        convolved = here.causal_conv(parts[0], self.conv_weight)
        start = self.rule.start(tuple(self.weights))
        return streamed(here, self._cell, (), (convolved, parts[1]), start, chunk=self.rule.chunk)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Normed, gated and put together, token by token."""
        return self.out(self.norm(o).flatten(-2) * functional.silu(self.gate(x)))

    def _cell(self, params: Tensors, rows: Tensors, state: Tensors, place: int) -> tuple[Tensor, Tensors]:
        return self.rule(self.tokens(*rows), state, place)

    def tokens(self, convolved: Tensor, gates: Tensor) -> Tokens:
        """Of one or more chunks, ``[n, h, c, ...]``, in the dtype they come in."""
        heads = functional.silu(convolved).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.transpose(1, 3).unbind(2)
        forget, step, third, gamma = gates.transpose(1, 2).split(self.counts, -1)
        log_momentum = functional.logsigmoid(third[..., 0]) if self.rule.momentum or self.rule.muon else None
        return Tokens(
            functional.normalize(q, dim=-1, eps=1e-6),
            functional.normalize(k, dim=-1, eps=1e-6),
            v,
            functional.logsigmoid(-(forget if self.counts[0] > 1 else forget[..., 0])),
            (step if self.counts[1] > 1 else step[..., 0]).sigmoid(),
            log_momentum,
            functional.softplus(third[..., -1]) if self.rule.loss.kind == "huber" else None,
            gamma.sigmoid() if self.rule.window > 1 else None,
        )


def titans(dim: int, heads: int, *, chunk: int = 64, depth: int = 2, closed: bool = True) -> NeuralMemory:
    """Titans' memory (Behrouz et al. 2024, arXiv 2501.00663): ``S = eta S - theta U``, ``W = (1 - a) W + S``."""
    return NeuralMemory(dim, heads, Rule(chunk, depth, momentum=True, closed=closed))


def moneta(
    dim: int, heads: int, *, chunk: int = 64, power: float = 3.0, norm: float = 4.0, channel_gates: int = 0
) -> NeuralMemory:
    """Moneta (Behrouz et al. 2025, arXiv 2504.13173): errors to a ``power``, weights by their ``norm``."""
    loss = Loss("lp", power)
    return NeuralMemory(
        dim, heads, Rule(chunk, 2, loss, normed=True, retention="norm", norm_power=norm), channel_gates=channel_gates
    )


def yaad(dim: int, heads: int, *, chunk: int = 64, closed: bool = True, channel_gates: int = 0) -> NeuralMemory:
    """Yaad (arXiv 2504.13173): errors squared up to a length that tokens say, absolute beyond it."""
    rule = Rule(chunk, 2, Loss("huber"), normed=True, closed=closed)
    return NeuralMemory(dim, heads, rule, channel_gates=channel_gates)


def memora(dim: int, heads: int, *, chunk: int = 64) -> NeuralMemory:
    """Memora (arXiv 2504.13173): positive weights of a fixed sum, read exactly, token by token."""
    return NeuralMemory(dim, heads, Rule(chunk, 2, normed=True, retention="softmax"))


def omeganet(dim: int, heads: int, *, chunk: int = 64, window: int = 16, closed: bool = True) -> NeuralMemory:
    """OmegaNet (Behrouz et al. 2025, arXiv 2505.23735): every step goes down the losses of a window of tokens."""
    return NeuralMemory(dim, heads, Rule(chunk, 2, window=window, closed=closed))


def atlas(dim: int, heads: int, *, chunk: int = 64, window: int = 16) -> NeuralMemory:
    """Atlas (arXiv 2505.23735): OmegaNet with momentum, made orthogonal for every token (Muon)."""
    return NeuralMemory(dim, heads, Rule(chunk, 2, window=window, muon=True))


def atlas_plus(
    dim: int, heads: int, *, chunk: int = 64, window: int = 16, muon: bool = True, closed: bool = True
) -> NeuralMemory:
    """Atlas++ (arXiv 2505.23735): Atlas with a memory that has a gate inside, ``x + W1 (gelu(W2 x) * W3 x)``; without
    ``muon`` OmegaNet with that memory."""
    return NeuralMemory(dim, heads, Rule(chunk, 3, gated=True, window=window, muon=muon, closed=closed))


def deep_linear(dim: int, heads: int, *, chunk: int = 64, window: int = 1, depth: int = 2) -> NeuralMemory:
    """DLA, deep linear attention (arXiv 2505.23735): the loss is minus the product with the value."""
    return NeuralMemory(dim, heads, Rule(chunk, depth, Loss("dot"), window=window))
