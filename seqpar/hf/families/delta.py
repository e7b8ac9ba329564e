"""The gated delta rule (arXiv 2412.06464): layers of Qwen3-Next, Qwen3.5 and OLMo-hybrid; KDA (arXiv 2510.26692) of
Kimi-Linear and Ling."""

from types import MappingProxyType

import torch
from torch import Tensor

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family


def delta(
    here: Here,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, None]:
    """``query, key [b, t, k heads, k]``, ``value [b, t, h, v]``, ``beta [b, t, h]``; ``g`` like it, or ``[b, t, h,
    k]``."""
    if initial_state is not None or output_final_state:
        raise ValueError(f"{type(here.layer).__name__} passes states to its rule: a cut model has no cache")
    dtype, share = query.dtype, value.shape[2] // key.shape[2]
    if share > 1:
        query, key = (each.repeat_interleave(share, dim=2) for each in (query, key))
    query, key, value, g, beta = (each.to(torch.float32) for each in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6) for each in (query, key))
    out = here.delta_rule(query, key, value, beta, log_decay=g, scale=query.shape[-1] ** -0.5)
    return out.to(dtype).contiguous(), None


FAMILY = Family(MappingProxyType({"torch_chunk_gated_delta_rule": delta, "chunk_kimi_delta_attention": delta}))
