"""Small models, steps and comparisons for the tests of the run time."""

import torch
from torch import nn

from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.activations import activations
from seqpar.offload.runtime.streams import InPlace

SWAP = Fractions(0.0, 1.0, 0.0)
HALF = Fractions(0.5, 0.5, 0.0)
AGAIN = Fractions(0.0, 0.0, 1.0)
MIXED = Fractions(0.25, 0.25, 0.5)


class Layer(nn.Module):
    """A layer that saves a bit of everything: views, transposes, halves, an expanded tensor, a buffer."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, dim))

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        mixed = torch.cumsum(a.sigmoid() * b, 1) / torch.arange(1, x.shape[1] + 1)[None, :, None]
        heads = mixed.unflatten(-1, (2, -1)).transpose(1, 2)
        again = (heads * heads.mean(-1, keepdim=True).expand_as(heads)).transpose(1, 2).flatten(2)
        return x + self.down((again * self.scale).tanh() * mixed)


class Stack(nn.Module):
    """Some layers; ``order`` may call one of them twice."""

    def __init__(self, layers=4, dim=8, order=None):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Layer(dim) for _ in range(layers))
        self.order = order or range(layers)
        self.double()

    def forward(self, x):
        for number in self.order:
            x = self.blocks[number](x)
        return x


def data(seed=0, batch=2, tokens=37, dim=8):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, batch, tokens, dim, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), w


def swapping(model, fate=SWAP, **options):
    """With every storage large enough, all layers, and copies done at once, unless told otherwise."""
    chosen = {"keep_last": 0, "smallest_bytes": 1, "lanes": (InPlace(), InPlace())} | options
    return activations(model, fate, **chosen)


def gradients(model, *others):
    return [p.grad.clone() for p in [*model.parameters(), *others] if p.grad is not None]


def step(model, swap=None, seed=0, **sizes):
    """Loss and all gradients (of the input, too) of one step, under ``swap``."""
    model.zero_grad()
    x, w = data(seed, **sizes)
    if swap is None:
        loss = (model(x) * w).sum()
    else:
        with swap:
            loss = (model(x) * w).sum()
    loss.backward()
    return [loss.detach(), *gradients(model, x)]


def same(found, expected):
    """Bit for bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
