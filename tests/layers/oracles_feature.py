"""Based, JRT-RNN, LightNet and Aaren once more, token by token in fp64, from their papers' equations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.layers.mixers import heads_of, out, rms
from tests.layers.oracles_decay import documents, stacked, swish


def taylor(q: Tensor, k: Tensor) -> Tensor:
    """The weight ``1 + s + s^2 / 2`` of one key for one query ``[b, h, k]``, without features: ``[b, h, 1]``."""
    s = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    return 1 + s + s * s / 2


def based_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    q, k, v = heads_of(layer, x)
    rows = []
    for document in documents(lengths):
        for t in document:
            weights = [taylor(q[:, t], k[:, s]) for s in range(document.start, t + 1)]
            values = [w * v[:, s] for w, s in zip(weights, range(document.start, t + 1))]
            rows.append(sum(values) / (sum(weights) + 1e-12))
    return out(layer, torch.stack(rows, 1))


def jrt_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], prefix: int) -> Tensor:
    """Pairs of tokens: those up to ``t``, and once more those of the prefix with the encoder's keys and values."""
    q, k, v = heads_of(layer, x)
    k_encoder, v_encoder = k, v
    if layer.k_encoder is not None:
        k_encoder = (x @ layer.k_encoder.weight.T).unflatten(-1, (layer.heads, -1))
        v_encoder = (x @ layer.v_encoder.weight.T).unflatten(-1, (layer.heads, -1))
    rows = []
    for document in documents(lengths):
        for t in document:
            seen = [(k[:, s], v[:, s]) for s in range(document.start, t + 1)]
            seen += [(k_encoder[:, s], v_encoder[:, s]) for s in document[:prefix]]
            weights = [taylor(q[:, t], key) for key, _ in seen]
            rows.append(sum(w * value for w, (_, value) in zip(weights, seen)) / (sum(weights) + 1e-12))
    return out(layer, torch.stack(rows, 1))


def lightnet_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], start: float) -> Tensor:
    """The paper's recurrence, with ``z`` itself: ``start`` is what it is before a document."""
    q, k, v = heads_of(layer, x)
    rows = []
    for document in documents(lengths):
        z, state = torch.full_like(k[:, 0], start), torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        for t in document:
            after = torch.logaddexp(z, k[:, t])
            key = (k[:, t] - after).exp()
            state = (z - after).exp()[..., None] * state + key[..., None] * v[:, t, :, None]
            rows.append((swish(q[:, t])[..., None] * state).sum(-2))
            z = after
    return lightnet_end(layer, torch.stack(rows, 1), x)


def lightnet_of_documents(layer: nn.Module, x: Tensor, lengths: Sequence[int], start: float) -> Tensor:
    """Every token reads the keys' softmax over its document (``start``: one more exponent, without a value)."""
    q, k, v = heads_of(layer, x)
    rows = []
    for document in documents(lengths):
        weights: Callable[[int], Tensor] = lambda s: k[:, s].exp()  # noqa: E731
        total = sum((weights(s) for s in document), torch.tensor(start, dtype=torch.float64).exp())
        for t in document:
            state = sum((weights(s) / total)[..., None] * v[:, s, :, None] for s in document)
            rows.append((swish(q[:, t])[..., None] * state).sum(-2))
    return lightnet_end(layer, torch.stack(rows, 1), x)


def lightnet_end(layer: nn.Module, o: Tensor, x: Tensor) -> Tensor:
    gate = x @ layer.gate[0].weight.T @ layer.gate[1].weight.T
    return (rms(o.flatten(-2), layer.norm.weight) * swish(gate)) @ layer.out.weight.T


def aaren_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax attention of one query to all tokens so far, prefix by prefix."""
    k, v = (getattr(layer, name)(x).unflatten(-1, (layer.heads, -1)) for name in "kv")
    scores = torch.einsum("bthk,hk->bth", k, layer.query) / k.shape[-1] ** 0.5
    rows = []
    for document in documents(lengths):
        for t in document:
            seen = slice(document.start, t + 1)
            weights = scores[:, seen].softmax(1)
            rows.append(torch.einsum("bth,bthv->bhv", weights, v[:, seen]))
    return out(layer, stacked(rows, v))
