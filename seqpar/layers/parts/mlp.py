"""The feed-forward part of a block: SwiGLU (Shazeer 2020, arXiv 2002.05202), or SGLU (TransNormerLLM, 2307.14995)."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.layers.parts.checks import one_of, positive
from seqpar.training.tiled import tiled

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }
)


class MLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` or, not ``gated``, ``down(act(up(x)))``, token by token. ``x [b, t, dim]``.

    ``activation``: one of ``ACTIVATIONS`` (``"gelu_tanh"`` is the approximation; ``"relu2"`` the square, arXiv
    2109.08668); ``bias``: of all projections. ``tile_tokens`` as for :class:`SwiGLU`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        tile_tokens: int = 0,
    ) -> None:
        super().__init__()
        positive(dim=dim, hidden=hidden)
        if tile_tokens < 0:
            raise ValueError(f"tile_tokens must be 0 (all) or more, got {tile_tokens}")
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.tile_tokens = tile_tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.tile_tokens:
            return torch.cat(tiled(self._run, x, tokens=self.tile_tokens), dim=1)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        y: Tensor = self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))
        return y


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, token by token: mixes no tokens, so it takes no cut. ``x [b, t, dim]``.

    ``tile_tokens``: work on so many tokens at a time (0: all), so that what is ``hidden`` wide is never all there; it
    is computed again in backward.
    """

    def __init__(self, dim: int, hidden: int, tile_tokens: int = 0) -> None:
        super().__init__()
        positive(dim=dim, hidden=hidden)
        if tile_tokens < 0:
            raise ValueError(f"tile_tokens must be 0 (all) or more, got {tile_tokens}")
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.tile_tokens = tile_tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.tile_tokens:
            return torch.cat(tiled(self._run, x, tokens=self.tile_tokens), dim=1)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class SGLU(SwiGLU):
    """``down(gate(x) * up(x))``: a gated linear unit without activation, of TransNormerLLM; else as :class:`SwiGLU`.

    A block takes it in the place of its feed-forward part: ``block.mlp = SGLU(dim, hidden)``.
    """

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y
