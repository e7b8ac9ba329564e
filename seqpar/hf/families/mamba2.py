"""Mamba-2 (arXiv 2405.21060): Mamba-2, and the layers of Bamba, Falcon-H1, Granite 4, Nemotron-H and Zamba2."""

import math
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family
from seqpar.hf.families.mamba import not_fused


def scan(
    here: Here,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, None]:
    """``hidden_states [b, t, h, p]``, ``dt [b, t, h]``, ``A, D, dt_bias [h]``, ``B, C [b, t, g, n]``."""
    if initial_states is not None or z is not None:
        raise ValueError(f"{type(here.layer).__name__} passes states or a gate to its scan: a cut model has no cache")
    heads, groups = hidden_states.shape[2], B.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    x, b, c = (each.to(torch.float32) for each in (hidden_states, B, C))
    b, c = (each.repeat_interleave(heads // groups, dim=2) for each in (b, c))
    out = here.linear_attention(c, b, x * dt[..., None], log_decay=A.to(x.dtype) * dt)
    out = (out if D is None else out + D[..., None] * x).contiguous()
    return (out, None) if return_final_states else out


FAMILY = Family(MappingProxyType({"mamba2_chunk_scan": scan, "mamba2_split_conv1d_scan_combined": not_fused}))
