"""Titans' MAG, MAL and MAC once more, token by token in fp64; the memory's own oracle is beside this one."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tests.layers.oracles.oracles_memory import convolved, memory_layer, memory_of, sigmoid, unit


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """``x [b, h, d]`` of one token."""
    half = x.shape[-1] // 2
    angle = position * torch.tensor([base ** (-j / half) for j in range(half)], dtype=torch.float64)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([y.real, y.imag], -1)


def heads_of(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return [part.unflatten(-1, (layer.heads, -1)) for part in (x @ layer.qkv.weight.T).chunk(3, -1)]


def looked(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """One query ``[b, h, d]`` over rows, its heads side by side."""
    k, v = torch.stack([x.expand_as(q) for x in keys], 1), torch.stack([x.expand_as(q) for x in values], 1)
    share = (torch.einsum("bhd,bjhd->bhj", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhj,bjhd->bhd", share, v).flatten(-2)


def windowed(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    rows = []
    _, own_k, own_v = heads_of(layer, layer.persistent)
    for start, length in zip((0, *accumulate(lengths)), lengths):
        keys, values = [], []
        for t in range(length):
            q, k, v = heads_of(layer, x[:, start + t])
            keys.append(turned(k, t, layer.rope_base))
            values.append(v)
            near = [*own_k], [*own_v]
            first = max(0, t + 1 - layer.window)
            rows.append(looked(turned(q, t, layer.rope_base), near[0] + keys[first:], near[1] + values[first:]))
    return torch.stack(rows, 1) @ layer.out.weight.T


def met(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return normed(a, layer.left.weight) * sigmoid(normed(b, layer.right.weight))


def mag_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    y, m = windowed(layer.attention, x, lengths), memory_layer(layer.memory, x, lengths)
    return met(layer.met, y, m) @ layer.out.weight.T


def mal_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    return windowed(layer.attention, memory_layer(layer.memory, x, lengths), lengths)


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def mac_document(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """``x [b, length, dim]`` of one document: its output rows."""
    memory, attention, dim, outs = layer.memory, layer.attention, x.shape[-1], []
    _, own_k, own_v = heads_of(attention, attention.persistent)
    weights = [matrix.expand(x.shape[0], *matrix.shape) for matrix in memory.weights]
    momentum = [torch.zeros_like(matrix) for matrix in weights]
    learned, asked = [], x @ memory.qkv.weight[:dim].T
    for t in range(x.shape[1]):
        place = t % layer.segment
        if place == 0:
            first, rows = weights, []
        if t % memory.rule.chunk == 0:
            anchor = [matrix.clone() for matrix in weights]  # apart: keys, which come of reads, are no part of its loss
        taps = reversed(memory.conv_weight[:dim].unbind(1))
        question = silu(sum(tap * asked[:, t - s] for s, tap in enumerate(taps) if t >= s))
        h = memory_of(first, unit(question.unflatten(-1, (memory.heads, -1))), False)
        _, k, v = heads_of(attention, normed(h, memory.norm.weight).flatten(-2))
        rows.append((turned(k, place, attention.rope_base), v))
        q, k, v = heads_of(attention, x[:, t])
        rows.append((turned(k, place, attention.rope_base), v))
        keys, values = zip(*rows)
        y = looked(turned(q, place, attention.rope_base), [*own_k, *keys], [*own_v, *values]) @ attention.out.weight.T
        learned.append(y @ memory.qkv.weight.T)
        q, k, v = (part.unflatten(-1, (memory.heads, -1)) for part in convolved(memory, learned).chunk(3, -1))
        gates = (y @ memory.gates.weight.T + memory.gates.bias).unflatten(-1, (memory.heads, -1))[..., None, None]
        keep, step, carry = 1 - sigmoid(gates[:, :, 0]), sigmoid(gates[:, :, 1]), sigmoid(gates[:, :, 2])
        loss = (memory_of(anchor, unit(k), False) - v).square().sum()
        found = torch.autograd.grad(loss, anchor, create_graph=True)
        momentum = [carry * s - step * u for s, u in zip(momentum, found)]
        weights = [keep * w + s for w, s in zip(weights, momentum)]
        said = normed(memory_of(weights, unit(q), False), memory.norm.weight).flatten(-2)
        said = (said * silu(y @ memory.gate.weight.T)) @ memory.out.weight.T
        outs.append(met(layer.met, y, said) @ layer.out.weight.T)
    return outs


def mac_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    rows: list[Tensor] = []
    for start, length in zip((0, *accumulate(lengths)), lengths):
        rows += mac_document(layer, x[:, start : start + length])
    return torch.stack(rows, 1)
