"""Based, JRT-RNN, LightNet and Aaren once more, token by token in fp64, from their papers' equations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.layers.mixers import heads_of, out, rms
from tests.layers.oracles.oracles_decay import documents, stacked, swish


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
        z, keys = torch.full_like(k[:, 0], start), []  # those of the tokens so far, as they have decayed
        for t in document:
            after = torch.logaddexp(z, k[:, t])
            keys = [(z - after).exp() * key for key in keys] + [(k[:, t] - after).exp()]
            seen = [
                (swish(q[:, t]) * key * turn(layer, q, t - document.start, s)).sum(-1, keepdim=True) * v[:, document[s]]
                for s, key in enumerate(keys)
            ]
            rows.append(sum(seen))
            z = after
    return lightnet_end(layer, torch.stack(rows, 1), x)


def lightnet_of_documents(layer: nn.Module, x: Tensor, lengths: Sequence[int], start: float) -> Tensor:
    """Every token reads the keys' softmax over its document (``start``: one more exponent, without a value)."""
    q, k, v = heads_of(layer, x)
    rows = []
    for document in documents(lengths):
        weights: Callable[[int], Tensor] = lambda s: k[:, s].exp()  # noqa: E731
        total = sum((weights(s) for s in document), torch.tensor(start, dtype=torch.float64).exp())
        for here, t in enumerate(document):
            seen = [
                (swish(q[:, t]) * weights(s) / total * turn(layer, q, here, there)).sum(-1, keepdim=True) * v[:, s]
                for there, s in enumerate(document)
            ]
            rows.append(sum(seen))
    return lightnet_end(layer, torch.stack(rows, 1), x)


def turn(layer: nn.Module, q: Tensor, here: int, there: int) -> Tensor:
    """By what each channel's product of a query and a key is multiplied ``[k]``: 1 unless the document is a grid."""
    dim = q.shape[-1]
    if layer.width is None:
        return torch.ones(dim, dtype=torch.float64)
    row, column = here // layer.width - there // layer.width, here % layer.width - there % layer.width
    half = (dim + 1) // 2
    steps = [row] * half + [column] * (dim - half)
    angles = [step * 10000 ** (-2 * (i % half) / dim) for i, step in enumerate(steps)]
    return torch.tensor(angles, dtype=torch.float64).cos()


# --- positions on a grid ---------------------------------------------------------------------------------------------


def md_tpe_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every pair of tokens of a row, and of a column, weighed by the kernel of their distance."""
    kernels = [kernel(layer, axis, max(lengths)) for axis in (0, 1)]
    values, rows = x.unflatten(-1, (layer.heads, -1)), []
    for document in documents(lengths):
        for here, t in enumerate(document):
            column = here % layer.width
            in_row = sum(kernels[0][n] * values[:, t - n] for n in range(column + 1))
            in_column = sum(kernels[1][n] * values[:, t - n * layer.width] for n in range(here // layer.width + 1))
            parts = [rms(y.flatten(-2), norm.weight) for y, norm in zip((in_row, in_column), layer.norms)]
            rows.append(torch.cat(parts, -1) @ layer.out.weight.T)
    return torch.stack(rows, 1)


def kernel(layer: nn.Module, axis: int, longest: int) -> list[Tensor]:
    """``[h, 1]`` of every distance."""
    decay = 1 / (1 + (-layer.decay[axis]).exp())
    return [(layer.q[axis] * layer.k[axis] * decay**n).sum(-1, keepdim=True) for n in range(longest + 1)]


# --- Aaren -----------------------------------------------------------------------------------------------------------


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
