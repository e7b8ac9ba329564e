"""RWKV-4 (arXiv 2305.13048): averages of the past with weights ``exp(key)`` that decay."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seqpar.crossing.document_sum import document_index
from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family, Function


def attention(here: Here, module: Any, hidden: Tensor, state: Any = None) -> tuple[Tensor, None]:
    """``(sum_(s<t) e^(k_s - (t-1-s) w) v_s + e^(u + k_t) v_t)`` over the same without ``v``.

    The largest key of the document is taken out of all of them, so no sum overflows.
    """
    _no_cache(module, state)
    shifted = here.token_shift(hidden)
    mixed = [
        hidden * mix + shifted * (1 - mix)
        for mix in (module.time_mix_key, module.time_mix_value, module.time_mix_receptance)
    ]
    key, value = module.key(mixed[0]).float(), module.value(mixed[1])
    receptance = torch.sigmoid(module.receptance(mixed[2]))
    largest = here.document_max(key.detach())[:, document_index(here.cut.shard, key.device)]
    weights = torch.exp(key - largest)
    pairs = torch.cat([weights * value, weights], -1)
    log_decay = -torch.exp(module.time_decay.float()).repeat(2)
    first = torch.exp(module.time_first.float()).repeat(2)
    past = here.token_shift(here.diagonal_scan(pairs, log_decay), state="past")
    above, below = (past + first * pairs).chunk(2, -1)
    return module.output(receptance * (above / below).to(value.dtype)), state


def feed_forward(here: Here, module: Any, hidden: Tensor, state: Any = None) -> tuple[Tensor, None]:
    """Channel mixing, which sees the token before."""
    _no_cache(module, state)
    shifted = here.token_shift(hidden)
    key, receptance = (hidden * mix + shifted * (1 - mix) for mix in (module.time_mix_key, module.time_mix_receptance))
    value = module.value(torch.square(torch.relu(module.key(key))))
    return torch.sigmoid(module.receptance(receptance)) * value, state


def _no_cache(module: Any, state: Any) -> None:
    if state is not None:
        raise ValueError(f"{type(module).__name__} was given a state: a cut model has none")


METHODS: Mapping[str, Function] = MappingProxyType(
    {"RwkvSelfAttention.forward": attention, "RwkvFeedForward.forward": feed_forward}
)
FAMILY = Family(methods=METHODS)
