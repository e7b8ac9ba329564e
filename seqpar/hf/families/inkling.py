"""Attention of Inkling: each token says what the distance of a key counts for it."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from seqpar.collectives.planned import rows
from seqpar.crossing.here import Here
from seqpar.hf.attend import attend
from seqpar.hf.families.eager import alone
from seqpar.hf.families.family import Family, Function
from seqpar.ops.softmax_block.scores import Buckets


def inkling(
    here: Here, module: Any, hidden_states: Tensor, attention_mask: Any, conv_mask: Any = None, cache: Any = None
) -> tuple[Tensor, None]:
    """A bias by distance is ``states @ profiles``: the states are more channels of the query, which meet the profile
    of a distance where others meet the key."""
    alone(here, cache)
    dim = module.head_dim
    query = module.q_norm(module.q_proj(hidden_states).unflatten(-1, (-1, dim)))
    key = module.k_norm(module.k_sconv(module.k_proj(hidden_states), conv_mask=conv_mask).unflatten(-1, (-1, dim)))
    value = module.v_sconv(module.v_proj(hidden_states), conv_mask=conv_mask).unflatten(-1, (-1, dim))
    states = module.r_proj(hidden_states).unflatten(-1, (module.num_heads, -1)) / module.scaling
    query = _sharpened(here, module, torch.cat([query, states.to(query.dtype)], -1))
    profiles = functional.pad(module.rel_logits_proj.proj.t(), (dim, 0, 0, 1))  # [extent + 1, dim + states]; 0 far away
    out, _ = attend(
        module,
        query.transpose(1, 2),
        functional.pad(key, (0, states.shape[-1])).transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=module.sliding_window,
        relative=(profiles.expand(module.num_heads, -1, -1), _behind(module.rel_extent)),
        seqpar_cut=here.cut,
    )
    return module.o_proj(out.flatten(2)), None


def _sharpened(here: Here, module: Any, query: Tensor) -> Tensor:
    """Times a factor that grows with the place in the document, in layers that see all of it."""
    floor = module.config.log_scaling_n_floor
    if module.is_sliding or floor is None:
        return query
    places = (here.positions.to(query.device) + 1).float()
    factor = 1.0 + module.config.log_scaling_alpha * torch.log((places / floor).clamp(min=1.0))
    return (query.float() * factor[:, None, None]).to(query.dtype)


@lru_cache(maxsize=32)
def _behind(extent: int) -> Buckets:
    """A column for each distance back below ``extent``, and one for all others."""
    return Buckets(-extent, rows(np.arange(extent, -1, -1)))


METHODS: Mapping[str, Function] = MappingProxyType({"InklingAttention.forward": inkling})
FAMILY = Family(methods=METHODS)
