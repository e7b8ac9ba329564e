"""Memories that learn once more, token by token in fp64, with gradients of their losses from autograd."""

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from seqpar.layers.memory.deep import Loss
from seqpar.layers.memory.rules import Rule


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)


def memory_of(weights: Sequence[Tensor], x: Tensor, normed: bool, gated: bool = False) -> Tensor:
    """``x [b, h, d]`` through the network of every sequence and head."""
    if gated:
        y, gate = (torch.einsum("bhoi,bhi->bho", matrix, x) for matrix in weights[:2])
        return x + torch.einsum("bhoi,bhi->bho", weights[2], y * 0.5 * (1 + torch.erf(y / 2**0.5)) * gate)
    y = x
    for place, matrix in enumerate(weights):
        y = torch.einsum("bhoi,bhi->bho", matrix, y)
        if place + 1 < len(weights):
            y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    if len(weights) == 1:
        return y
    if normed:
        y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x + y


def loss_of(kind: str, error: Tensor, out: Tensor, value: Tensor, power: float, delta: Tensor | None) -> Tensor:
    if kind == "dot":
        return -(out * value).sum()
    if kind == "lp":
        return (error.square() + 1e-6).pow(power / 2).sum()
    if kind == "huber":
        near = error.square().sum(-1).sqrt() <= delta
        far = delta * (error.square() + 1e-6).sqrt().sum(-1)
        return torch.where(near, error.square().sum(-1), far).sum()
    return error.square().sum()


def read_of(rule: object, carried: Sequence[Tensor], first: Sequence[Tensor]) -> list[Tensor]:
    """The weights that are read where these are carried; ``first``: those carried when the chunk began."""
    if rule.retention == "norm":
        q = rule.norm_power
        norms = [(m.abs() ** q).sum((-1, -2), keepdim=True).pow(1 / q) for m in first]
        return [m / norm ** (q - 2) for m, norm in zip(carried, norms)]
    if rule.retention == "softmax":
        return [m.shape[-2] * m.exp() / m.exp().sum((-1, -2), keepdim=True) for m in carried]
    return list(carried)


def newton_schulz(m: Tensor) -> Tensor:
    x = m / m.square().sum((-1, -2), keepdim=True).sqrt()
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(5):
        y = x.mT @ x if tall else x @ x.mT
        poly = -4.7750 * y + 2.0315 * y @ y
        x = 3.4445 * x + (x @ poly if tall else poly @ x)
    return x


def convolved(layer: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    taps = reversed(layer.conv_weight.unbind(1))
    y = sum(tap * row for tap, row in zip(taps, reversed(rows)))
    return y * sigmoid(y)


def projected(layer: nn.Module, x: Tensor, start: int, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys, values ``[b, h, d]`` of a document's tokens."""
    inputs, found = x @ layer.qkv.weight.T, []
    for t in range(length):
        y = convolved(layer, [inputs[:, start + s] for s in range(t + 1)])
        q, k, v = (part.unflatten(-1, (layer.heads, -1)) for part in y.chunk(3, -1))
        found.append((unit(q), unit(k), v))
    return found


def gates_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Of one token, ``[b, h gates]``; through a narrow matrix where every channel has its own."""
    if isinstance(layer.gates, nn.Sequential):
        x = x @ layer.gates[0].weight.T
    last = layer.gates[-1] if isinstance(layer.gates, nn.Sequential) else layer.gates
    return x @ last.weight.T + last.bias


def rows_of(gate: Tensor, matrix: Tensor) -> Tensor:
    """One gate for every row of a matrix: of its channel, or the mean."""
    fits = gate.shape[-1] == matrix.shape[-2]
    return gate[..., None] if fits else gate.mean(-1)[..., None, None]


def document(layer: nn.Module, x: Tensor, start: int, length: int) -> list[Tensor]:
    """What every token of a document reads, ``[b, h, d]``."""
    rule, outs = layer.rule, []
    tokens = projected(layer, x, start, length)
    carried = [matrix.expand(x.shape[0], *matrix.shape) for matrix in layer.weights]
    momentum = [torch.zeros_like(matrix) for matrix in carried]
    first = carried
    for t, (q, _, _) in enumerate(tokens):
        first = carried if t % rule.chunk == 0 else first
        gates = gates_of(layer, x[:, start + t]).unflatten(-1, (layer.heads, -1))
        per = layer.counts[0]
        keep, step = 1 - sigmoid(gates[..., :per]), sigmoid(gates[..., per : 2 * per])
        third = gates[..., 2 * per] if gates.shape[-1] > 2 * per else None
        anchor, total = read_of(rule, first, first), [torch.zeros_like(matrix) for matrix in carried]
        for before in range(min(rule.window, t + 1)):
            _, k, v = tokens[t - before]
            out = memory_of(anchor, k, rule.normed, rule.gated)
            delta = (1 + third.exp()).log() if rule.loss.kind == "huber" else None
            loss = loss_of(rule.loss.kind, out - v, out, v, rule.loss.power, delta)
            weight = sigmoid(gates[..., gates.shape[-1] - rule.window + before]) if rule.window > 1 else 1.0
            for place, grad in enumerate(torch.autograd.grad(loss, anchor, create_graph=True)):
                total[place] = total[place] + (grad * weight[..., None, None] if rule.window > 1 else grad)
        keeps, steps = ([rows_of(gate, matrix) for matrix in carried] for gate in (keep, step))
        if rule.muon:
            momentum = [sigmoid(third)[..., None, None] * s - u for s, u in zip(momentum, total)]
            carried = [a * w + b * newton_schulz(s) for a, b, w, s in zip(keeps, steps, carried, momentum)]
        elif rule.momentum:
            momentum = [sigmoid(third)[..., None, None] * s - b * u for b, s, u in zip(steps, momentum, total)]
            carried = [a * w + s for a, w, s in zip(keeps, carried, momentum)]
        else:
            carried = [a * w - b * u for a, b, w, u in zip(keeps, steps, carried, total)]
        outs.append(memory_of(read_of(rule, carried, first), q, rule.normed, rule.gated))
    return outs


def swla_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """A memory of one matrix that begins with zeros and whose loss is minus the product with the value."""
    rule = Rule(1, 1, Loss("dot"), window=layer.window)
    one = layer.norm.weight.shape[0]
    own = dict(vars(layer)["_modules"]) | {"conv_weight": layer.conv_weight, "heads": layer.heads, "rule": rule}
    weights = [torch.zeros(layer.heads, one, one, dtype=x.dtype, requires_grad=True)]
    return memory_layer(SimpleNamespace(**own, weights=weights, counts=[1, 1, 0, layer.window]), x, lengths)


def memory_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    rows: list[Tensor] = []
    for start, length in zip((0, *accumulate(lengths)), lengths):
        rows += document(layer, x, start, length)
    o = torch.stack(rows, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    gate = x @ layer.gate.weight.T
    return (o.flatten(-2) * gate * sigmoid(gate)) @ layer.out.weight.T
