"""The layers of ``catalog_local`` once more, token by token in fp64, from their papers' equations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.layers.mixers import rotate
from tests.layers.oracles.oracles_decay import documents, mamba2_layer, stacked, swish
from tests.oracles.convolution import convolution, grid_convolution, shifted


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def rms(o: Tensor, weight: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def shares_of(scores: list[Tensor]) -> list[Tensor]:
    """Softmax over a list."""
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def short_convolution_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    y = convolution(x, layer.weight, layer.bias, lengths=lengths, left=layer.weight.shape[1] - 1)
    return swish(y) if layer.silu else y


def token_shift_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    return (1 - layer.mu) * x + layer.mu * shifted(x, lengths)


def gam_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The convolution, and the memory slot by slot."""
    conv = layer.conv
    local = convolution(x, conv.weight, conv.bias, lengths=lengths, left=conv.weight.shape[1] - 1)
    rows = []
    for token, near in zip(x.unbind(1), local.unbind(1)):
        shares = shares_of([(token * slot).sum(-1, keepdim=True) for slot in layer.slots])
        recalled = sum(share * slot for share, slot in zip(shares, layer.slots))
        near_gate, far_gate = (sigmoid(token @ g.weight.T + g.bias) for g in (layer.local_gate, layer.global_gate))
        rows.append(near_gate * near + far_gate * recalled)
    return stacked(rows, x)


# --- ViG -------------------------------------------------------------------------------------------------------------


def vig_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The convolution tap by tap; then each document from its first token on, and from its last."""
    y = grid_convolution(x, layer.conv_weight, layer.conv_bias, lengths=lengths, width=layer.width)
    heads = (layer.heads, -1)
    keys = layer.heads * layer.key_dim
    q, k, v = (part.unflatten(-1, heads) for part in (y @ layer.qkv.weight.T).split([keys, keys, x.shape[-1]], -1))
    logits = y @ layer.decay[0].weight.T @ layer.decay[1].weight.T + layer.decay[1].bias
    before, after = (sigmoid(part.unflatten(-1, heads)) ** (1 / layer.temperature) for part in logits.chunk(2, -1))
    found: dict[int, Tensor] = {}
    for document in documents(lengths):
        for order, decay in ((document, before), (reversed(document), after)):
            state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]) if len(document) else x
            for t in order:
                state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
                seen = (q[:, t, :, :, None] * state).sum(2) / layer.key_dim**0.5
                found[t] = found[t] + seen / 2 if t in found else seen / 2
    rows = []
    for t in range(x.shape[1]):
        gate = sigmoid(y[:, t] @ layer.gate.weight.T + layer.gate.bias).unflatten(-1, heads)
        local = rms(y[:, t].unflatten(-1, heads), layer.local_norm.weight)
        rows.append((rms(found[t], layer.norm.weight) * gate + local * (1 - gate)).flatten(-2) @ layer.out.weight.T)
    return stacked(rows, x)


# --- Linformer -------------------------------------------------------------------------------------------------------


def linformer_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The projected keys and values of every document, one token after another; then each token on its own."""
    q, k, v = (x @ getattr(layer, name).weight.T for name in "qkv")
    of_values = layer.key_weight if layer.value_weight is None else layer.value_weight
    rows = []
    for document in documents(lengths):
        places = range(layer.key_weight.shape[1])
        keys = [sum(layer.key_weight[i, j] * k[:, t] for i, t in enumerate(document)) for j in places]
        values = [sum(of_values[i, j] * v[:, t] for i, t in enumerate(document)) for j in places]
        for t in document:
            outputs = []
            for head in torch.arange(x.shape[-1]).chunk(layer.heads):
                scores = [(q[:, t, head] * key[:, head]).sum(-1, keepdim=True) for key in keys]
                shares = shares_of([score / len(head) ** 0.5 for score in scores])
                outputs.append(sum(share * value[:, head] for share, value in zip(shares, values)))
            rows.append(torch.cat(outputs, -1) @ layer.out.weight.T)
    return stacked(rows, x)


# --- B'MOJO-F --------------------------------------------------------------------------------------------------------


def bmojo_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every token with each of the tokens that it sees, recent or fading."""
    tied, rows = layer.fading_kv is None, []
    faded = mamba2_layer(layer.memory, x, lengths)
    queries = [layer.q, layer.q if tied else layer.fading_q]
    projections = [layer.kv, layer.kv if tied else layer.fading_kv]
    q = [turned(layer, (x @ of.weight.T).unflatten(-1, (layer.heads, -1)), lengths) for of in queries]
    kv = [(y @ of.weight.T).chunk(2, -1) for y, of in zip((x, faded), projections)]
    k = [turned(layer, keys.unflatten(-1, (layer.kv_heads, -1)), lengths) for keys, _ in kv]
    v = [values.unflatten(-1, (layer.kv_heads, -1)) for _, values in kv]
    for document in documents(lengths):
        for t in document:
            outputs = []
            for head in range(layer.heads):
                shared = head * layer.kv_heads // layer.heads
                seen = [(0, s) for s in range(max(document.start, t - layer.window + 1), t + 1)]
                seen += [(1, s) for s in document if t - 2 * layer.window + 1 <= s <= t - layer.window]
                scores = [(q[kind][:, t, head] * k[kind][:, s, shared]).sum(-1, keepdim=True) for kind, s in seen]
                shares = shares_of([score / q[0].shape[-1] ** 0.5 for score in scores])
                outputs.append(sum(share * v[kind][:, s, shared] for share, (kind, s) in zip(shares, seen)))
            rows.append(torch.cat(outputs, -1) @ layer.out.weight.T)
    return stacked(rows, x)


def turned(layer: nn.Module, y: Tensor, lengths: Sequence[int]) -> Tensor:
    return y if layer.rope_base is None else rotate(y, lengths, layer.rope_base)
