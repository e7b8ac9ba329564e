"""mLSTM and Performer once more, in fp64, from their papers' equations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.layers.mixers import heads_of, out
from tests.layers.oracles.oracles_decay import documents, stacked


def mlstm_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Token by token, in the form with a running maximum ``m``."""
    q, k, v = heads_of(layer, x)
    gates = x @ layer.gates.weight.T + layer.gates.bias
    add, keep = (15 * (2 / (1 + (-2 * gates / 15).exp()) - 1)).chunk(2, -1)
    rows = []
    for document in documents(lengths):
        memory, sums = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), torch.zeros_like(k[:, 0])
        m = torch.full_like(add[:, 0], -1e9)
        for t in document:
            faded = m - (1 + (-keep[:, t]).exp()).log()
            m = torch.maximum(faded, add[:, t]).detach()
            f, i = (faded - m).exp()[..., None], (add[:, t] - m).exp()[..., None]
            memory = f[..., None] * memory + (i * k[:, t])[..., None] * v[:, t, :, None]
            sums = f * sums + i * k[:, t]
            asked = q[:, t] / q.shape[-1] ** 0.5
            size = torch.maximum((asked * sums).sum(-1).abs(), (-m).exp())
            h = (asked[..., None] * memory).sum(-2) / size[..., None]
            h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
            rows.append((h.flatten(1) / (1 + (-(x[:, t] @ layer.gate.weight.T)).exp())) @ layer.out.weight.T)
    return stacked(rows, x)


def performer_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every query with every key before it; only a query's own largest exponent is taken out."""
    q, k, v = heads_of(layer, x)
    q, k = q / q.shape[-1] ** 0.25, k / k.shape[-1] ** 0.25
    directions = layer.directions.double()
    exponents = [torch.einsum("bthd,md->bthm", y, directions) - (y * y).sum(-1, keepdim=True) / 2 for y in (q, k)]
    exponents[0] = exponents[0] - exponents[0].max(-1, keepdim=True).values.detach()
    q, k = ((y.exp() + 1e-4) / len(directions) ** 0.5 for y in exponents)
    rows = []
    for document in documents(lengths):
        for t in document:
            weights = (q[:, t, None] * k[:, document.start : t + 1]).sum(-1)
            weighed = (weights[..., None] * v[:, document.start : t + 1]).sum(1)
            rows.append(weighed / (weights.sum(1)[..., None] + 1e-12))
    return out(layer, stacked(rows, v))
