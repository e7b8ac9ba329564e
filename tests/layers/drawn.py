"""Tensors and weights drawn for tests of layers, and how far two tensors are from each other."""

from typing import Any

import torch
from torch import Tensor, nn


def relative(ours: Tensor, theirs: Tensor, floor: float = 1e-300) -> float:
    """The norm of the difference over that of ``theirs``; ``floor`` where gradients cancel to nearly nothing."""
    return ((ours - theirs).norm() / theirs.norm().clamp(min=floor)).item()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loud(module: nn.Module, std: float = 0.4) -> Any:
    """The module in fp64 with matrices so large that every part matters; the same whenever it is called."""
    generator, module = torch.Generator().manual_seed(1), module.double()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std, generator=generator)
    return module
