"""The norm of all gradients, however they are laid out over ranks, and the same clipping on each of them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale gradients so that their norm is at most ``most``; the norm that they had, the same on every rank.

    Law: the norm is that of the model's whole gradient, once, in fp32 (fp64): of what is the same on every rank (as
    after our own sums, or DDP's), of what FSDP2 or tensor parallelism shards, over one mesh or several, and of any
    mixture. All ranks that share a mesh call this; one small sum for each mesh. Gradients whose norm is not finite are
    left as they are: look at the norm before the optimizer's step.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    if not gradients:
        return torch.zeros(())
    meshes: dict[Any, list[Tensor]] = {}
    for each in gradients:
        meshes.setdefault(getattr(each, "device_mesh", None), []).append(each)
    norms = [_norm(each) for each in meshes.values()]
    norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    factor = torch.where(norm.isfinite(), (most / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for each in gradients:
        each.mul_(factor.to(each.device, each.dtype))
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of gradients on one mesh."""
    exact = torch.float64 if any(each.dtype == torch.float64 for each in gradients) else torch.float32
    norms = torch.stack([torch.linalg.vector_norm(each, dtype=exact) for each in gradients])
    norm: Any = torch.linalg.vector_norm(norms)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
