"""Token by token, a few tokens at a time: feed-forward parts and losses that never hold all their activations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def tiled(function: Callable[..., Tensor], *inputs: Tensor, tokens: int) -> list[Tensor]:
    """``function`` of ``tokens`` tokens at a time, of all inputs along dim 1; the results in order.

    Law: for a function that mixes no tokens, the results joined are ``function`` of the whole. Of each tile only the
    inputs are kept, and the tile is computed again in backward, so what a function needs in between is never there for
    more than one tile. A function of parameters gets their gradients added up over tiles, in fp32 within a tile and in
    the parameters' dtype between them.

    Raises ``ValueError`` for ``tokens`` below 1. Arctic long sequence training (arXiv 2506.13996) does the same.
    """
    if tokens < 1:
        raise ValueError(f"expected tiles of at least 1 token, got {tokens}")
    tiles = zip(*(each.split(tokens, dim=1) for each in inputs))
    if not torch.is_grad_enabled():
        return [function(*tile) for tile in tiles]
    return [checkpoint(function, *tile, use_reentrant=False) for tile in tiles]
