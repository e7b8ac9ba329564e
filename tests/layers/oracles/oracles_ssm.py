"""Mamba, S4D, S5, RG-LRU and Birdie's gated model once more, token by token in fp64, from their papers' equations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.layers.oracles.oracles_decay import documents, stacked, swish


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def convolved(layer: nn.Module, rows: Tensor, t: int, start: int) -> Tensor:
    """The causal convolution of ``rows [b, t, d]`` at ``t``, of a document that starts at ``start``."""
    total = layer.conv_bias
    for back, weight in enumerate(reversed(layer.conv_weight.unbind(1))):
        if t - back >= start:
            total = total + weight * rows[:, t - back]
    return total


# --- Mamba -----------------------------------------------------------------------------------------------------------


def mamba_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each of the ``state_dim`` states of every channel by itself."""
    rank, size = layer.dt.in_features, layer.log_a.shape[1]
    read, z, rows = x @ layer.inner.weight.T, x @ layer.gate.weight.T, []
    for document in documents(lengths):
        states: list[Tensor | float] = [0.0] * size
        for t in document:
            u = swish(convolved(layer, read, t, document.start))
            chosen = u @ layer.selection.weight.T
            dt = (1 + (chosen[:, :rank] @ layer.dt.weight.T + layer.dt_bias).exp()).log()
            y = layer.skip * u
            for n in range(size):
                b, c = chosen[:, rank + n, None], chosen[:, rank + size + n, None]
                states[n] = (-dt * layer.log_a[:, n].exp()).exp() * states[n] + dt * b * u
                y = y + c * states[n]
            rows.append((y * swish(z[:, t])) @ layer.out.weight.T)
    return stacked(rows, x)


# --- S4D -------------------------------------------------------------------------------------------------------------


def s4d_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The convolution with its kernel, which is computed for every distance; no state."""
    rate = torch.complex(-layer.log_rate.exp(), layer.frequency)
    step = layer.log_step.exp()[:, None]
    c = torch.complex(layer.c[..., 0], layer.c[..., 1])
    weight = c * ((rate * step).exp() - 1) / rate
    kernel = [2 * (weight * (rate * step * t).exp()).sum(-1).real for t in range(max(lengths))]
    rows = []
    for document in documents(lengths):
        for t in document:
            y = layer.skip * x[:, t]
            for s in range(document.start, t + 1):
                y = y + kernel[t - s] * x[:, s]
            value, gate = (gelu(y) @ layer.out.weight.T + layer.out.bias).chunk(2, -1)
            rows.append(value * sigmoid(gate))
    return stacked(rows, x)


# --- S5 --------------------------------------------------------------------------------------------------------------


def s5_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """All states, the conjugates, too, so that the sum over them is real by itself."""
    rate = with_conjugates(torch.complex(-layer.log_rate.exp(), layer.frequency), 0)
    step = layer.log_step.exp().repeat(2)
    b = with_conjugates(torch.complex(layer.b[:, 0], layer.b[:, 1]), 0)
    c = with_conjugates(torch.complex(layer.c[..., 0], layer.c[..., 1]), 1)
    kept, rows = (rate * step).exp(), []
    for document in documents(lengths):
        state: Tensor | float = 0.0
        for t in document:
            state = kept * state + (kept - 1) / rate * (x[:, t].to(b.dtype) @ b.T)
            y = state @ c.T
            assert y.imag.abs().max() < 1e-12
            y = gelu(y.real + layer.skip * x[:, t])
            rows.append(y * sigmoid(y @ layer.gate.weight.T + layer.gate.bias))
    return stacked(rows, x)


def with_conjugates(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x.conj()], dim)


# --- RG-LRU ----------------------------------------------------------------------------------------------------------


def rg_lru_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """One block of channels after another."""
    read, gate, rows = x @ layer.inner.weight.T, x @ layer.gate.weight.T, []
    for document in documents(lengths):
        state: Tensor | float = 0.0
        for t in document:
            u = convolved(layer, read, t, document.start)
            a, i = rg_lru_gates(layer, u)
            state = a * state + (1 - a**2).sqrt() * i * u
            rows.append((state * gelu(gate[:, t])) @ layer.out.weight.T)
    return stacked(rows, x)


def rg_lru_gates(layer: nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``i``, each ``[b, d]``."""
    recurrence, inputs = [], []
    for block, weight, bias in zip(u.chunk(layer.heads, -1), layer.gates, layer.gates_bias):
        r, i = sigmoid(block @ weight + bias).chunk(2, -1)
        recurrence.append(r)
        inputs.append(i)
    return sigmoid(layer.decay) ** (8 * torch.cat(recurrence, -1)), torch.cat(inputs, -1)


# --- Birdie ----------------------------------------------------------------------------------------------------------


def gated_ssm_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], prefix: Sequence[int] = ()) -> Tensor:
    """``prefix``: how many tokens of each document are read both ways; empty: the whole state goes forward."""
    inputs = sigmoid(x @ layer.input.weight.T) * (x @ layer.z.weight.T)
    forget = sigmoid(x @ layer.forget.weight.T + layer.forget_bias)
    half = inputs.shape[2] // 2 if prefix else inputs.shape[2]
    rows: list[Tensor] = []
    for number, document in enumerate(documents(lengths)):
        ahead: dict[int, Tensor | float] = {document.start - 1: 0.0}
        back: dict[int, Tensor | float] = {document.stop: 0.0}
        for t in document:
            ahead[t] = forget[:, t, :half] * ahead[t - 1] + inputs[:, t, :half]
        for t in reversed(document):
            in_prefix = bool(prefix) and t - document.start < prefix[number]
            back[t] = inputs[:, t, half:] + (forget[:, t, half:] * back[t + 1] if in_prefix else 0.0)
        for t in document:
            state = torch.cat([torch.as_tensor(ahead[t]), torch.as_tensor(back[t])], -1)
            rows.append((state * gelu(x[:, t] @ layer.output.weight.T)) @ layer.out.weight.T)
    return stacked(rows, x)


def first_tokens(layer: nn.Module, x: Tensor, lengths: Sequence[int], count: int) -> Tensor:
    """The same with a prefix of ``count`` tokens in every document."""
    return gated_ssm_layer(layer, x, lengths, [count] * len(lengths))
