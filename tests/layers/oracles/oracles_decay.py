"""TransNormer, Mamba-2 and Liger once more, token by token in fp64, from their papers' equations."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tests.layers.mixers import heads_of, out, rotate
from tests.oracles.softmax import softmax_attention


def documents(lengths: Sequence[int]) -> Iterator[range]:
    """The rows of each document."""
    for start, length in zip((0, *accumulate(lengths)), lengths):
        yield range(start, start + length)


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows, 1) if rows else torch.zeros_like(like)


# --- TransNormer -----------------------------------------------------------------------------------------------------


def transnormer_layer(
    layer: nn.Module, x: Tensor, lengths: Sequence[int], slopes: Sequence[float], positions: bool
) -> Tensor:
    """Every pair of tokens of a document: ``exp(-slope d) sum_j q_j k_j cos(theta_j d) v`` at distance ``d``."""
    q, k, v = heads_of(layer, x)
    q, k = swish(q), swish(k)
    decay = torch.tensor(slopes, dtype=torch.float64)
    heads, rows = [], []
    for document in documents(lengths):
        for t in document:
            o = torch.zeros_like(v[:, 0])
            for s in range(document.start, t + 1):
                products = q[:, t] * k[:, s]
                if positions:
                    products = products * (angles_of(layer, q) * (t - s)).cos()
                o = o + (-decay * (t - s)).exp()[:, None] * products.sum(-1, keepdim=True) * v[:, s]
            heads.append(o.flatten(-2))
    for o, token in zip(heads, x.unbind(1)):
        normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rows.append((normed * (token @ layer.gate.weight.T)) @ layer.out.weight.T)
    return stacked(rows, x)


def angles_of(layer: nn.Module, q: Tensor) -> Tensor:
    """``theta [h, k]``: the learned ones, or ``10000^(-2 j / (h k))``, the channels ``j`` counted over all heads."""
    if layer.theta is not None:
        return layer.theta
    heads, dim = q.shape[2:]
    powers = [[-2 * (head * dim + channel) / (heads * dim) for channel in range(dim)] for head in range(heads)]
    return 10000 ** torch.tensor(powers, dtype=torch.float64)


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


def mamba2_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Convolution and recurrence one token after another, one head at a time, with the gated norm group by group."""
    xbc, z = x @ layer.xbc.weight.T, x @ layer.gate.weight.T
    dt = (1 + (x @ layer.dt.weight.T + layer.dt_bias).exp()).log() * layer.step_scale + layer.step_offset
    rows = []
    for document in documents(lengths):
        states: list[Tensor | float] = [0.0] * layer.heads
        seen: list[tuple[Tensor, Tensor]] = []
        for t in document:
            convolved = layer.conv_bias
            for back, weight in enumerate(reversed(layer.conv_weight.unbind(1))):
                if t - back >= document.start:
                    convolved = convolved + weight * xbc[:, t - back]
            seen.append((swish(convolved), dt[:, t]))
            if layer.window is not None:  # the last tokens alone, from their beginning
                states = [0.0] * layer.heads
                for token in seen[-layer.window : -1]:
                    _, states = mamba2_token(layer, *token, states)
            y, states = mamba2_token(layer, *seen[-1], states)
            rows.append(gated_norm(layer, y, z[:, t]) @ layer.out.weight.T)
    return stacked(rows, x)


def mamba2_token(
    layer: nn.Module, xbc: Tensor, dt: Tensor, states: list[Tensor | float]
) -> tuple[Tensor, list[Tensor | float]]:
    """``y [b, inner]`` of one token, and the states ``[b, head_dim, state_dim]`` of the heads after it."""
    inner, groups = layer.out.in_features, layer.groups
    x, b, c = xbc.split([inner, *[(xbc.shape[1] - inner) // 2] * 2], -1)
    keys, queries = b.chunk(groups, -1), c.chunk(groups, -1)
    outputs, after = [], []
    for head, channels in enumerate(x.chunk(layer.heads, -1)):
        group, step = head * groups // layer.heads, dt[:, head, None, None]
        decay = (-layer.log_a[head].exp() * step).exp()
        state = decay * states[head] + step * channels[:, :, None] * keys[group][:, None]
        if layer.state_bound is not None:
            state = state * (layer.state_bound / state.square().sum((1, 2), keepdim=True).sqrt()).clamp(max=1)
        outputs.append((state * queries[group][:, None]).sum(-1) + layer.skip[head] * channels)
        after.append(state)
    return torch.cat(outputs, -1), after


def gated_norm(layer: nn.Module, y: Tensor, z: Tensor) -> Tensor:
    parts = (y * swish(z)).chunk(layer.groups, -1)
    return torch.cat([p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt() for p in parts], -1) * layer.norm.weight


# --- Liger -----------------------------------------------------------------------------------------------------------


def liger_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean of windowed softmax attention and of a gated recurrence over the same projections."""
    q, k, v = heads_of(layer, x, layer.kv_heads)
    far = liger_recurrence(layer, x, lengths)
    if layer.rope_base is not None:
        q, k = rotate(q, lengths, layer.rope_base), rotate(k, lengths, layer.rope_base)
    near = softmax_attention(q, k, v, lengths, True, layer.window)
    return out(layer, (near + far) / 2)


def liger_recurrence(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """``o [b, t, h, v]`` of the linear half."""
    q, k, v = heads_of(layer, x, layer.kv_heads)
    forget = (1 / (1 + (-k).exp())) ** (1 / 16)
    if layer.form == "gsa":
        return liger_slots(layer, q, k, v, forget, lengths)
    q, k = (y.exp() / y.exp().sum(-1, keepdim=True) for y in (q, k))
    k = 1 - forget if layer.form == "hgrn2" else k
    share, rows = layer.heads // layer.kv_heads, []
    for document in documents(lengths):
        state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]) if len(document) else x
        for t in document:
            state = forget[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            seen = [q[:, t, head, :, None] * state[:, head // share] for head in range(layer.heads)]
            rows.append(torch.stack([each.sum(1) for each in seen], 1))
    return stacked(rows, q)


def liger_slots(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, forget: Tensor, lengths: Sequence[int]
) -> Tensor:  # fmt: skip
    """Slots of keys and of values, both overwritten by the same shares, read by a softmax over the slots."""
    share, rows = layer.heads // layer.kv_heads, []
    for document in documents(lengths):
        keys, values = (torch.zeros_like(forget[:, 0, :, :, None] * y[:, 0, :, None]) for y in (k, v))
        for t in document:
            a = forget[:, t, :, :, None]
            keys, values = (a * s + (1 - a) * y[:, t, :, None] for s, y in ((keys, k), (values, v)))
            seen = []
            for head in range(layer.heads):
                scores = (keys[:, head // share] * q[:, t, head, None]).sum(-1) / q.shape[-1] ** 0.5
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                seen.append((weights[..., None] * values[:, head // share]).sum(1))
            rows.append(torch.stack(seen, 1))
    return stacked(rows, q)
