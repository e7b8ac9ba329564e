"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.layers.parts.checks import one_of, positive
from seqpar.training.extras import rms_norm


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dim, then weigh each channel.

    Mixes no tokens, so it takes no cut. Any shape ``[..., dim]``; the weight starts at 1. ``from_one``: what is learned
    is added to 1, and starts at 0 (Gemma, Qwen3-Next), so that weight decay pulls it to 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, from_one: bool = False) -> None:
        super().__init__()
        positive(dim=dim)
        self.weight = nn.Parameter(torch.zeros(dim) if from_one else torch.ones(dim))
        self.eps, self.from_one = eps, from_one

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self.from_one else self.weight
        return rms_norm(x, weight.to(x.dtype), self.eps)


NORMS = ("rms", "rms_from_one", "layer", "layer_plain")


def norm_of(kind: str, dim: int, eps: float) -> nn.Module:
    """A norm of the last dim: ``"rms"``, ``"rms_from_one"``, ``"layer"`` or ``"layer_plain"`` (no bias)."""
    one_of("norm", kind, NORMS)
    if kind.startswith("layer"):
        return nn.LayerNorm(dim, eps, bias=kind == "layer")
    return RMSNorm(dim, eps, from_one=kind == "rms_from_one")


class SimpleRMSNorm(nn.Module):
    """Divide by the root mean square of the last dim, without weights (TransNormerLLM, arXiv 2307.14995).

    Mixes no tokens, so it takes no cut. Any shape ``[..., dim]``; statistics in fp32 (fp64 for fp64).
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], None, self.eps)


class GatedRMSNorm(nn.Module):
    """``norm(x * silu(gate))``: first the gate, then the norm of each group of channels (Mamba-2, arXiv 2405.21060).

    Mixes no tokens, so it takes no cut. ``x`` and ``gate`` are ``[..., dim]``; each of ``groups`` runs of channels has
    its own root mean square, in fp32 (fp64 for fp64), and each channel its weight, which starts at 1.
    """

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        positive(dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"groups must divide dim, got dim={dim} and groups={groups}")
        self.weight = nn.Parameter(torch.ones(dim))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        gated = (x.to(exact) * functional.silu(gate.to(exact))).unflatten(-1, (self.groups, -1))
        normed = functional.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight.to(exact)).to(x.dtype)
