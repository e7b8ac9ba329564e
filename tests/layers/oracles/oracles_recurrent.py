"""Recurrent networks once more, token by token in fp64, from their papers' equations."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tests.layers.oracles.oracles_lti import batch_norm, centred_conv, legendre, systems


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def tanh(x: Tensor) -> Tensor:
    return 2 * sigmoid(2 * x) - 1


def gates_of(layer: nn.Module, way: int, head: int, x: Tensor, h: Tensor) -> tuple[list[Tensor], list[Tensor], int]:
    """What the token and what the last output add to each gate of one head, and how wide it is."""
    inner, matrix = layer.inner[way, head], layer.matrix[way, head]
    wide = matrix.shape[1]
    return list((x @ inner.T).split(wide, -1)), list((h @ matrix.T).split(wide, -1)), wide


def elman(driven: list[Tensor], back: list[Tensor], bias: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    return [tanh(driven[0] + back[0] + bias[0])]


def gru(driven: list[Tensor], back: list[Tensor], bias: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    r, u = (sigmoid(driven[gate] + back[gate] + bias[gate]) for gate in (0, 1))
    new = tanh(driven[2] + bias[2] + r * (back[2] + bias[3]))
    return [u * state[0] + (1 - u) * new]


def lstm(driven: list[Tensor], back: list[Tensor], bias: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    i, f, z, o = (a + b + c for a, b, c in zip(driven, back, bias))
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(z)
    return [sigmoid(o) * tanh(c), c]


def slstm(driven: list[Tensor], back: list[Tensor], bias: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """Without ``m``, which is there for large exponents only: ``c = f c + exp(i) z``, ``n = f n + exp(i)``."""
    i, f, z, o = (a + b + c for a, b, c in zip(driven, back, bias))
    c = sigmoid(f) * state[1] + i.exp() * tanh(z)
    n = sigmoid(f) * state[2] + i.exp()
    return [sigmoid(o) * c / n, c, n]


CELLS = {"elman": (elman, 1), "gru": (gru, 1), "lstm": (lstm, 2), "slstm": (slstm, 3)}


def one_way(layer: nn.Module, x: Tensor, lengths: Sequence[int], kind: str, way: int) -> Tensor:
    """``[b, t, heads, d]``."""
    cell, states = CELLS[kind]
    rows: list[Tensor] = [x[:, 0]] * x.shape[1]
    wide = layer.matrix.shape[-1]
    for start, length in zip((0, *accumulate(lengths)), lengths):
        state = [[x.new_zeros(x.shape[0], wide)] * states for _ in range(layer.heads)]
        places = range(start, start + length)
        for t in reversed(places) if way else places:
            for head in range(layer.heads):
                driven, back, _ = gates_of(layer, way, head, x[:, t], state[head][0])
                state[head] = cell(driven, back, list(layer.bias[way, head].split(wide)), state[head])
            rows[t] = torch.stack([of_head[0] for of_head in state], 1)
    return torch.stack(rows, 1)


def recurrent_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], kind: str) -> Tensor:
    h = torch.cat([one_way(layer, x, lengths, kind, way) for way in range(len(layer.inner))], 2)
    if layer.norm is not None:
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    return h.flatten(-2) @ layer.out.weight.T


def leaky_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    cell, rows = layer.cell, []
    tau = 1 + (1 + cell.rate.exp()).log()
    for start, length in zip((0, *accumulate(lengths)), lengths):
        u = x.new_zeros(x.shape[0], len(tau))
        for t in range(start, start + length):
            driven = u @ cell.recurrent.T + x[:, t] @ cell.inner.T + cell.bias
            u = (1 - 1 / tau) * u + torch.where(driven > 0, driven, 0.01 * driven) / tau
            rows.append(u)
    return torch.stack(rows, 1)


def lif_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """A spike is a number without a gradient plus a sigmoid with one, less its value."""
    rows = []
    for start, length in zip((0, *accumulate(lengths)), lengths):
        v = torch.zeros_like(x[:, 0])
        for t in range(start, start + length):
            v = v + (x[:, t] - v) / layer.tau
            fires, soft = (v >= layer.threshold).to(x.dtype), sigmoid(4 * (v - layer.threshold))
            rows.append(fires + soft - soft.detach())
            v = torch.where(fires > 0, 0.0, v)
    return torch.stack(rows, 1)


def spiking_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], size: int, theta: float) -> Tensor:
    if layer.embedding is not None:
        *convs, positions = layer.embedding.convs
        for conv, norm, neurons in zip(convs, layer.embedding.norms, layer.embedding_neurons):
            x = lif_layer(neurons, batch_norm(norm, centred_conv(x, conv, lengths)), lengths)
        x = x + centred_conv(x, positions, lengths)
    lmu, (a, b) = layer.lmu, legendre(size, theta)
    u = lif_layer(layer.into, x @ lmu.encode.weight.T + lmu.encode.bias, lengths)
    memories = systems(u, lengths, [a], [b], [torch.eye(size, dtype=torch.float64)])
    read = [torch.cat([m[:, 0], x[:, t]], -1) @ lmu.out.weight.T + lmu.out.bias for t, m in enumerate(memories)]
    h = lif_layer(layer.out_of, torch.stack(read, 1), lengths)
    mixed = lif_layer(layer.after, batch_norm(layer.norm, h @ layer.out.weight.T), lengths)
    return mixed if layer.embedding is None else x + mixed
