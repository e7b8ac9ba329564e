"""Lightning attention (arXiv 2401.04658) with transformers' slopes: MiniMax-01."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family, Function


def lightning(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Any = None,
    cache: Any = None,
) -> tuple[Tensor, None]:
    """Linear attention whose heads decay at rates of their own."""
    if cache is not None:
        raise ValueError(f"{type(module).__name__} was given a cache: a cut model has none")
    mixed = module.act_fn(module.qkv_proj(hidden_states)).unflatten(-1, (module.num_attention_heads, -1))
    query, key, value = mixed.split(module.head_dim, dim=-1)
    out = here.linear_attention(query, key, value, log_decay=-module.slope_rate.flatten().to(query.dtype))
    out = torch.sigmoid(module.output_gate(hidden_states)) * module.norm(out.flatten(2))
    return module.out_proj(out), None


METHODS: Mapping[str, Function] = MappingProxyType({"MiniMaxLightningAttention.forward": lightning})
FAMILY = Family(methods=METHODS)
