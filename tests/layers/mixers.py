"""Every token mixer once more, token by token in fp64, from its paper's equations: the oracle of the layers."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracles.recurrence import decayed_linear_attention
from tests.oracles.softmax import softmax_attention


def rotate(x: Tensor, lengths: Sequence[int], base: float) -> Tensor:
    """Each pair of channels as a complex number, times ``exp(i position base^(-2 j / k))``; positions per document."""
    half = x.shape[-1] // 2
    rows = []
    for start, length in zip((0, *accumulate(lengths)), lengths):
        for position in range(length):
            pairs = torch.complex(x[:, start + position, :, :half], x[:, start + position, :, half:])
            turn = torch.tensor([position * base ** (-j / half) for j in range(half)], dtype=torch.float64)
            turned = pairs * torch.polar(torch.ones(half, dtype=torch.float64), turn)
            rows.append(torch.cat([turned.real, turned.imag], -1))
    return torch.stack(rows, 1)


def heads_of(layer: nn.Module, x: Tensor, heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (functional.linear(x, getattr(layer, name).weight) for name in "qkv")
    kv_heads = layer.heads if heads is None else heads
    return q.unflatten(-1, (layer.heads, -1)), k.unflatten(-1, (kv_heads, -1)), v.unflatten(-1, (kv_heads, -1))


def rms(o: Tensor, weight: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def out(layer: nn.Module, o: Tensor) -> Tensor:
    return o.flatten(-2) @ layer.out.weight.T


def softmax_attention_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    q, k, v = heads_of(layer, x, layer.kv_heads)
    if layer.rope_base is not None:
        q, k = rotate(q, lengths, layer.rope_base), rotate(k, lengths, layer.rope_base)
    return out(layer, softmax_attention(q, k, v, lengths, layer.causal, layer.window))


def linear_attention_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda y: y / (1 + (-y).exp()),
        "elu_plus_one": lambda y: torch.where(y > 0, y + 1, y.exp()),
        "identity": lambda y: y,
    }
    q, k, v = heads_of(layer, x)
    q, k = maps[layer.feature_map](q), maps[layer.feature_map](k)
    scale = q.shape[-1] ** -0.5
    o = decayed_linear_attention(q, k, v, lengths=lengths, continues=False, scale=scale)[0]
    if layer.normaliser:
        ones = torch.ones_like(v[..., :1])
        o = o / (decayed_linear_attention(q, k, ones, lengths=lengths, continues=False, scale=scale)[0] + 1e-6)
    return out(layer, rms(o, layer.norm.weight))


def lightning_attention_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], slopes: Sequence[float]) -> Tensor:
    q, k, v = (y / (1 + (-y).exp()) for y in heads_of(layer, x))
    log_decay = -torch.tensor(slopes, dtype=torch.float64)
    o = decayed_linear_attention(q, k, v, log_decay, lengths=lengths, continues=False)[0]
    gate = x @ layer.gate[0].weight.T @ layer.gate[1].weight.T
    return (rms(o.flatten(-2), layer.norm.weight) / (1 + (-gate).exp())) @ layer.out.weight.T


def retention_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    q, k, v = heads_of(layer, x)
    q, k = rotate(q, lengths, layer.rope_base), rotate(k, lengths, layer.rope_base)
    decay = torch.tensor([1 - 2.0 ** (-5 - head) for head in range(layer.heads)], dtype=torch.float64)
    scale = k.shape[-1] ** -0.5
    o = decayed_linear_attention(q, k, v, decay.log(), lengths=lengths, continues=False, scale=scale)[0]
    centred = o - o.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = x @ layer.gate.weight.T
    return (normed.flatten(-2) * gate / (1 + (-gate).exp())) @ layer.out.weight.T


def gla_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    q, k, v = heads_of(layer, x)
    logits = x @ layer.decay[0].weight.T @ layer.decay[1].weight.T + layer.decay[1].bias
    log_decay = (-(1 + (-logits).exp()).log() / 16).unflatten(-1, (layer.heads, -1))
    scale = k.shape[-1] ** -0.5
    o = decayed_linear_attention(q, k, v, log_decay, lengths=lengths, continues=False, scale=scale)[0]
    gate = x @ layer.gate.weight.T
    return (rms(o, layer.norm.weight).flatten(-2) * gate / (1 + (-gate).exp())) @ layer.out.weight.T
