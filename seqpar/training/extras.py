"""Fused RMSNorm and AdamW: NVIDIA apex's where it is installed, torch's own otherwise; the same numbers.

apex is optional and not in the public index, where an unrelated web toolkit has its name. It counts only with the CUDA
extension that does the work: without it, apex imports and fails at first use.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM, OPTIMIZER = "fused_layer_norm_cuda", "amp_C"  # the CUDA extensions of apex that we can use


@dataclass(frozen=True)
class Apex:
    """What was found under the name apex. ``extensions``: those of ours that are built; empty: it is of no use."""

    version: str
    extensions: tuple[str, ...]
    why_not: str


@cache
def find_apex() -> Apex | None:
    """NVIDIA apex, or what stands in its place; None if there is nothing. Imports nothing."""
    if importlib.util.find_spec("apex") is None:
        return None
    try:
        found = importlib.metadata.metadata("apex")
        version, summary = str(found["Version"] or ""), str(found["Summary"] or "")
    except importlib.metadata.PackageNotFoundError:
        version, summary = "", "NVIDIA"
    built = tuple(name for name in (NORM, OPTIMIZER) if importlib.util.find_spec(name) is not None)
    if built:
        return Apex(version, built, "")
    if "NVIDIA" in summary:
        return Apex(
            version, (), "NVIDIA apex without its CUDA extensions: build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
        )
    what = f"{version} is an unrelated package of that name, a Pyramid web toolkit".strip()
    return Apex(version, (), f"{what}; NVIDIA's is built from its repository")


def uses_apex(extension: str, device: torch.device) -> bool:
    """Whether apex's kernel of that ``extension`` runs on ``device``."""
    found = find_apex() if device.type == "cuda" else None
    return found is not None and extension in found.extensions


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dim; statistics in fp32 (fp64 for fp64)."""
    if x.dtype != torch.float64 and uses_apex(NORM, x.device):
        fused: Any = importlib.import_module("apex.normalization.fused_layer_norm")
        y: Tensor = fused.fused_rms_norm_affine(x, weight, weight.shape, eps)
        return y.to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, eps)


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[Tensor],
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it: apex's ``FusedAdam``, torch's fused kernel, or torch's loop.

    Raises ``ValueError`` if there are no parameters.
    """
    tensors = list(parameters)
    if not tensors:
        raise ValueError("adamw got no parameters")
    if all(uses_apex(OPTIMIZER, each.device) for each in tensors):
        fused: Any = importlib.import_module("apex.optimizers")
        optimizer: torch.optim.Optimizer = fused.FusedAdam(
            tensors, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True
        )
        return optimizer
    on_gpu = all(each.is_cuda for each in tensors)
    return torch.optim.AdamW(
        tensors, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=on_gpu or None
    )
