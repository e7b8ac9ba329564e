"""RG-LRU (Griffin, arXiv 2402.19427): the recurrent blocks of RecurrentGemma."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family, Function


def block(
    here: Here, module: Any, input_states: Tensor, position_ids: Tensor, attention_mask: Any = None
) -> tuple[Tensor, None]:
    """Two branches, of which one is convolved and then recurrent."""
    conv = module.conv_1d
    x = here.causal_conv(module.linear_x(input_states), conv.weight.squeeze(1), conv.bias)
    return module.linear_out(module.rg_lru(x, position_ids) * module.act_fn(module.linear_y(input_states))), None


def rg_lru(here: Here, module: Any, activations: Tensor, position_ids: Tensor) -> Tensor:
    """``h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t x_t``; the first token of a document is not scaled."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative

    inputs = activations.unflatten(-1, (module.num_attention_heads, module.block_width))
    in_gate = _gate(inputs, module.input_gate_weight, module.input_gate_bias)
    log_a = -8.0 * _gate(inputs, module.recurrent_gate_weight, module.recurrent_gate_bias)
    log_a = log_a * functional.softplus(module.recurrent_param)
    first = position_ids[:, :, None] == 0
    scale = first + ~first * SqrtBoundDerivative.apply(1 - torch.exp(2 * log_a))
    x = activations * in_gate * scale.type(activations.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return here.diagonal_scan(x.to(wide), log_a.to(wide)).to(x.dtype)


def _gate(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``inputs [b, t, h, w]``, a matrix for each head."""
    return torch.sigmoid(torch.einsum("bthw,hwv->bthv", inputs, weight) + bias).flatten(-2)


METHODS: Mapping[str, Function] = MappingProxyType(
    {"RecurrentGemmaRecurrentBlock.forward": block, "RecurrentGemmaRglru.forward": rg_lru}
)
FAMILY = Family(methods=METHODS)
